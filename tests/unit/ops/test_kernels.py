"""Whether the compiled ops can be used, and what a user reads where they cannot. That they can: tests/kernels."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megamoe.ops import kernels
from megamoe.ops.all import OPS

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "kernels" / "megamoe_kernels"
CPU = torch.device("cpu")
ASK = "from megamoe.ops import kernels; print(kernels.problem()); print(kernels.state())"


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in an environment without megamoe-kernels."""
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    forget()
    yield
    forget()


def forget() -> None:
    kernels.problem.cache_clear()
    kernels.unavailable.cache_clear()


def ask(package: Path, libraries: Path) -> list[str]:
    """What another process says: the problem, and the state."""
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "MEGAMOE_KERNELS_LIB": str(libraries)}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.usefixtures("absent")
def test_without_the_package_the_reason_says_how_to_get_it() -> None:
    for op in ("plan", "permute_rows", "no_such_op"):
        for device in (CPU, torch.device("cuda")):
            reason = kernels.unavailable(op, device, torch.float32)
            assert reason == "megamoe-kernels is not installed; pip install ./kernels, in the folder of megamoe"
    assert kernels.state() == {}


@pytest.mark.usefixtures("absent")
def test_without_the_package_every_op_has_an_implementation() -> None:
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for device in (CPU, torch.device("cuda")):
                assert op.choose("auto", device, dtype).name != "kernels"


def test_a_package_without_libraries(tmp_path: Path) -> None:
    problem, state = ask(PACKAGE, tmp_path)
    assert f"without its compiled libraries: {tmp_path / 'build.json'} is not there" in problem
    assert "pip install ./kernels" in problem
    assert problem in state


@pytest.mark.parametrize("record", ["", "{"])
def test_a_record_that_cannot_be_read(tmp_path: Path, record: str) -> None:
    (tmp_path / "build.json").write_text(record)
    problem, _ = ask(PACKAGE, tmp_path)
    assert "build.json cannot be read (Expecting" in problem


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    cpu = {"library": "libmegamoe_cpu.so", "flags": "-O3", "families": ["plan"]}
    record = {"torch": "2.11.0", "built": {"cpu": cpu}, "left_out": {}}
    (tmp_path / "build.json").write_text(json.dumps(record))
    (tmp_path / "libmegamoe_cpu.so").write_text("no library")
    problem, _ = ask(PACKAGE, tmp_path)
    assert f"was built with torch 2.11.0 and does not load into torch {torch.__version__}" in problem
    assert "build it again in this environment" in problem


def test_another_version_than_this_code_calls(tmp_path: Path) -> None:
    package = tmp_path / "megamoe_kernels"
    package.mkdir()
    text = (PACKAGE / "__init__.py").read_text()
    (package / "__init__.py").write_text(text.replace('__version__ = "0.1.', '__version__ = "0.10.'))
    problem, _ = ask(package, tmp_path)
    assert problem.startswith("megamoe-kernels 0.10.0 is installed, 0.1 is needed; pip install ./kernels")
