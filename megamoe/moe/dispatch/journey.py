"""The way of rows to their experts' ranks and home again, each direction with its backward pass written out.

Rows stand in three orders: those of the tokens [T], as they travel (by destination rank and expert when they leave, by
source rank and expert when they arrive), and by expert where they are worked on [R]. Between tokens and travel lies a
map, `Order`, between travel and experts another, and an exchange between the ranks in the middle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.base import DEFAULT
from megamoe.moe.types import Choices
from megamoe.ops.plan import plan_rows
from megamoe.ops.rows import permute_rows, unpermute_rows
from megamoe.parallel.link import Link

EMPTY = -1.0
"""Gate weight of a row that is nobody's; real ones are not negative. (Not NaN: a diverged run has those.)"""


class Order(NamedTuple):
    """A map from N rows, each with a place for K copies of it, to M rows. Indices are int32."""

    place_NK: Tensor
    """Row that each copy becomes; -1: none."""
    source_M: Tensor
    """The copy n * K + k that each row is; -1: a row of zeros."""

    def backwards(self) -> Order:
        """The way back, where K = 1."""
        return Order(self.source_M[:, None], self.place_NK[:, 0])


class Splits(NamedTuple):
    """Rows to and from each rank of a group. None: equally many everywhere."""

    link: Link
    send: list[int] | None = None
    receive: list[int] | None = None
    ops: OpsConfig = DEFAULT
    """With which implementations rows are put in order before and after."""

    def there(self, rows: Tensor, phase: str) -> Tensor:
        return self.link.exchange(rows, self.send, self.receive, phase)

    def back(self, rows: Tensor, phase: str) -> Tensor:
        return self.link.exchange(rows, self.receive, self.send, phase)


class Journey(NamedTuple):
    """One exchange as this rank sees it."""

    leave: Order
    """From tokens to travel."""
    splits: Splits
    arrive: Order
    """From travel to experts; rows that are nobody's come last."""

    def home(self, rows_RD: Tensor) -> Tensor:
        """Results to the ranks of their tokens, added up there: [T, D]. The gradient needs nothing of its own input, so
        that a recomputed pass ends before it."""
        home_TD: Tensor = _Home.apply(rows_RD, self)
        return home_TD


class Arrival(NamedTuple):
    """The rows that arrived, in the order of the experts."""

    rows_RD: Tensor
    weights_R: Tensor
    """0 for rows that are nobody's."""
    rows_per_expert_L: Tensor
    journey: Journey


ByExpert = Callable[[Tensor], tuple[Tensor, int]]
"""From the weights of arrived rows to their experts: int64 [N] in [0, L), L: nobody's; and L."""


def travel(rows_TD: Tensor, choices: Choices, leave: Order, splits: Splits, by_expert: ByExpert) -> Arrival:
    """Rows and gate weights to the ranks of their experts, as one message. Differentiable in both."""
    rows_RD, weights_R, *rest = _There.apply(rows_TD, choices.weights_TK, leave, splits, by_expert)
    rows_per_expert_L, place_N1, source_R = rest
    return Arrival(rows_RD, weights_R, rows_per_expert_L, Journey(leave, splits, Order(place_N1, source_R)))


class _There(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, leave: Order, splits: Splits, by_expert: ByExpert
    ) -> tuple[Tensor, ...]:
        move = splits.ops.rows
        values = weights.to(packed_dtype(rows, weights)).contiguous()
        sent = permute_rows(rows, leave.source_M, leave.place_NK, values, EMPTY, implementation=move)
        arrived = splits.there(sent, "dispatch")
        del sent
        arrived_rows, arrived_weights = unpack(arrived, rows.shape[1], weights.dtype)
        experts, num_local = by_expert(arrived_weights)
        place, source, rows_per_expert = plan_rows(experts[:, None], num_local, implementation=splits.ops.plan)
        ctx.leave, ctx.splits, ctx.arrive = leave, splits, Order(place, source)
        by_expert_rows = permute_rows(arrived_rows, source, place, implementation=move)
        by_expert_weights = values_at(arrived_weights, source)
        ctx.mark_non_differentiable(rows_per_expert, place, source)
        return by_expert_rows, by_expert_weights, rows_per_expert, place, source

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_weights = grads[:2]
        back, leave = ctx.arrive.backwards(), ctx.leave
        d_rows, values = d_rows.contiguous(), d_weights.to(packed_dtype(d_rows, d_weights))[:, None].contiguous()
        move = ctx.splits.ops.rows
        packed = permute_rows(d_rows, back.source_M, back.place_NK, values, 0.0, implementation=move)
        returned = ctx.splits.back(packed, "dispatch backward")
        del packed
        home_rows, home_weights = unpack(returned, d_rows.shape[1], d_weights.dtype)
        d_home = unpermute_rows(home_rows, leave.place_NK, leave.source_M, implementation=move)
        return d_home, values_at(home_weights, leave.place_NK), None, None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        # As an attribute: what is saved for backward, a recomputed pass would have to reach. So these indices, 16 bytes
        # of each choice, stay where other activations do not.
        ctx.journey = journey
        leave, splits, arrive = journey
        back, move = arrive.backwards(), splits.ops.rows
        leaving = permute_rows(rows, back.source_M, back.place_NK, implementation=move)
        home = splits.back(leaving, "combine")
        return unpermute_rows(home, leave.place_NK, leave.source_M, implementation=move)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        leave, splits, arrive = ctx.journey
        move = splits.ops.rows
        leaving = permute_rows(grads[0].contiguous(), leave.source_M, leave.place_NK, implementation=move)
        arrived = splits.there(leaving, "combine backward")
        return permute_rows(arrived, arrive.source_M, arrive.place_NK, implementation=move), None


def packed_width(rows: Tensor, values: Tensor) -> int:
    """Columns that a value each adds to rows that travel with it."""
    return max(1, values.element_size() // rows.element_size())


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of that width, and the values of that dtype whose bits are in the columns after it."""
    columns = packed[:, width:].flatten()
    values = columns.to(dtype) if packed.dtype.itemsize > dtype.itemsize else columns.view(dtype)
    return packed[:, :width], values


def packed_dtype(rows: Tensor, values: Tensor) -> torch.dtype:
    """In which precision values travel beside rows: wider rows lose nothing of them."""
    return rows.dtype if rows.element_size() > values.element_size() else values.dtype


def values_at(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]`, 0 where the index is -1."""
    if not values.numel():
        return values.new_zeros(index.shape)
    return values[index.clamp_min(0).long()].masked_fill(index < 0, 0.0)
