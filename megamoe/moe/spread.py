"""A micro-batch whose rows are spread over ranks."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.parallel.axis import Axis
from megamoe.parallel.regions import gather_shared


class Spread(NamedTuple):
    """B sequences, of which rank r of P holds the positions r*s ... (r+1)*s - 1.

    What is chosen among the rows of a micro-batch must not depend on how they are spread. So the scores of all rows,
    which are far narrower than the rows, come together on every rank, and all decide the same.
    """

    axis: Axis
    batch: int
    """B."""
    length: int
    """s, equal on all ranks."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole micro-batch, B * s * P."""
        return self.batch * self.length * self.axis.size

    def whole(self, rows: Tensor) -> Tensor:
        """Values [B * s, ...] of this rank's rows to [B * s * P, ...] of all, in the order of sequences and positions.

        The gradient of a row is what this rank makes of it: all ranks are to do the same with the result.
        """
        return gather_shared(rows.unflatten(0, (self.batch, self.length)), self.axis, dim=1).flatten(0, 1)

    def own(self, device: torch.device) -> Tensor:
        """Places of this rank's rows among all, int64 [B * s]."""
        return _own(self.axis.size, self.axis.rank, self.batch, self.length, device)

    def every(self, stride: int, device: torch.device) -> Tensor:
        """Places among this rank's rows of those whose place among all is a multiple of `stride`, int64."""
        return _every(self.axis.size, self.axis.rank, self.batch, self.length, stride, device)


# Made on the host from shapes alone, and kept: a device never waits for them.
@functools.lru_cache(maxsize=64)
def _own(size: int, rank: int, batch: int, length: int, device: torch.device) -> Tensor:
    first_B1 = (torch.arange(batch) * size + rank)[:, None] * length
    return (first_B1 + torch.arange(length)).flatten().to(device)


@functools.lru_cache(maxsize=64)
def _every(size: int, rank: int, batch: int, length: int, stride: int, device: torch.device) -> Tensor:
    own_T = _own(size, rank, batch, length, torch.device("cpu"))
    return (own_T % stride == 0).nonzero().squeeze(-1).to(device)
