"""The memory through which the ranks of a group push and pull rows: who may write when, and who is waited for."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.common.errors import LostPeerError
from megamoe.common.log import get_logger
from megamoe.ops import push
from megamoe.parallel.collectives import gather_objects
from megamoe.parallel.exchanges import RECORD, Exchange, place_text
from megamoe.parallel.groups import ProcessGroup
from megamoe.parallel.link import Link
from megamoe.parallel.symmetric import SymmetricMemory, share, time_limit

log = get_logger(__name__)

REMEMBERED = 4096
"""Exchanges whose block and phase are kept, for the report of one that failed on a GPU some time ago."""


class Size(NamedTuple):
    """What a window is made for."""

    num_local: int
    capacity: int
    row_bytes: int

    def holds(self, other: Size) -> bool:
        return self.capacity >= other.capacity and self.row_bytes >= other.row_bytes

    def with_room_for(self, other: Size) -> Size:
        """Grows by an eighth at least: bounds follow training in small steps, and every new window is a stop."""
        capacity = self.capacity
        if other.capacity > capacity:
            capacity = max(other.capacity, capacity + capacity // 8)
        tiles = -(-capacity // push.TILE)
        return Size(self.num_local, tiles * push.TILE, max(self.row_bytes, -(-other.row_bytes // 16) * 16))


class Way(NamedTuple):
    """One routing of this rank's tokens over a group, known to all its ranks: what both exchanges of a layer, and those
    of the backward pass, go by. Indices are int32."""

    window: Window
    link: Link
    number: int
    """Of the exchange that has brought the counts, and brings the rows."""
    counts_PE: Tensor
    first_PE: Tensor
    start_E: Tensor
    source_A: Tensor
    """The choice of each assignment, by expert."""
    place_TK: Tensor
    """owner * stride + row there; -1: none."""
    stride: int
    num_rows: int
    """R: of what arrives here, with rows that are nobody's behind the others."""
    num_choices: int
    moved: tuple[int, int]
    """Rows to other ranks, and from them; at most, where only the device knows."""


class Window:
    """Memory of a group for one-sided exchanges, all of which are numbered, and happen in the same order on every rank.

    There are two buffers, and a rank begins exchange n when all have read those of n - 2. It is made when the first
    rows are to travel, and again when a capacity needs more: what is under way then goes on in the new one, and in the
    old one where there is no new one. Every wait ends after `limit` seconds.

    Attributes:
        reason: why it could not be made, or not larger, the same on all ranks; empty: it could, or nobody has tried.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, limit: float | None = None) -> None:
        self.group, self.device = group, device
        self.limit = time_limit(group, device) if limit is None else limit
        self.num_ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.reason = ""
        self._size: Size | None = None
        self._memory: SymmetricMemory | None = None
        self._number = 0
        self._known: deque[tuple[int, str]] = deque(maxlen=REMEMBERED)
        self._report = torch.zeros(push.REPORT, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._told = self._report.numpy()  # read without asking torch, which would count as a wait

    @property
    def rows(self) -> int:
        """That each rank's memory has in a buffer."""
        assert self._size is not None
        return self.num_ranks * self._size.num_local * self._size.capacity

    def fit(self, size: Size, unusable: str) -> str:
        """Make it large enough. Collective where it is not: all ranks come here with the same size.

        Args:
            unusable: why this rank cannot use any.

        Returns:
            Why it is too small, which is told once and never tried again; empty: it is large enough.

        Raises:
            ValueError: the ranks do not agree about the size.
        """
        if self._size is not None and self._size.holds(size):
            return ""
        if not self.reason:
            self.reason = self._make(size, unusable)
            if self.reason:
                what = "rows" if self._size is None else "rows of layers with more of them than before"
                log.warning("%s are not pushed but travel by all-to-all: %s", what, self.reason)
        return self.reason

    def _make(self, size: Size, unusable: str) -> str:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # nobody reads or writes the old one any more
        told = gather_objects((tuple(size), unusable), self.group)
        if reason := next((reason for _, reason in told if reason), ""):
            return reason
        if len({found for found, _ in told}) > 1:
            raise ValueError(f"rows are pushed to places of the same size on every rank; over ranks: {told}")
        if self.num_ranks > push.MAX_RANKS:
            return f"the group has {self.num_ranks} ranks, {push.MAX_RANKS} are possible"
        whole = (self._size or Size(size.num_local, 0, 0)).with_room_for(size)
        about = self.rank, *whole
        num_bytes = torch.ops.megamoe.window_bytes(push.box(*about, [0] * self.num_ranks))
        memory = share(self.group, num_bytes, self.device)
        if isinstance(memory, str):
            return memory
        flags = push.num_flags(self.num_ranks, whole.num_local, whole.capacity)
        self._seen = torch.zeros(2, flags, dtype=torch.int32, device=self.device)
        # The old memory goes only now: without a new one, the exchanges of outstanding ways would have none.
        self._memory, self._box = memory, push.box(*about, memory.addresses)
        self._size, self._number = whole, 0
        return ""

    # The exchanges

    def send_counts(self, counts_E: Tensor, link: Link) -> tuple[int, Tensor]:
        """Begin an exchange with the numbers of rows: its own number, and the counts of all ranks, int32 [P, E]."""
        number = self._begin(link, "dispatch")
        about = self._about(number)
        with self._recorded(link, "counts", counts_E.numel() * 4 * (self.num_ranks - 1)):
            torch.ops.megamoe.exchange_counts(counts_E.contiguous(), *about)
            counts_PE = torch.ops.megamoe.wait_counts(counts_E, *about)
            self._check()
        return number, counts_PE

    def push(
        self, rows_TD: Tensor, values_TK: Tensor | None, way: Way, phase: str, number: int = 0
    ) -> tuple[Tensor, ...]:
        """Rows to their places at the owners, and a value with each if there are any: [R, D] and [R] as they arrived.

        Args:
            number: of an exchange that has begun.
        """
        about = self._about(number or self._begin(way.link, phase))
        values = None if values_TK is None else values_TK.flatten()
        num_bytes = [rows * self._row_bytes(rows_TD, values) for rows in way.moved]
        tables = way.counts_PE, way.first_PE
        with self._recorded(way.link, phase, *num_bytes):
            torch.ops.megamoe.dispatch_push(
                rows_TD, values, way.source_A, way.start_E, *tables, way.num_choices, *about
            )
            arrived: tuple[Tensor, ...] = torch.ops.megamoe.wait_flags(
                rows_TD, values is not None, way.num_rows, *tables, self._seen, *about
            )
            self._check()
        return arrived

    def pull(self, rows_RD: Tensor, values_R: Tensor | None, way: Way, phase: str) -> tuple[Tensor, ...]:
        """The sum of each token's rows at the owners, [T, D], and the value of each choice, [T, K], 0 where it has no
        row."""
        about = self._about(self._begin(way.link, phase))
        num_bytes = [rows * self._row_bytes(rows_RD, values_R) for rows in reversed(way.moved)]
        tables, place_TK = (way.counts_PE, way.first_PE), way.place_TK
        if way.stride != self.rows:  # the window has grown since
            grown_TK = place_TK // way.stride * self.rows + place_TK % way.stride
            place_TK = torch.where(place_TK < 0, place_TK, grown_TK)
        with self._recorded(way.link, phase, *num_bytes):
            torch.ops.megamoe.publish_rows(rows_RD, values_R, *tables, *about)
            home: tuple[Tensor, ...] = torch.ops.megamoe.combine_pull(
                rows_RD, values_R is not None, place_TK, *tables, self._seen, *about
            )
            self._check()
        return home

    def _begin(self, link: Link, phase: str) -> int:
        self._check()
        self._number += 1
        self._known.append((self._number, place_text(link.layer, phase, link.axis, self._ranks())))
        return self._number

    def _about(self, number: int) -> tuple[Any, ...]:
        return self._box, number, self.limit, self._report

    def _row_bytes(self, rows: Tensor, values: Tensor | None) -> int:
        return rows.shape[1] * rows.element_size() + (0 if values is None else values.element_size())

    def _recorded(self, link: Link, phase: str, sent: int, received: int | None = None) -> Exchange:
        exchange = RECORD.begin(
            (link.layer, link.axis, self._ranks()), phase, (sent, sent if received is None else received), self._on_gpu
        )
        exchange.launch()
        return exchange

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _ranks(self) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(self.group))

    # When somebody does not answer

    def _check(self) -> None:
        """Raise what a wait that ended at its limit has reported: on a CPU at once; on a GPU in the first exchange that
        begins after the device has come to it, and its rows are NaN until then.

        Raises:
            LostPeerError: names the rank, the block and the phase.
        """
        if not self._told[0]:
            return
        _, awaited, peer, expert, _, number, counted, wanted = (int(value) for value in self._told)
        rank, missing = dist.get_global_rank(self.group, peer), (wanted - counted) % 2**32
        where = next((text for known, text in reversed(self._known) if known == number), f"exchange {number}")
        what = {
            "counts": "its numbers of rows",
            "rows": f"its rows for expert {expert} ({missing} missing)",
            "results": f"its results of expert {expert} ({missing} missing)",
            "done": f"the word that it has read the rows of exchange {number - 2}",
        }[push.AWAITED[awaited]]
        raise LostPeerError(
            f"Rank {rank} did not answer: {where}.",
            got=f"nothing for {self.limit:g} s in the place of {what}",
            expected="every rank to get on within training.timeout_minutes",
            todo=f"look at the machine and the first error of rank {rank} (memory, network, disk); then start again: "
            "the run resumes from its newest complete checkpoint",
        )


_shared: dict[tuple[ProcessGroup, torch.device, torch.dtype, int], Window] = {}


def shared_window(group: ProcessGroup, rows: Tensor, num_local: int) -> Window:
    """The window of all layers that exchange such rows over a group, with L experts on a rank: they use it in turn.

    Those of groups that have been destroyed are let go when the next one is made.
    """
    key = group, rows.device, rows.dtype, num_local
    if key not in _shared:
        for gone in [other for other in _shared if _is_destroyed(other[0])]:
            del _shared[gone]
        _shared[key] = Window(group, rows.device)
    return _shared[key]


def _is_destroyed(group: ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        return True
    return False
