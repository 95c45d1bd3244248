"""RMSNorm: torch's fused one, or NVIDIA apex's where it is installed and asked for."""

from __future__ import annotations

import importlib

from torch import nn

from megamoe.common.errors import KernelUnavailable


def build_norm(implementation: str, size: int, eps: float) -> nn.Module:
    """RMSNorm over the last dim of that size.

    Raises:
        KernelUnavailable: apex is asked for and not installed.
    """
    if implementation == "apex":
        return _apex_norm(size, eps)
    return nn.RMSNorm(size, eps=eps)


def _apex_norm(size: int, eps: float) -> nn.Module:
    try:
        # The PyPI package called apex is something else; only NVIDIA's has this module.
        normalization = importlib.import_module("apex.normalization")
        return normalization.FusedRMSNorm(size, eps=eps)
    except ImportError as error:
        raise KernelUnavailable(
            "NVIDIA apex is not installed",
            got=f"model.norm: apex, and `import apex.normalization` says: {error}",
            expected="apex built from NVIDIA's source (the package called apex on PyPI is something else)",
            todo="set model.norm: torch, or build https://github.com/NVIDIA/apex",
        ) from error
