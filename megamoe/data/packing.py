"""Which conversations share a row of S tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megamoe.common.determinism import stream_seed
from megamoe.data.shuffle import permute

Ints = npt.NDArray[np.int64]

OPEN_ROWS = 64
"""Rows that are filled at the same time: more fill better and take longer (ours: past 64 little is gained)."""


class Rows(NamedTuple):
    """R rows with M members, the conversations that stand in them.

    Attributes:
        members: int64 [M], numbers of conversations, row by row in the order in which they stand there.
        ends: int64 [R], where each row's members end.
    """

    members: Ints
    ends: Ints

    def of(self, row: int) -> Ints:
        """The members of one row."""
        return self.members[self.ends[row - 1] if row else 0 : self.ends[row]]

    @property
    def firsts(self) -> Ints:
        """Where each row's members begin, int64 [R]."""
        return np.concatenate([np.zeros(min(1, len(self.ends)), dtype=np.int64), self.ends[:-1]])


def arrange(items: Ints, lengths: Ints, seq_length: int, seed: int, *, packing: bool) -> Rows:
    """Put every item into a row, in an order shuffled by `seed`; the same arguments give the same rows.

    Args:
        items: [M], numbers of conversations; one that occurs twice is put into rows twice.
        lengths: [M], input tokens of each item, 1 to S.
        seq_length: S.
        seed: of the run.
        packing: false gives every item its own row.

    Raises:
        ValueError: an item is longer than a row.
    """
    if lengths.size and not 0 < lengths.min() <= lengths.max() <= seq_length:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} in rows of {seq_length}")
    order = permute(np.arange(len(items)), len(items), stream_seed(seed, "sft", "packing"))
    row_of = first_fit(lengths[order], seq_length) if packing else np.arange(len(items))
    by_row = np.argsort(row_of, kind="stable")
    return Rows(items[order][by_row], np.cumsum(np.bincount(row_of)).astype(np.int64))


def first_fit(lengths: Ints, capacity: int, open_rows: int = OPEN_ROWS) -> Ints:
    """The row of each item, int64 [M]; rows are numbered in the order in which they are opened.

    An item goes into the first open row with room for it. Where none has room, a new row is opened; if `open_rows` are
    open already, it takes the place of the fullest, which is closed. Time grows with M times `open_rows`.
    """
    room = np.full(open_rows, -1, dtype=np.int64)  # a place without a row is taken before the fullest row's
    row_at = [0] * open_rows
    row_of, rows = [], 0
    for length in lengths.tolist():
        place = int((room >= length).argmax())
        if room[place] < length:
            place = int(room.argmin())
            room[place], row_at[place] = capacity, rows
            rows += 1
        room[place] -= length
        row_of.append(row_at[place])
    return np.asarray(row_of, dtype=np.int64)
