"""Shapes of the one-sided exchange's ops. They write memory of other ranks and have no gradients: who exchanges rows in
training defines both directions, as each is the other's backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

_HEAD = 4
"""Numbers of a box before the addresses."""


@torch.library.register_fake("megamoe::wait_counts")
def _wait_counts(counts: Tensor, box: Tensor, exchange: int, limit: float, report: Tensor) -> Tensor:
    return counts.new_empty(box.shape[0] - _HEAD, counts.shape[0], dtype=torch.int32)


def _beside(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


@torch.library.register_fake("megamoe::wait_flags")
def _wait_flags(
    like: Tensor,
    values: bool,
    rows: int,
    counts: Tensor,
    first: Tensor,
    seen: Tensor,
    box: Tensor,
    exchange: int,
    limit: float,
    report: Tensor,
    blocks: int = 0,
) -> tuple[Tensor, Tensor]:
    return like.new_empty(rows, like.shape[1]), like.new_empty(rows if values else 0, dtype=_beside(like))


@torch.library.register_fake("megamoe::combine_pull")
def _combine_pull(
    like: Tensor,
    values: bool,
    place: Tensor,
    counts: Tensor,
    first: Tensor,
    seen: Tensor,
    box: Tensor,
    exchange: int,
    limit: float,
    report: Tensor,
    blocks: int = 0,
) -> tuple[Tensor, Tensor]:
    tokens, choices = place.shape
    return like.new_empty(tokens, like.shape[1]), like.new_empty(tokens if values else 0, choices, dtype=_beside(like))
