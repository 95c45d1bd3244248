"""The compiled ops for the tests of `kernels/`: as installed, else built once for all workers; loaded into torch."""

import fcntl
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def tool(name: str) -> ModuleType:
    """build, steps or toolchain of `kernels/`, which are no package."""
    sys.path.insert(0, str(KERNELS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(KERNELS))


@pytest.fixture(scope="session")
def build_tool() -> ModuleType:
    return tool("build")


@pytest.fixture(scope="session")
def cxx() -> str:
    """The C++ compiler; a test that needs one is skipped where there is none."""
    found = tool("toolchain").find_cxx()
    if isinstance(found, str):
        pytest.skip(found)
    return " ".join(found.command)


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The compiler for CUDA; a test that needs it is skipped where there is none."""
    found = tool("toolchain").find_nvcc()
    if isinstance(found, str):
        pytest.skip(found)
    return " ".join(found.command)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory, build_tool: ModuleType) -> ModuleType:
    """The package `megamoe_kernels`, loaded: of MEGAMOE_KERNELS_LIB, else the installed one, else built here."""
    if not os.environ.get("MEGAMOE_KERNELS_LIB"):
        installed = find_spec("megamoe_kernels")
        if installed is None or Path(str(installed.origin)).is_relative_to(KERNELS):
            os.environ["MEGAMOE_KERNELS_LIB"] = str(built_here(tmp_path_factory.mktemp("kernels"), build_tool))
    if find_spec("megamoe_kernels") is None:
        sys.path.insert(0, str(KERNELS))
    package = importlib.import_module("megamoe_kernels")
    now = build_tool.digest()
    if not os.environ.get("MEGAMOE_KERNELS_LIB") and package.what()["sources"] != now:
        pytest.fail("the installed megamoe-kernels is not built from these sources: bash launch/setup.sh")
    package.load()
    forget_what_was_missing()
    return package


def built_here(folder: Path, build_tool: ModuleType) -> Path:
    """Only one worker compiles at a time; those that wait find every object made."""
    build_tool.OBJECTS.mkdir(parents=True, exist_ok=True)
    targets = ("cpu", "cuda") if torch.version.cuda else ("cpu",)
    with (build_tool.OBJECTS / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = build_tool.build(folder, targets=targets)
    if "cpu" not in record["built"]:
        reason = record["left_out"]["cpu"]
        pytest.fail(reason) if "\n" in reason else pytest.skip(reason)
    return folder


def forget_what_was_missing() -> None:
    """Tests of other rooms in this process may have asked for the ops before they were here."""
    from megamoe.ops import kernels

    kernels.problem.cache_clear()
    kernels.unavailable.cache_clear()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, kernels: ModuleType) -> torch.device:
    """Every device the ops are tested on, with the ops loaded; cuda under the marker gpu."""
    device = torch.device(request.param)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU that this torch can use")
        missing = kernels.what()["left_out"].get("cuda") or kernels.what()["not_loaded"].get("cuda")
        if missing:
            pytest.fail(f"a GPU is here, and the ops for CUDA are not: {missing}")
    return device
