"""What a build uses: the torch of the environment, a C++ compiler, nvcc. Standard library only; nothing is imported."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 0)  # the first with C++20
ARCHITECTURES = "80 90 90+PTX"


class BuildError(Exception):
    """What a person can act on; shown without a traceback."""


@dataclass(frozen=True)
class Torch:
    """The torch whose headers are used: its folder and its version."""

    folder: Path
    version: str

    @property
    def link(self) -> list[str]:
        return [f"-L{self.folder / 'lib'}", "-ltorch_cpu", "-lc10"]


def find_torch() -> Torch:
    """Of this interpreter, else of its environment seen without pip's isolation (which only changes PYTHONPATH).

    Raises:
        BuildError: there is none, or it is too old.
    """
    spec = find_spec("torch")
    origin = spec.origin if spec else _origin_outside_isolation()
    if not origin:
        raise BuildError(
            f"torch was not found: {sys.executable} has none.\n"
            f"  to do: install torch {'.'.join(map(str, OLDEST_TORCH))} or later into this environment first; an "
            "installer that builds in an environment of its own (uv, build) needs --no-build-isolation, and setuptools"
        )
    folder = Path(origin).parent
    version = str(runpy.run_path(str(folder / "version.py"))["__version__"])
    if _numbers(version) < OLDEST_TORCH:
        raise BuildError(f"torch {version} is too old.\n  expected: {'.'.join(map(str, OLDEST_TORCH))} or later")
    return Torch(folder, version)


def _origin_outside_isolation() -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    code = "from importlib.util import find_spec; spec = find_spec('torch'); print(spec.origin if spec else '')"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=clean, capture_output=True, text=True)
    return done.stdout.strip()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@dataclass(frozen=True)
class Compiler:
    """An executable and what its --version says."""

    command: tuple[str, ...]
    version: str


def find_cxx() -> Compiler | str:
    """The C++ compiler, or why there is none."""
    return _compiler("CXX", ["g++", "c++", "clang++"], "no C++ compiler was found (g++, c++, clang++, or CXX)")


def find_nvcc() -> Compiler | str:
    """nvcc, or why there is none that can be used."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] * bool(home) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = _compiler("CUDACXX", candidates, "no nvcc was found (of CUDA_HOME or of the PATH, or CUDACXX)")
    if isinstance(found, str):
        return found
    release = re.search(r"release ([\d.]+)", found.version)
    if not release or _numbers(release[1]) < OLDEST_NVCC:
        return f"{found.command[0]} is too old for C++20 ({found.version}); CUDA 12.0 or later is needed"
    return found


def _compiler(variable: str, candidates: Sequence[str], missing: str) -> Compiler | str:
    named = os.environ.get(variable)
    for candidate in [named] if named else candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            done = subprocess.run([*command, "--version"], capture_output=True, text=True)
            if done.returncode == 0:
                lines = done.stdout.strip().splitlines()
                return Compiler(tuple(command), next((line for line in lines if "release" in line), lines[0]))
    return f"{variable}={named} is no compiler that runs" if named else missing


def architectures(wanted: str) -> list[str]:
    """What a list like "80 90 90+PTX" names, the default where it is empty.

    Raises:
        BuildError: it is no such list.
    """
    items = wanted.replace(",", " ").replace(";", " ").split() or ARCHITECTURES.split()
    for item in items:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", item):
            raise BuildError(f"MEGAMOE_KERNELS_CUDA_ARCHS has {item!r}.\n  expected: a list such as {ARCHITECTURES}")
    return items


def gencode(architecture: str) -> str:
    """nvcc's option: machine code for 90, and for 90+PTX what a later GPU's driver translates."""
    number, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
    return f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}"
