"""What torch has to know of the ops beside their kernels: shapes without data, and gradients. One file per family."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec


def register(families: Iterable[str]) -> None:
    """Register shapes and gradients of the families that were built; importing a family's file does it."""
    for family in families:
        if find_spec(f"megamoe_kernels._{family}") is not None:
            import_module(f"megamoe_kernels._{family}")
