"""`pip install ./kernels`: compiles what this machine can, into a wheel for any Python 3 and one platform.

- MEGAMOE_KERNELS_CUDA=0: leave CUDA out even where nvcc is.
- MEGAMOE_KERNELS_REQUIRE=1: leaving anything out is an error.
- MEGAMOE_KERNELS_CUDA_ARCHS, CXX, CUDACXX: see build.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import PlatformError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # a build through pyproject.toml does not have it

from build import build, summary  # noqa: E402
from toolchain import BuildError  # noqa: E402


def compile_into(folder: Path) -> None:
    """Build the libraries into `folder`, which is made anew.

    Raises:
        PlatformError: no torch, no library for the CPU (it defines the ops), or something that is required is left out.
    """
    shutil.rmtree(folder, ignore_errors=True)
    targets = ("cpu",) if os.environ.get("MEGAMOE_KERNELS_CUDA") == "0" else ("cpu", "cuda")
    try:
        record = build(folder, targets=targets)
    except BuildError as error:
        raise PlatformError(f"megamoe-kernels cannot be built.\n{error}") from None
    print(summary(record))
    required = os.environ.get("MEGAMOE_KERNELS_REQUIRE") == "1"
    missing = [target for target in targets if target in record["left_out"]]
    if missing and (required or "cpu" in missing):
        why = "MEGAMOE_KERNELS_REQUIRE=1 asks for everything" if required else "nothing runs without the CPU's library"
        raise PlatformError(f"megamoe-kernels cannot be built: {why}.\n{summary(record, missing)}")
    shutil.rmtree(folder / "stub", ignore_errors=True)  # only the linker needed it


class BuildWithLibraries(build_py):
    """The package's files, and the libraries beside them."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # of an earlier build, with files that are no more
        super().run()
        root = HERE if self.editable_mode else Path(self.build_lib)
        compile_into(root.resolve() / "megamoe_kernels" / "lib")


class PlatformWheel(bdist_wheel):
    """The libraries use no API of Python: one wheel for all its versions."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibraries(Distribution):
    def has_ext_modules(self) -> bool:
        """Makes it a wheel of one platform."""
        return True


setup(distclass=WithLibraries, cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel})
