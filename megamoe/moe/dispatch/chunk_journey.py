"""The way of rows to their experts' ranks and home again in several parts, one for each chunk of a rank's experts.

As in :mod:`megamoe.moe.dispatch.journey`, each step with its backward pass written out; but an exchange begins in one
step and is waited for in another one. Where the forward pass begins an exchange, the backward pass waits for the one of
the gradients, and the other way round. What lies between the two steps is the time in which it is hidden. Tickets,
tensors without values, pass from the one to the other, so that autograd keeps the order.

Whole rows are put together before they are added up, so that sums have the bits of the exchange in one piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.config.ops import OpsConfig
from megamoe.moe.decisions import recomputing
from megamoe.moe.dispatch.journey import EMPTY, ByExpert, Order, Splits, packed_dtype, unpack, values_at
from megamoe.ops.plan import plan_rows
from megamoe.ops.rows import permute_rows, unpermute_rows
from megamoe.parallel.link import Link, Transfer


class Part(NamedTuple):
    """Rows of one chunk."""

    experts: slice
    """Of each rank, by their numbers there."""
    rows: slice
    """As they leave, of those of all chunks."""
    splits: Splits
    by_expert: ByExpert


class Trip:
    """Rows of one pass, on their way there and back.

    Args:
        leave: from tokens to travel: by chunk, then by destination rank and expert.
        width: D.
        dtype: of the gate weights.
    """

    def __init__(self, link: Link, ops: OpsConfig, leave: Order, parts: list[Part], width: int, dtype: torch.dtype):
        self.link, self.move, self.plan = link, ops.rows, ops.plan
        self.leave, self.parts, self.width, self.dtype = leave, parts, width, dtype
        self.arrive: dict[int, Order] = {}
        """By chunk: from travel to experts."""
        self.kept: dict[int, Tensor] = {}
        """Results that a recomputed pass has not sent."""
        self._under_way: dict[tuple[str, int], Transfer] = {}

    def depart(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Send the rows [N, D] of all chunks with the gate weights of their choices [N, K]; a ticket for each chunk.

        All at once, because the link carries them one after the other in any case: so it is never idle, and no chunk's
        rows wait behind results on their way home, which nobody computes with.
        """
        tickets: tuple[Tensor, ...] = _Depart.apply(rows, weights, self)
        return tickets

    def arrived(self, chunk: int, ticket: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of a chunk by expert, their gate weights, and the numbers of rows of its experts."""
        rows, weights, rows_per_expert = _Arrive.apply(ticket, self, chunk)
        return rows, weights, rows_per_expert

    def send_home(self, chunk: int, rows: Tensor) -> Tensor:
        """Begin to send results of a chunk; a ticket."""
        ticket: Tensor = _SendHome.apply(rows, self, chunk)
        return ticket

    def home(self, tickets: list[Tensor]) -> Tensor:
        """Results of all chunks, added up for each row that departed: [N, D]."""
        out: Tensor = _Home.apply(self, *tickets)
        return out

    def order(self, chunk: int) -> Order:
        """`leave`, of this chunk alone."""
        rows, place = self.parts[chunk].rows, self.leave.place_NK
        here = (place >= rows.start) & (place < rows.stop)
        return Order(torch.where(here, place - rows.start, -1), self.leave.source_M[rows])

    def start(self, phase: str, chunk: int, rows: Tensor, back: bool) -> None:
        """Begin to send rows of a chunk there or back."""
        _, send, receive, _ = self.parts[chunk].splits
        splits = (receive, send) if back else (send, receive)
        self._under_way[phase, chunk] = self.link.start(rows, *splits, f"{phase} {chunk + 1}/{len(self.parts)}")

    def wait(self, phase: str, chunk: int) -> Tensor:
        """The rows that this rank gets instead."""
        return self._under_way.pop((phase, chunk)).wait()

    def wait_for_all(self, phase: str) -> Tensor:
        """Of all chunks, in their order."""
        return torch.cat([self.wait(phase, chunk) for chunk in range(len(self.parts))])

    def start_home(self, chunk: int, rows: Tensor) -> None:
        """Begin to send results of a chunk."""
        back = self.arrive[chunk].backwards()
        leaving = permute_rows(rows, back.source_M, back.place_NK, implementation=self.move)
        self.start("combine", chunk, leaving, back=True)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, trip: Trip) -> tuple[Tensor, ...]:
        ctx.trip = trip
        values = weights.to(packed_dtype(rows, weights)).contiguous()
        for chunk in range(len(trip.parts)):
            order = trip.order(chunk)
            sent = permute_rows(rows, order.source_M, order.place_NK, values, EMPTY, implementation=trip.move)
            trip.start("dispatch", chunk, sent, back=False)
        return tuple(rows.new_empty(0) for _ in trip.parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: Trip = ctx.trip
        rows, weights = unpack(trip.wait_for_all("dispatch backward"), trip.width, trip.dtype)
        leave = trip.leave
        d_rows = unpermute_rows(rows, leave.place_NK, leave.source_M, implementation=trip.move)
        return d_rows, values_at(weights, leave.place_NK), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: Trip, chunk: int) -> tuple[Tensor, ...]:
        ctx.trip, ctx.chunk = trip, chunk
        rows, weights = unpack(trip.wait("dispatch", chunk), trip.width, trip.dtype)
        experts, num_experts = trip.parts[chunk].by_expert(weights)
        place, source, rows_per_expert = plan_rows(experts[:, None], num_experts, implementation=trip.plan)
        trip.arrive[chunk] = Order(place, source)
        ctx.mark_non_differentiable(rows_per_expert)
        by_expert = permute_rows(rows, source, place, implementation=trip.move)
        return by_expert, values_at(weights, source), rows_per_expert

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: Trip = ctx.trip
        d_rows, d_weights = grads[0].contiguous(), grads[1]
        back = trip.arrive[ctx.chunk].backwards()
        values = d_weights.to(packed_dtype(d_rows, d_weights))[:, None].contiguous()
        packed = permute_rows(d_rows, back.source_M, back.place_NK, values, 0.0, implementation=trip.move)
        trip.start("dispatch backward", ctx.chunk, packed, back=True)
        return d_rows.new_empty(0), None, None


class _SendHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: Trip, chunk: int) -> Tensor:
        # As attributes: what is saved for backward, a recomputed pass would have to reach.
        ctx.trip, ctx.chunk = trip, chunk
        if recomputing():  # which usually ends before anyone asks for these results
            trip.kept[chunk] = rows
        else:
            trip.start_home(chunk, rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: Trip = ctx.trip
        arrived, arrive = trip.wait("combine backward", ctx.chunk), trip.arrive[ctx.chunk]
        return permute_rows(arrived, arrive.source_M, arrive.place_NK, implementation=trip.move), None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, *tickets: Tensor) -> Tensor:
        ctx.trip = trip
        for chunk, rows in trip.kept.items():
            trip.start_home(chunk, rows)
        trip.kept.clear()
        home = trip.wait_for_all("combine")
        return unpermute_rows(home, trip.leave.place_NK, trip.leave.source_M, implementation=trip.move)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: Trip = ctx.trip
        grad = grads[0].contiguous()
        for chunk in reversed(range(len(trip.parts))):  # as the backward pass comes to them
            order = trip.order(chunk)
            leaving = permute_rows(grad, order.source_M, order.place_NK, implementation=trip.move)
            trip.start("combine backward", chunk, leaving, back=False)
        return None, *(grad.new_empty(0) for _ in trip.parts)
