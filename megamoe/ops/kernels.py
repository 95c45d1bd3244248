"""The compiled ops of the optional distribution `megamoe-kernels`: whether they can run, and if not, why.

The only place that imports it. Without it everything works on the plain implementations.
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

SERIES = "0.1"
"""The versions whose ops have the signatures that this code calls: 0.1 and 0.1.x."""
INSTALL = "pip install ./kernels, in the folder of megamoe"
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
WITHOUT_DTYPE = ("plan",)
"""Ops of integers: any dtype of the rows goes with them."""


@functools.cache
def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the compiled op cannot run there; empty: it can, and ``torch.ops.megamoe`` has it.

    Args:
        op: its name, such as ``permute_rows``.
        dtype: of the rows.
    """
    if reason := problem():
        return reason
    if device.type not in DTYPES:
        return f"megamoe-kernels has no ops for {device.type}"
    if dtype not in DTYPES[device.type] and op not in WITHOUT_DTYPE:
        return f"megamoe-kernels does not compute in {_name(dtype)} on {device.type}"
    if not hasattr(torch.ops.megamoe, op):
        return f"megamoe-kernels was built without {op}; {INSTALL}"
    return _not_on_cuda(op, device) if device.type == "cuda" else ""


def _not_on_cuda(op: str, device: torch.device) -> str:
    package = import_module("megamoe_kernels")
    if reason := without_cuda():
        return f"megamoe-kernels is here without CUDA: {reason}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"megamoe::{op}", "CUDA"):
        return f"megamoe-kernels was built without {op} for CUDA; {INSTALL}"
    if torch.cuda.is_available() and not package.runs_on(*torch.cuda.get_device_capability(device)):
        built = " ".join(package.what()["built"]["cuda"]["architectures"])
        number = "".join(map(str, torch.cuda.get_device_capability(device)))
        again = f"MEGAMOE_KERNELS_CUDA_ARCHS={number} {INSTALL}"
        return f"megamoe-kernels is built for GPUs {built}, this is {number}; {again}"
    return ""


@functools.cache
def problem() -> str:
    """Why the package cannot be used at all; empty: it is loaded. The first call loads it."""
    if find_spec("megamoe_kernels") is None:
        return f"megamoe-kernels is not installed; {INSTALL}"
    package = import_module("megamoe_kernels")
    if package.__version__ != SERIES and not package.__version__.startswith(f"{SERIES}."):
        return f"megamoe-kernels {package.__version__} is installed, {SERIES} is needed; {INSTALL}"
    try:
        package.load()
    except package.KernelsUnavailable as error:
        return " ".join(str(error).split())
    return ""


def without_cuda() -> str:
    """Why the loaded package has no ops for CUDA, in one line; empty: it has."""
    found = import_module("megamoe_kernels").what()
    reason = found["left_out"].get("cuda") or found["not_loaded"].get("cuda", "")
    return str(reason).partition("\n")[0]


def state() -> dict[str, Any]:
    """For a report: its version, its folder, and either what ``megamoe_kernels.what`` says of the build or the problem.

    Empty: it is not installed.
    """
    if find_spec("megamoe_kernels") is None:
        return {}
    reason = problem()
    package = import_module("megamoe_kernels")
    found = {"version": package.__version__, "folder": str(package.folder())}
    return found | ({"problem": reason} if reason else package.what())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
