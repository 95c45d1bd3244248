"""Sizes that are measured. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.bench.model import Shape

ROUTINGS = ("natural", "balanced")


@dataclass(frozen=True)
class Case:
    """A size with its name."""

    name: str
    shape: Shape


CASES = (
    Case("K2", Shape(32768, 4096, 2048, 64, 2)),
    Case("K8", Shape(32768, 4096, 2048, 64, 8)),
    Case("E256", Shape(16384, 7168, 2048, 256, 8)),
)
SMOKE_CASES = (Case("smoke", Shape(64, 64, 32, 8, 2)), Case("smoke K8", Shape(33, 72, 40, 16, 8)))
LAYER = CASES[0]
SMOKE_LAYER = SMOKE_CASES[0]
