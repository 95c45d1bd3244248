"""Broadcast rows beside a pass in chunks: they travel once, before the others, and every chunk's experts work on them.

As in :mod:`megamoe.moe.dispatch.broadcast`, and with its order of rows; the sums over the experts of a rank are formed
chunk by chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.moe.decisions import recomputing
from megamoe.moe.dispatch.broadcast import merge_by_expert
from megamoe.moe.types import BroadcastRows
from megamoe.ops.rows import gather_rows, sum_rows
from megamoe.parallel.link import Link, Transfer


class _Way:
    """One exchange of one pass and that of its gradients, each begun in one step and waited for in another.

    Args:
        late: whether a recomputed pass, which may end before, begins it only when it is waited for.
    """

    def __init__(self, link: Link, send: list[int], receive: list[int], phase: str, late: bool = False) -> None:
        self.link, self.send, self.receive, self.phase, self.late = link, send, receive, phase, late
        self.under_way: Transfer | None = None
        self.kept: Tensor | None = None

    def begin(self, rows: Tensor) -> Tensor:
        """Send rows; a ticket."""
        ticket: Tensor = _Begin.apply(rows, self)
        return ticket

    def end(self, ticket: Tensor) -> Tensor:
        """The rows that this rank gets instead."""
        rows: Tensor = _End.apply(ticket, self)
        return rows

    def start(self, rows: Tensor, back: bool = False) -> None:
        """Begin it, or that of the gradients."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        self.under_way = self.link.start(rows, send, receive, f"{self.phase} backward" if back else self.phase)

    def wait(self) -> Tensor:
        """What was started."""
        assert self.under_way is not None, "an exchange begins before it is waited for"
        under_way, self.under_way = self.under_way, None
        return under_way.wait()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        if way.late and recomputing():
            way.kept = rows
        else:
            way.start(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.way.wait(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        if way.kept is not None:
            way.start(way.kept)
            way.kept = None
        return way.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.way.start(grads[0], back=True)
        return grads[0].new_empty(0), None


class Merged(NamedTuple):
    """Rows of a chunk, assigned and broadcast ones, by expert."""

    rows_QD: Tensor
    weights_Q: Tensor
    rows_per_expert_L: Tensor
    source_Q: Tensor
    """int64 [Q]: the assigned row that each is a copy of, or R and the broadcast row."""
    num_assigned: int
    """R."""


class Guests:
    """The broadcast rows of one pass, from when they leave until they are home.

    Making one exchanges their numbers, and the host waits for these.
    """

    def __init__(self, rows_TD: Tensor, broadcast: BroadcastRows, link: Link) -> None:
        weights_UPL = broadcast.weights_UE.unflatten(1, (link.num_ranks, -1))
        wanted_PU = (weights_UPL != 0).any(-1).t()
        sent_P = wanted_PU.sum(1)
        received_P = link.exchange(sent_P, None, None, "counts")
        place = wanted_PU.nonzero()  # by rank, then by token
        self._token_ids_V, self._num_rows = broadcast.token_ids_U[place[:, 1]], len(rows_TD)
        send, receive = torch.stack([sent_P, received_P]).tolist()
        there, back = (sum(split) - split[link.rank] for split in (send, receive))
        weights_VL = weights_UPL[place[:, 1], place[:, 0]]
        row_bytes = rows_TD.shape[1] * rows_TD.element_size()
        weight_bytes = weights_VL.shape[1] * weights_VL.element_size()
        self.sent_bytes = (there + back) * row_bytes + there * weight_bytes + (link.num_ranks - 1) * 8
        self._rows, self._weights = (_Way(link, send, receive, "dispatch") for _ in range(2))
        self._back = _Way(link, receive, send, "combine", late=True)
        self._tickets = self._rows.begin(gather_rows(rows_TD, self._token_ids_V)), self._weights.begin(weights_VL)

    def arrive(self) -> None:
        """Wait for the rows that other ranks sent here."""
        rows_ticket, weights_ticket = self._tickets
        self._rows_GD, self._weights_GL = self._rows.end(rows_ticket), self._weights.end(weights_ticket)
        self._results_GD: Tensor | None = None

    def join(self, experts: slice, rows_RD: Tensor, weights_R: Tensor, rows_per_expert_L: Tensor) -> Merged:
        """With the assigned rows of these experts, those that take them."""
        weights_GL = self._weights_GL[:, experts]
        source_Q, weights_Q = merge_by_expert(rows_RD, rows_per_expert_L, weights_R, weights_GL)
        rows_QD = gather_rows(torch.cat([rows_RD, self._rows_GD]), source_Q)
        return Merged(rows_QD, weights_Q, rows_per_expert_L + (weights_GL != 0).sum(0), source_Q, len(rows_RD))

    def part(self, out_QD: Tensor, merged: Merged) -> Tensor:
        """Results of the assigned rows. Those of the broadcast rows stay, to be added up over chunks."""
        num_guests = len(self._rows_GD)
        sources = sum_rows(out_QD, merged.source_Q, merged.num_assigned + num_guests)
        assigned_RD, guests_GD = sources.split([merged.num_assigned, num_guests])
        self._results_GD = guests_GD if self._results_GD is None else self._results_GD + guests_GD
        return assigned_RD

    def send_home(self) -> None:
        """After the last chunk."""
        assert self._results_GD is not None
        self._ticket = self._back.begin(self._results_GD)

    def home(self) -> Tensor:
        """What all experts made of this rank's broadcast rows, added up: [T, D]."""
        return sum_rows(self._back.end(self._ticket), self._token_ids_V, self._num_rows)
