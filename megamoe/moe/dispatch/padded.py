"""Dispatch over an expert-parallel group by all-to-all with even splits: every expert gets its capacity of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher, pack, packed_width, unpack
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.types import DispatchHandle, RoutingPlan
from megamoe.ops.rows import gather_rows, sum_rows

EMPTY = -1.0
"""Gate weight of a slot without a row; real ones are not negative. (Not NaN: a diverged run has those.)"""


class _Slots(NamedTuple):
    """One exchange as this rank sees it. Slots are ordered by (rank, expert, place), C for each expert."""

    slot_A: Tensor
    """int64 [A]: the slot in which each assignment leaves and its result returns."""
    expert_order_S: Tensor
    """int64 [S]: arrival slot of each row in expert order; empty slots come last."""


class PaddedDispatcher(Dispatcher):
    """Rank p of the group holds the experts p*L ... (p+1)*L - 1; every rank sends C = `plan.capacity` slots to each.

    All shapes follow from C, which the ranks agree on beforehand: no exchange of numbers, and the host does not wait
    for one. (On a GPU it still waits for the router's plan, whose length is the number of rows kept.) Which slots hold
    a row is seen from the gate weight that travels with it. The rows that experts work on, and their order, are those
    of the ragged exchange, so the results have the same bits. All ranks pass the same number of rows T. A plan without
    a capacity (evaluation) goes the ragged way.
    """

    name = "padded"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.ragged = AllToAllDispatcher(group)
        self._agreed = False

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        if plan.capacity is None:
            return self.ragged.dispatch(rows_TD, plan)
        num_experts, capacity = len(plan.rows_per_expert_E), plan.capacity
        self._agree(capacity, plan.rows_per_expert_E)
        slot_A = slots_of(plan.rows_per_expert_E, plan.expert_ids_A, capacity)
        sent_AD, num_slots = gather_rows(rows_TD, plan.token_ids_A), num_experts * capacity
        arrived_SD, arrived_S = _PaddedExchange.apply(sent_AD, plan.weights_A, slot_A, num_slots, self.group)
        held_S = arrived_S.detach() != EMPTY
        order_S = expert_order(held_S.view(self.num_ranks, -1, capacity))
        weights_S = gather_rows(arrived_S.masked_fill(~held_S, 0.0), order_S)
        rows_per_expert_L = held_S.view(self.num_ranks, -1, capacity).sum((0, 2))
        width = rows_TD.shape[1] + packed_width(rows_TD, plan.weights_A)
        elsewhere = num_slots - num_slots // self.num_ranks
        sent_bytes = elsewhere * (width + rows_TD.shape[1]) * rows_TD.element_size()
        handle = DispatchHandle(weights_S, plan, rows_TD.shape[0], _Slots(slot_A, order_S), sent_bytes)
        return gather_rows(arrived_SD, order_S), rows_per_expert_L, handle

    def _agree(self, capacity: int, like: Tensor) -> None:
        """Compare C over the ranks, the first time only: different sizes would end every process without a reason.

        Raises:
            ValueError: the ranks do not agree.
        """
        if self._agreed:
            return
        sizes = [torch.empty(1, dtype=torch.int64, device=like.device) for _ in range(self.num_ranks)]
        dist.all_gather(sizes, torch.tensor([capacity], device=like.device), group=self.group)
        found = [int(size) for size in sizes]
        if len(set(found)) > 1:
            raise ValueError(f"a padded exchange needs as many rows on every rank; capacities over ranks: {found}")
        self._agreed = True

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        if not isinstance(handle.state, _Slots):
            return self.ragged.combine(rows_RD, handle)
        slots: _Slots = handle.state
        arrival_SD = sum_rows(rows_RD, slots.expert_order_S, rows_RD.shape[0])
        home_SD = _EvenExchange.apply(arrival_SD, self.group)
        return sum_rows(gather_rows(home_SD, slots.slot_A), handle.plan.token_ids_A, handle.num_rows)


def slots_of(rows_per_expert_E: Tensor, expert_ids_A: Tensor, capacity: int) -> Tensor:
    """Slot of each assignment, int64 [A]: the first of its expert, plus its place among that expert's."""
    first_E = rows_per_expert_E.cumsum(0) - rows_per_expert_E
    place_A = torch.arange(len(expert_ids_A), device=expert_ids_A.device) - first_E[expert_ids_A]
    return expert_ids_A * capacity + place_A


def expert_order(held_PLC: Tensor) -> Tensor:
    """Order that turns slots by (rank, expert, place) into rows by (expert, rank, place), empty ones last.

    Args:
        held_PLC: bool, whether a slot holds a row.

    Returns:
        int64 [S].
    """
    num_local = held_PLC.shape[1]
    experts_PLC = torch.arange(num_local, device=held_PLC.device)[:, None].expand_as(held_PLC)
    return torch.sort(experts_PLC.masked_fill(~held_PLC, num_local).flatten(), stable=True).indices


class _PaddedExchange(torch.autograd.Function):
    """Rows [A, D] and a value each [A] into slots, exchanged: rows [S, D] and values [S], EMPTY where there is none."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, values: Tensor, slots: Tensor, num_slots: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(slots)
        ctx.group = group
        empty = pack(rows.new_zeros(1, rows.shape[1]), values.new_full((1,), EMPTY))
        sent = empty.repeat(num_slots, 1).index_copy_(0, slots, pack(rows, values))
        return unpack(_even_all_to_all(sent, group), rows.shape[1], values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, values = grads
        (slots,) = ctx.saved_tensors
        returned = _even_all_to_all(pack(rows, values), ctx.group).index_select(0, slots)
        return *unpack(returned, rows.shape[1], values.dtype), None, None, None


class _EvenExchange(torch.autograd.Function):
    """all_to_all_single along dim 0 with even splits, which is its own backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _even_all_to_all(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _even_all_to_all(grads[0], ctx.group), None


def _even_all_to_all(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    arrived = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(arrived, rows.contiguous(), group=group)
    return arrived
