"""Building: what is compiled again and what is not, what is left out and how that is said; the installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import files, version
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megamoe.ops import kernels as available

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
NOTHING = "/does/not/exist"
OP = """
#include "mm/tensor.h"
#include "factor.h"
namespace {
mm::Tensor times(const mm::Tensor& x) {
  const mm::Argument rows{"NAME", "x", x};
  rows.rows();
  mm::Tensor y = mm::empty({x.size(0), x.size(1)}, x.scalar_type(), x);
  mm::by_dtype<float, mm::BFloat16>(rows, [&]<typename T>() {
    for (int64_t r = 0; r < x.size(0); ++r) {
      for (int64_t i = 0; i < x.size(1); ++i) {
        mm::rows_out<T>(y)[r][i] = FACTOR * mm::rows_in<T>(x)[r][i];
      }
    }
  });
  return y;
}
}  // namespace
STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) { m.def("NAME(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) { m.impl("NAME", TORCH_BOX(&times)); }
"""
USE = """
import torch, megamoe_kernels
megamoe_kernels.load()
x = torch.arange(6.0).view(2, 3)
print(torch.ops.megamoe.{name}(x).tolist())
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Two families: `twice`, which works, and `same`, which needs no header of its own."""
    folder = tmp_path / "sources"
    (folder / "csrc" / "cpu").mkdir(parents=True)
    (folder / "csrc" / "cpu" / "twice.cpp").write_text(OP.replace("NAME", "twice"))
    (folder / "csrc" / "cpu" / "same.cpp").write_text(
        OP.replace("NAME", "same").replace('#include "factor.h"', "#define FACTOR 1")
    )
    (folder / "csrc" / "cpu" / "factor.h").write_text("#define FACTOR 2\n")
    return folder


@pytest.fixture
def calls(tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to which the compiler adds its arguments, a line for each call that makes something."""
    log, wrapper = tmp_path / "calls", tmp_path / "compiler"
    log.touch()
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo "$@" >> {log}\nexec {cxx} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


@pytest.fixture(autouse=True)
def objects_of_this_test(tmp_path: Path, build_tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_tool, "OBJECTS", tmp_path / "objects")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600)


def use(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", USE.format(name=name), **environment)


def test_nothing_is_compiled_twice(build_tool: ModuleType, sources: Path, calls: Path, tmp_path: Path) -> None:
    def build(out: str) -> list[str]:
        calls.write_text("")
        build_tool.build(tmp_path / out, targets=["cpu"], sources=sources)
        return sorted(Path(line.split()[-1]).name for line in calls.read_text().splitlines() if " -c " in line)

    assert build("first") == ["same.cpp", "twice.cpp"]
    assert build("first") == build("second") == []
    (sources / "csrc" / "cpu" / "factor.h").write_text("#define FACTOR 3\n")
    assert build("second") == ["twice.cpp"]
    done = [
        use("twice", MEGAMOE_KERNELS_LIB=str(tmp_path / out), PYTHONPATH=str(KERNELS)) for out in ("first", "second")
    ]
    assert [one.stdout for one in done] == [
        "[[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]\n",
        "[[0.0, 3.0, 6.0], [9.0, 12.0, 15.0]]\n",
    ], done[0].stderr + done[1].stderr


def test_what_is_left_out_is_said_and_recorded(
    build_tool: ModuleType,
    sources: Path,
    cxx: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*options: str) -> int:
        words = ["--out", str(tmp_path / "out"), "--sources", str(sources), "--only", "twice", *options]
        return int(build_tool.main(words))

    monkeypatch.setenv("CUDACXX", NOTHING)
    assert build() == 0
    assert capsys.readouterr().out == f"cpu: built twice\ncuda: left out, CUDACXX={NOTHING} is no compiler that runs\n"
    record = json.loads((tmp_path / "out" / "build.json").read_text())
    assert record["built"]["cpu"]["families"] == ["twice"]
    assert "-O3" in record["built"]["cpu"]["flags"]
    assert record["left_out"] == {"cuda": f"CUDACXX={NOTHING} is no compiler that runs"}
    assert record["torch"] == version("torch")
    assert build("--targets", "cpu,cuda") == 1  # named, so it has to be there
    for wrong, expected in (("--only", "same, twice"), ("--targets", "cpu, cuda, emu")):
        assert build(wrong, "wrong") == 2
        assert f"expected: {expected}" in capsys.readouterr().err


def test_a_source_that_does_not_compile(build_tool: ModuleType, sources: Path, cxx: str, tmp_path: Path) -> None:
    build_tool.build(tmp_path, targets=["cpu"], sources=sources)
    (sources / "csrc" / "cpu" / "twice.cpp").write_text("no_such_type x;\n")
    record = build_tool.build(tmp_path, targets=["cpu"], sources=sources)
    assert record["built"] == {}
    assert "twice" in record["left_out"]["cpu"].splitlines()[0]
    assert "no_such_type" in record["left_out"]["cpu"]
    assert not (tmp_path / "libmegamoe_cpu.so").exists()
    assert json.loads((tmp_path / "build.json").read_text()) == record
    done = use("same", MEGAMOE_KERNELS_LIB=str(tmp_path), PYTHONPATH=str(KERNELS))
    assert "KernelsUnavailable: megamoe-kernels was built without its CPU part" in done.stderr


def test_an_op_names_what_is_wrong(sources: Path, cxx: str, build_tool: ModuleType, tmp_path: Path) -> None:
    build_tool.build(tmp_path, only=["twice"], targets=["cpu"], sources=sources)
    code = USE.format(name="same").rsplit("print", 1)[0] + (
        "for rows in (x.int(), x[0], x.t(), x[:0], x[:, :0], x[:, 1:], x[1:, ::3].bfloat16()):\n"
        "    try: print(torch.ops.megamoe.twice(rows).tolist())\n"
        "    except RuntimeError as error: print(str(error))\n"
    )
    done = run(sys.executable, "-c", code, MEGAMOE_KERNELS_LIB=str(tmp_path), PYTHONPATH=str(KERNELS))
    head = "megamoe::twice: argument x cannot be used.\n"
    assert done.stdout == (
        f"{head}  got: int32\n  expected: float32, bfloat16\n"
        f"{head}  got: shape [3]\n  expected: shape [any, any]\n"
        f"{head}  got: strides [1, 3]\n  expected: rows with their elements side by side, call .contiguous()\n"
        "[]\n[[], []]\n[[2.0, 4.0], [8.0, 10.0]]\n[[6.0]]\n"
    ), done.stderr


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("", ["80", "90", "90+PTX"]),
        ("90a;100", ["90a", "100"]),
        (" 80,  90+PTX", ["80", "90+PTX"]),
    ],
)
def test_architectures(build_tool: ModuleType, wanted: str, expected: list[str]) -> None:
    assert build_tool.architectures(wanted) == expected


def test_an_architecture_that_is_none(build_tool: ModuleType) -> None:
    with pytest.raises(build_tool.BuildError, match="'sm_90'"):
        build_tool.architectures("sm_90")
    assert build_tool.gencode("90a") == "-gencode=arch=compute_90a,code=sm_90a"
    assert build_tool.gencode("90+PTX") == "-gencode=arch=compute_90,code=compute_90"


def test_the_report_of_ptxas(build_tool: ModuleType) -> None:
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 4.000 ms
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for _Z6helperv
    64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 64 bytes cumulative stack size
"""
    rows = [tuple(one.values()) for one in build_tool.resources(log)]
    assert rows == [("_Z1av", "sm_80", 40, 0, 0, 512), ("_Z1bv", "sm_90", 255, 64, 8, 0)]


def test_torch_is_found_behind_the_isolation_of_pip() -> None:
    """-S hides the environment's packages from this process only, as pip does with PYTHONPATH."""
    code = "import sys; sys.path.insert(0, 'kernels'); import toolchain; print(toolchain.find_torch().version)"
    done = run(sys.executable, "-S", "-c", code, PYTHONPATH=NOTHING, PYTHONNOUSERSITE="1")
    assert done.stdout.strip() == version("torch"), done.stderr


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The python of an empty environment, and a folder with nothing but setuptools."""
    folder, only = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("setuptools")
    venv.create(folder, with_pip=False, symlinks=True)
    top_level = {Path(str(file)).parts[0] for file in files("setuptools") or []} - {"..", "__pycache__"}
    for name in top_level:
        (only / name).symlink_to(Path(str(files("setuptools")[0].locate())).parents[1] / name)  # type: ignore[index]
    return folder / "bin" / "python", only


def test_without_torch_the_error_says_what_to_do(without_torch: tuple[Path, Path], tmp_path: Path) -> None:
    python, setuptools = without_torch
    done = run(python, KERNELS / "build.py", "--out", tmp_path, PYTHONPATH="")
    assert done.returncode == 2
    assert done.stderr.startswith("torch was not found")
    assert "install torch 2.11 or later" in done.stderr
    copy = shutil.copytree(KERNELS, tmp_path / "copy", ignore=shutil.ignore_patterns("build", "lib", "*.egg-info"))
    code = f"import os; os.chdir({str(copy)!r}); from setuptools import build_meta; build_meta.build_wheel('..')"
    done = run(python, "-c", code, PYTHONPATH=str(setuptools))
    assert done.returncode != 0
    assert "error: megamoe-kernels cannot be built.\ntorch was not found" in done.stderr


@pytest.mark.parametrize(
    "built_for, runs, does_not",
    [
        (["80", "90"], [(8, 0), (8, 9), (9, 0)], [(7, 5), (10, 0)]),
        (["80", "90+PTX"], [(8, 6), (9, 0), (12, 0)], [(7, 5)]),
        (["86"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (["90a"], [(9, 0)], [(8, 0), (10, 0)]),
        ([], [], [(9, 0)]),
    ],
)
def test_which_gpus_a_library_is_for(
    kernels: ModuleType,
    built_for: list[str],
    runs: list[tuple[int, int]],
    does_not: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_loaded", {"built": {"cuda": {"architectures": built_for}}})
    assert [kernels.runs_on(*one) for one in runs + does_not] == [True] * len(runs) + [False] * len(does_not)


def test_megamoe_finds_the_ops(kernels: ModuleType) -> None:
    def reason(op: str, dtype: torch.dtype, device: str = "cpu") -> str:
        return available.unavailable(op, torch.device(device), dtype)

    assert available.problem() == ""
    assert available.state()["built"] == kernels.what()["built"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert reason("permute_rows", dtype) == ""
    assert reason("plan", torch.int64) == ""
    assert "does not compute in int64 on cpu" in reason("permute_rows", torch.int64)
    assert "was built without no_such_op" in reason("no_such_op", torch.float32)
    assert "has no ops for meta" in reason("plan", torch.float32, "meta")
    assert "does not compute in float64 on cuda" in reason("glu_fwd", torch.float64, "cuda")
    if torch.version.cuda is None:
        assert reason("plan", torch.float32, "cuda").startswith("megamoe-kernels is here without CUDA: ")


class TestWheel:
    """`pip install ./kernels`, as a user does, but with the environment's setuptools and without a network."""

    pytestmark = pytest.mark.xdist_group("kernels_wheel")  # they share the folder in which setuptools works

    @staticmethod
    def install(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        if tuple(map(int, version("setuptools").split(".")[:1])) < (77,):
            pytest.skip(f"setuptools {version('setuptools')} is here, 77 is needed")
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", target]
        return run(sys.executable, "-m", "pip", "install", "-v", *options, KERNELS, **environment)

    def test_it_is_installed_and_runs(self, kernels: ModuleType, cxx: str, tmp_path: Path) -> None:
        """After the fixture `kernels` everything is compiled already."""
        done = self.install(tmp_path, MEGAMOE_KERNELS_CUDA="0", MEGAMOE_KERNELS_REQUIRE="1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "-py3-none-linux_" in done.stdout
        code = (
            "import torch, megamoe_kernels as k; k.load(); print(k.__file__, k.what()['left_out'])\n"
            "print([one.tolist() for one in torch.ops.megamoe.plan(torch.tensor([[1], [0], [1]]), 2)])"
        )
        done = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path), MEGAMOE_KERNELS_LIB="")
        where, what = done.stdout.splitlines()
        assert where == f"{tmp_path / 'megamoe_kernels' / '__init__.py'} {{'cuda': 'not asked for'}}"
        assert what == "[[[1], [0], [2]], [1, 0, 2], [1, 2]]", done.stderr

    def test_what_is_required_is_an_error_where_it_is_missing(self, cxx: str, tmp_path: Path) -> None:
        done = self.install(tmp_path, CUDACXX=NOTHING, MEGAMOE_KERNELS_REQUIRE="1")
        assert done.returncode != 0
        assert f"cuda: left out, CUDACXX={NOTHING} is no compiler that runs" in done.stdout + done.stderr
        assert "MEGAMOE_KERNELS_REQUIRE=1 asks for everything" in done.stdout + done.stderr
        assert not (tmp_path / "megamoe_kernels").exists()

    def test_without_a_compiler_there_is_nothing_to_install(self, tmp_path: Path) -> None:
        done = self.install(tmp_path, CXX=NOTHING)
        assert done.returncode != 0
        assert "nothing runs without the CPU's library" in done.stdout + done.stderr
