"""Dispatch over an expert-parallel group by all-to-all with uneven splits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.types import DispatchHandle, RoutingPlan
from megamoe.ops.rows import gather_rows, sum_rows


class _Exchange(NamedTuple):
    """One exchange as this rank sees it."""

    send_splits: list[int]
    """Assignments for each rank, [P]."""
    receive_splits: list[int]
    """Rows from each rank, [P]."""
    expert_order_R: Tensor
    """int64 [R]: place in arrival order (source rank, expert, token) of each row in expert order."""


class AllToAllDispatcher(Dispatcher):
    """Rank p of the group holds the experts p*L ... (p+1)*L - 1.

    Counts go first, because the splits of the rows follow from them; the host waits for them once per layer.
    """

    name = "all_to_all"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        sent_PL = plan.rows_per_expert_E.view(self.num_ranks, -1)
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=self.group)
        exchange = _Exchange(sent_PL.sum(1).tolist(), received_PL.sum(1).tolist(), expert_order(received_PL))
        sent_AD, splits = gather_rows(rows_TD, plan.token_ids_A), (exchange.send_splits, exchange.receive_splits)
        arrived_RD, arrived_R = _ExchangeTogether.apply(sent_AD, plan.weights_A, *splits, self.group)
        weights_R = gather_rows(arrived_R, exchange.expert_order_R)
        handle = DispatchHandle(weights_R, plan, rows_TD.shape[0], exchange, self._sent_bytes(exchange, rows_TD, plan))
        return gather_rows(arrived_RD, exchange.expert_order_R), received_PL.sum(0), handle

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        exchange: _Exchange = handle.state
        arrival_RD = sum_rows(rows_RD, exchange.expert_order_R, rows_RD.shape[0])
        home_AD = AllToAll.apply(arrival_RD, exchange.receive_splits, exchange.send_splits, self.group)
        return sum_rows(home_AD, handle.plan.token_ids_A, handle.num_rows)

    def _sent_bytes(self, exchange: _Exchange, rows_TD: Tensor, plan: RoutingPlan) -> int:
        """Rows with their weights to other ranks, results back to them, and the counts."""
        me, width = dist.get_rank(self.group), rows_TD.shape[1]
        there = sum(exchange.send_splits) - exchange.send_splits[me]
        back = sum(exchange.receive_splits) - exchange.receive_splits[me]
        values = there * (width + packed_width(rows_TD, plan.weights_A)) + back * width
        counts = len(plan.rows_per_expert_E) // self.num_ranks * (self.num_ranks - 1) * 8
        return values * rows_TD.element_size() + counts


def expert_order(received_PL: Tensor) -> Tensor:
    """Order that turns rows sorted by (source rank, expert) into rows sorted by (expert, source rank).

    Args:
        received_PL: int64 [P, L], rows that each rank sent for each local expert.

    Returns:
        int64 [R]: arrival place of each row in the new order. Stable: tokens of one sender and expert keep theirs.
    """
    num_ranks, num_local = received_PL.shape
    experts = torch.arange(num_local, device=received_PL.device).repeat(num_ranks)
    expert_of_R = torch.repeat_interleave(experts, received_PL.reshape(-1))
    return torch.sort(expert_of_R, stable=True).indices


class AllToAll(torch.autograd.Function):
    """all_to_all_single along dim 0 with uneven splits; its backward pass is the same with the splits exchanged."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


class _ExchangeTogether(torch.autograd.Function):
    """:class:`AllToAll` of rows [A, D] and one fp32 value beside each [A], as one message.

    A message costs a meeting of all ranks however small it is, so the values travel as bits in further columns.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, values: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return unpack(_all_to_all(pack(rows, values), send, receive, group), rows.shape[1], values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, values = grads
        returned = _all_to_all(pack(rows, values), ctx.receive, ctx.send, ctx.group)
        return *unpack(returned, rows.shape[1], values.dtype), None, None, None


def pack(rows: Tensor, values: Tensor) -> Tensor:
    """Rows [A, D] and the bits of a value each in further columns of the rows' dtype."""
    if rows.dtype.itemsize > values.dtype.itemsize:
        values = values.to(rows.dtype)  # float64 rows, in tests: wider, so nothing is lost
    return torch.cat([rows, values.contiguous().view(-1, 1).view(rows.dtype)], dim=1)


def packed_width(rows: Tensor, values: Tensor) -> int:
    """Columns that `pack` adds."""
    return max(1, values.element_size() // rows.element_size())


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What was packed: rows of that width, values of that dtype."""
    columns = packed[:, width:].flatten()
    values = columns.to(dtype) if packed.dtype.itemsize > dtype.itemsize else columns.view(dtype)
    return packed[:, :width], values


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
    return arrived
