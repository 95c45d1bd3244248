"""Numbers about the values of a stored tensor, read in parts, so that it may be larger than the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.training.checkpoint.boxes import Box, boxes_of_range
from megamoe.training.checkpoint.reader import Reader

_PART = 4 * 2**20
"""Elements in memory at a time."""


@dataclass(frozen=True)
class Statistics:
    """Of all values, in fp64; without elements, NaN where there is nothing to say."""

    least: float
    largest: float
    mean: float
    norm: float
    """Euclidean."""
    num_nonfinite: int


def parts(reader: Reader, tensor: str, num_elements: int = _PART) -> Iterator[tuple[Box, Tensor]]:
    """A tensor piece by piece, and these in boxes of at most `num_elements`, each with its values."""
    for stored in reader.index.tensors[tensor].pieces:
        for start in range(0, stored.box.volume, num_elements):
            end = min(start + num_elements, stored.box.volume)
            for inner, _ in boxes_of_range(stored.box.shape, start, end):
                box = inner.shifted(stored.box.offsets)
                yield box, reader.read(tensor, box)


def statistics(reader: Reader, tensor: str) -> Statistics:
    """Read a tensor and describe it.

    Raises:
        CheckpointError: it cannot be read.
    """
    least, largest, total, squares = [], [], 0.0, 0.0
    count = num_nonfinite = 0
    for _, values in parts(reader, tensor):
        wide = values.double()
        least.append(wide.min())
        largest.append(wide.max())
        total += wide.sum().item()
        squares += wide.square().sum().item()
        num_nonfinite += nonfinite(values)
        count += values.numel()
    if count == 0:
        return Statistics(math.nan, math.nan, math.nan, 0.0, 0)
    # torch's own extremes: NaN where any value is.
    bounds = torch.stack(least).min().item(), torch.stack(largest).max().item()
    return Statistics(*bounds, total / count, math.sqrt(squares), num_nonfinite)


def nonfinite(values: Tensor) -> int:
    """How many values are NaN or infinite."""
    # Neither leaves a sum finite, and a sum is ten times as fast as a look at each.
    if not values.is_floating_point() or values.sum().isfinite():
        return 0
    return values.numel() - int(values.isfinite().sum())
