"""`python -m megamoe doctor`: everything is named, the reasons are those of the registry, and what is required is."""

import json
import os
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch

from megamoe import ops
from megamoe.cli import doctor, main
from megamoe.ops import kernels
from megamoe.ops.all import OPS
from megamoe.ops.registry import Op

ROOT = Path(__file__).resolve().parents[3]


def megamoe(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the package from the sources and no libraries of it."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), **environment}
    command = [sys.executable, "-m", "megamoe", *words]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


def test_no_op_is_forgotten() -> None:
    modules = [import_module(f"megamoe.ops.{module.name}") for module in iter_modules(ops.__path__)]
    names = {value.name for module in modules for value in vars(module).values() if isinstance(value, Op)}
    assert names == {op.name for op in OPS}
    assert len(names) == len(OPS)


def test_the_report_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["torch", torch.__version__] in [line.split() for line in lines]
    titles = [title for title, rule in pairwise(lines) if rule and set(rule) == {"-"}]
    assert titles == ["Versions", "GPUs", "Compiled kernels", "Ops with `auto`"]
    for op in OPS:
        for device in ("cpu", "cuda"):
            for dtype in ("float32", "bfloat16"):
                assert sum(line.split()[:3] == [op.name, device, dtype] for line in lines) == 1


def test_the_reasons_are_those_of_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"versions", "gpus", "kernels", "ops", "missing"}
    assert found["kernels"] == kernels.state()
    by_place = {(one["op"], one["device"], one["dtype"]): one for one in found["ops"]}
    assert len(by_place) == len(found["ops"]) == 4 * len(OPS)
    for op in OPS:
        one, choice = by_place[op.name, "cpu", "bfloat16"], op.choose("auto", torch.device("cpu"), torch.bfloat16)
        assert (one["implementation"], one["reason"]) == (choice.name, choice.reason)
        if torch.version.cuda is None:
            one = by_place[op.name, "cuda", "float32"]
            assert (one["implementation"], one["reason"]) == (None, "this torch is built without CUDA")


def test_what_is_required_and_missing_is_an_error(tmp_path: Path) -> None:
    without = megamoe("doctor", MEGAMOE_KERNELS_LIB=str(tmp_path), MEGAMOE_KERNELS_REQUIRE="")
    assert without.returncode == 0, without.stderr
    assert str(tmp_path / "build.json") in without.stdout
    required = megamoe("doctor", MEGAMOE_KERNELS_LIB=str(tmp_path), MEGAMOE_KERNELS_REQUIRE="1")
    assert required.returncode == 1, required.stderr
    last = required.stdout.split("Required by MEGAMOE_KERNELS_REQUIRE=1 and missing\n")[1]
    assert "without its compiled libraries" in last
    assert required.stdout.startswith(without.stdout.rstrip())


def test_a_build_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"families": ["glu", "plan"], "compiler": "g++ 12"}
    cuda = {"families": ["plan"], "compiler": "nvcc 13", "architectures": ["80", "90+PTX"]}
    state = {
        "version": "0.1.0",
        "folder": "lib",
        "torch": "2.13.0",
        "built": {"cpu": cpu, "cuda": cuda},
        "left_out": {"emu": "not asked for"},
        "not_loaded": {"cuda": "this torch has none"},
    }
    monkeypatch.setattr(kernels, "state", lambda: state)
    section = doctor.text(doctor.examine()).split("Compiled kernels\n----------------\n")[1].split("\n\n")[0]
    assert section.splitlines() == [
        "megamoe-kernels 0.1.0 in lib",
        "cpu: glu plan; g++ 12, torch 2.13.0",
        "cuda: plan, for GPUs 80 90+PTX; nvcc 13, torch 2.13.0",
        "cuda: not in use, this torch has none",
        "emu: left out, not asked for",
    ]


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc -O3")
    found = doctor.versions()
    assert (found["C++ compiler"], found["nvcc"]) == ("not found", "not found")
