"""Dispatch inside a node without messages: a rank writes its rows straight to their places at their experts' ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.base import DEFAULT, Dispatcher, at_home, leaving
from megamoe.moe.dispatch.padded import PaddedDispatcher
from megamoe.moe.dispatch.push_window import Size, Way, Window, shared_window
from megamoe.moe.routers import base
from megamoe.moe.types import Choices, DispatchHandle, RoutingPlan
from megamoe.ops import push
from megamoe.parallel.link import Link

Windows = Callable[[Tensor, int], Window]
"""The window for such rows and so many experts on a rank."""


class PushDispatcher(Dispatcher):
    """Rank p of the group holds the experts p*L ... (p+1)*L - 1.

    All ranks tell each other how many rows they have for each expert, by which everyone knows the place of every row.
    Rows are then written there by expert, without gaps, and read from there when they come home: nothing is packed,
    nothing unpacked. The memory holds C = `plan.capacity` rows of every rank for every expert, so nothing waits for the
    host. Results have the bits of the other dispatchers'. A plan without a capacity (evaluation) goes the ragged way.

    Where the ranks do not share a node, the ops are not compiled, or the memory cannot be had, rows travel by
    all-to-all with the same results; the reason is logged once.

    Args:
        windows: None: one for all layers of the group.
    """

    name = "push"

    def __init__(self, link: Link, ops: OpsConfig = DEFAULT, windows: Windows | None = None) -> None:
        self.link, self.num_ranks = link, link.num_ranks
        self.padded = PaddedDispatcher(link, ops)
        self.windows = windows or (lambda rows, num_local: shared_window(link.group, rows, num_local))

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        if plan.capacity is None:
            return self.padded.dispatch(rows_TD, plan)
        num_local = len(plan.rows_per_expert_E) // self.num_ranks
        window = self.windows(rows_TD, num_local)
        size = Size(num_local, plan.capacity, rows_TD.shape[1] * rows_TD.element_size())
        if window.fit(size, self._unusable(rows_TD, plan.weights_A)):
            return self.padded.dispatch(rows_TD, plan)
        rows, choices = leaving(rows_TD, plan)
        way = self._way(window, choices, plan, num_local)
        rows_RD, weights_R = _There.apply(rows, choices.weights_TK, way)
        first = self.link.rank * num_local
        rows_per_expert_L = way.counts_PE[:, first : first + num_local].sum(0)
        handle = DispatchHandle(weights_R, plan, rows_TD.shape[0], way, self._sent_bytes(way, rows_TD))
        return rows_RD, rows_per_expert_L, handle

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        if not isinstance(handle.state, Way):
            return self.padded.combine(rows_RD, handle)
        home_TD: Tensor = _Home.apply(rows_RD, handle.state)
        return at_home(home_TD, handle)

    def _unusable(self, rows_TD: Tensor, weights: Tensor) -> str:
        if weights.element_size() > push.values_dtype(rows_TD.dtype).itemsize:
            return f"gate weights are {weights.dtype} beside rows of {rows_TD.dtype}"
        return push.unavailable(rows_TD.device, rows_TD.dtype)

    def _way(self, window: Window, choices: Choices, plan: RoutingPlan, num_local: int) -> Way:
        number, counts_PE = window.send_counts(plan.rows_per_expert_E, self.link)
        first_PE = push.first_rows(counts_PE)
        place_TK, start_E = push.places_at_owners(
            choices.experts_TK, choices.place_TK, counts_PE, first_PE, self.link.rank, window.rows
        )
        assert plan.capacity is not None
        return Way(
            window,
            self.link,
            number,
            counts_PE,
            first_PE,
            start_E,
            choices.source_A.contiguous(),
            place_TK.contiguous(),
            window.rows,
            self.num_ranks * num_local * plan.capacity,
            place_TK.shape[1],
            self._moved(counts_PE, len(choices.source_A), plan.capacity, num_local),
        )

    def _moved(self, counts_PE: Tensor, num_assigned: int, capacity: int, num_local: int) -> tuple[int, int]:
        """Rows to other ranks, and from them. On a GPU at most, because the host does not know."""
        if base.waiting_costs(counts_PE.device):
            most = (self.num_ranks - 1) * num_local * capacity
            return min(num_assigned, most), most
        by_owner = counts_PE.numpy().reshape(self.num_ranks, self.num_ranks, num_local).sum(2)
        me = self.link.rank
        return int(by_owner[me].sum() - by_owner[me, me]), int(by_owner[:, me].sum() - by_owner[me, me])

    def _sent_bytes(self, way: Way, rows_TD: Tensor) -> int:
        """Rows with their weights to other ranks, results back to them, and the counts."""
        there, back = way.moved
        width = rows_TD.shape[1] * rows_TD.element_size()
        value = push.values_dtype(rows_TD.dtype).itemsize
        return there * (width + value) + back * width + (self.num_ranks - 1) * way.counts_PE.shape[1] * 4


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, weights_TK: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        ctx.way = way
        values_TK = weights_TK.to(push.values_dtype(rows_TD.dtype))
        rows_RD, values_R = way.window.push(rows_TD.contiguous(), values_TK.contiguous(), way, "dispatch", way.number)
        return rows_RD, values_R.to(weights_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows_RD, d_weights_R = grads
        values_R = d_weights_R.to(push.values_dtype(d_rows_RD.dtype)).contiguous()
        d_rows_TD, values_TK = ctx.way.window.pull(d_rows_RD.contiguous(), values_R, ctx.way, "dispatch backward")
        return d_rows_TD, values_TK.to(d_weights_R.dtype), None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, way: Way) -> Tensor:
        # As an attribute: what is saved for backward, a recomputed pass would have to reach.
        ctx.way = way
        home_TD: Tensor = way.window.pull(rows_RD.contiguous(), None, way, "combine")[0]
        return home_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_home_TD = grads[0].contiguous()
        return ctx.way.window.push(d_home_TD, None, ctx.way, "combine backward")[0], None
