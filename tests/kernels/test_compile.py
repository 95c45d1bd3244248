"""The sources for CUDA, where nvcc is: they compile without spilling registers, and the library has every op."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
LOAD = """
import ctypes, sys, torch
from pathlib import Path
out = Path(sys.argv[1])
torch.ops.load_library(out / "libmegamoe_cpu.so")
if torch.version.cuda is None:
    ctypes.CDLL(out / "stub" / "libtorch_cuda.so", mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(out / "libmegamoe_cuda.so")
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("megamoe::"):
        keys = [key for key in ("CPU", "CUDA") if f"\\n{key}: registered" in torch._C._dispatch_dump(name)]
        print(name, *keys)
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kernels_compile")]


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, build_tool: ModuleType, cxx: str, nvcc: str
) -> tuple[Path, dict[str, Any]]:
    """Where both libraries are, and what build.json says of the one for CUDA."""
    out = tmp_path_factory.mktemp("cuda")
    environment = pytest.MonkeyPatch()
    environment.delenv("MEGAMOE_KERNELS_CUDA_ARCHS", raising=False)
    record = build_tool.build(out)
    environment.undo()
    assert record["left_out"] == {}, "\n".join(record["left_out"].values())
    return out, record["built"]["cuda"]


def test_every_family_compiles_for_every_architecture(built: tuple[Path, dict[str, Any]]) -> None:
    _, cuda = built
    assert cuda["families"] == sorted(file.stem for file in KERNELS.glob("csrc/cpu/*.cpp"))
    assert cuda["architectures"] == ["80", "90", "90+PTX"]
    built_for = [kernel["for"] for kernel in cuda["kernels"]]
    assert set(built_for) == {"sm_80", "sm_90"}
    assert built_for.count("sm_80") == built_for.count("sm_90")


def test_no_kernel_spills_registers_or_needs_a_stack(built: tuple[Path, dict[str, Any]]) -> None:
    _, cuda = built
    assert [k for k in cuda["kernels"] if k["spill_bytes"] or k["stack_bytes"] or k["registers"] == 0] == []


def test_the_library_registers_every_op(built: tuple[Path, dict[str, Any]]) -> None:
    """In torch for CPUs too: it is loaded with the stand-in of libtorch_cuda.so."""
    out, _ = built
    done = subprocess.run([sys.executable, "-c", LOAD, out], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    ops = {f"megamoe::{name}" for name in ("plan", "permute_rows", "glu_fwd", "router_fwd")}
    assert ops <= {one[0] for one in found}
    assert [one for one in found if one[1:] != ["CPU", "CUDA"]] == []


def test_without_cuda_in_torch_the_package_says_so(built: tuple[Path, dict[str, Any]]) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    code = "import megamoe_kernels as k; k.load(); print(*k.what()['built'], k.what()['not_loaded']['cuda'])"
    environment = {**os.environ, "MEGAMOE_KERNELS_LIB": str(built[0]), "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.strip() == f"cpu cuda this torch ({torch.__version__}) is built without CUDA", done.stderr
