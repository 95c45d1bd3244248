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
    real: Tensor | None = None
    """int64: those of the B * s * P rows that are not padding, ascending; None: all. Only they are in what is called
    whole below."""

    @property
    def size(self) -> int:
        """Rows of the whole micro-batch with its padding, B * s * P."""
        return self.batch * self.length * self.axis.size

    @property
    def num_rows(self) -> int:
        """Rows of the whole micro-batch."""
        return self.size if self.real is None else len(self.real)

    def whole(self, rows: Tensor) -> Tensor:
        """Values [B * s, ...] of this rank's rows to [B * s * P, ...] of all, in the order of sequences and positions.

        The gradient of a row is what this rank makes of it: all ranks are to do the same with the result.
        """
        whole = gather_shared(rows.unflatten(0, (self.batch, self.length)), self.axis, dim=1).flatten(0, 1)
        return whole if self.real is None else whole[self.real]

    def sequences(self, documents: Tensor | None, device: torch.device) -> Tensor:
        """As `number_sequences`, of the whole micro-batch with its padding."""
        return number_sequences(self.size, self.length * self.axis.size, documents, device)

    def own(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Places of this rank's rows in the whole, int64, and which of its rows these are; None: all."""
        own_T = _own(self.axis.size, self.axis.rank, self.batch, self.length, device)
        if self.real is None:
            return own_T, None
        place = torch.full((self.size,), -1, device=device)
        place[self.real] = torch.arange(len(self.real), device=device)
        local = (place[own_T] >= 0).nonzero().squeeze(-1)
        return place[own_T[local]], local

    def every(self, stride: int, device: torch.device) -> Tensor:
        """Which of this rank's rows have a place in the whole that is a multiple of `stride`, int64."""
        if self.real is None:
            return _every(self.axis.size, self.axis.rank, self.batch, self.length, stride, device)
        place_T, local_T = self.own(device)
        assert local_T is not None
        return local_T[place_T % stride == 0]


def number_sequences(num_rows: int, length: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Number of each row's document in [0, T), int64 [T]; negative: padding.

    Args:
        num_rows: T.
        length: S, rows of a sequence.
        documents: int64 [..., S] as in :class:`megamoe.data.batch.Batch`; None: each sequence is one.
    """
    first_T = torch.arange(num_rows, device=device) // length * length
    if documents is None:
        return first_T
    documents_T = documents.reshape(-1)
    return torch.where(documents_T < 0, documents_T, first_T + documents_T)


# Made on the host from shapes alone, and kept: a device never waits for them.
@functools.lru_cache(maxsize=64)
def _own(size: int, rank: int, batch: int, length: int, device: torch.device) -> Tensor:
    first_B1 = (torch.arange(batch) * size + rank)[:, None] * length
    return (first_B1 + torch.arange(length)).flatten().to(device)


@functools.lru_cache(maxsize=64)
def _every(size: int, rank: int, batch: int, length: int, stride: int, device: torch.device) -> Tensor:
    own_T = _own(size, rank, batch, length, torch.device("cpu"))
    return (own_T % stride == 0).nonzero().squeeze(-1).to(device)
