"""Activation recomputation in which every decision of routing is made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from megamoe.moe.decisions import once


def recomputed(block: Callable[..., Any], *args: Any) -> Any:
    """`block(*args)`, of which only the inputs and the decisions are kept; the rest is computed again for the backward
    pass."""
    return checkpoint(block, *args, use_reentrant=False, context_fn=once)
