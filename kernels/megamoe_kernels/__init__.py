"""Compiled ops for megamoe, as ``torch.ops.megamoe.*``: for the CPU, and for CUDA where they were built for it.

``load()`` makes them known to torch, ``what()`` says what there is. ``kernels/build.py`` compiles, nothing here does.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
_lock = threading.Lock()
_loaded: dict[str, Any] | None = None


class KernelsUnavailable(RuntimeError):
    """The compiled ops cannot be loaded here; the text says why and what to do."""


def folder() -> Path:
    """Where the libraries are: ``MEGAMOE_KERNELS_LIB``, else inside the package."""
    return Path(os.environ.get("MEGAMOE_KERNELS_LIB") or _PACKAGE / "lib")


def what() -> dict[str, Any]:
    """What was built, with which compiler, flags and torch ("built", by target), and what was not and why ("left_out").

    After :func:`load` also "not_loaded": of what was built, what is not in use here, and why.

    Raises:
        KernelsUnavailable: nothing was built, or its record cannot be read.
    """
    return _loaded if _loaded is not None else _record()


def runs_on(major: int, minor: int) -> bool:
    """Whether the library for CUDA has code for GPUs of this compute capability, or PTX of an older one."""
    return any(_covers(one, 10 * major + minor) for one in what()["built"].get("cuda", {}).get("architectures", ()))


def _covers(architecture: str, capability: int) -> bool:
    number, _, ptx = architecture.partition("+")
    if not number.isdigit():  # 90a: this one only
        return int(number[:-1]) == capability
    return int(number) <= capability and (bool(ptx) or int(number) // 10 == capability // 10)


def _record() -> dict[str, Any]:
    record = folder() / "build.json"
    try:
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = f"cannot be read ({error})" if record.exists() else "is not there"
        raise KernelsUnavailable(
            f"megamoe-kernels is here without its compiled libraries: {record} {why}.\n"
            "  to do: pip install ./kernels, in the folder of megamoe; or python kernels/build.py --out DIR, and set "
            "MEGAMOE_KERNELS_LIB to DIR"
        ) from None
    return found


def load() -> None:
    """Load the libraries into torch, once for the process.

    Raises:
        KernelsUnavailable: there are none, or they do not fit this machine or this torch.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load(_record())


def _load(record: dict[str, Any]) -> dict[str, Any]:
    import torch

    from megamoe_kernels import ops

    if "cpu" not in record["built"]:
        raise KernelsUnavailable(f"megamoe-kernels was built without its CPU part: {record['left_out'].get('cpu')}")
    _check_machine(record)
    try:
        torch.ops.load_library(folder() / record["built"]["cpu"]["library"])
    except (OSError, RuntimeError) as error:
        raise KernelsUnavailable(
            f"megamoe-kernels was built with torch {record['torch']} and does not load into torch {torch.__version__}: "
            f"{error}\n  to do: build it again in this environment"
        ) from error
    reason = _load_cuda(record)
    ops.register(record["built"]["cpu"]["families"])
    return record | {"not_loaded": {"cuda": reason} if reason else {}}


def _load_cuda(record: dict[str, Any]) -> str:
    """Load the library for CUDA if there is one; returns why that cannot be done."""
    import torch

    if "cuda" not in record["built"]:
        return ""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    try:
        torch.ops.load_library(folder() / record["built"]["cuda"]["library"])
    except (OSError, RuntimeError) as error:
        return f"its library does not load: {error}"
    return ""


def _check_machine(record: dict[str, Any]) -> None:
    """A library for processors that this one is not would end the process with an illegal instruction."""
    flags = str(record["built"]["cpu"]["flags"])
    cpuinfo = Path("/proc/cpuinfo")
    if "-march=x86-64-v3" not in flags or not cpuinfo.exists():
        return
    words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    missing = {"avx2", "fma", "f16c", "bmi2"} - words
    if missing:
        raise KernelsUnavailable(
            f"megamoe-kernels is for x86-64 processors with AVX2, and this one has no {', '.join(sorted(missing))}.\n"
            "  to do: nothing, megamoe runs without it; on processors since about 2015 it can be used"
        )
