"""Dispatch over an expert-parallel group by all-to-all with uneven splits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.base import DEFAULT, Dispatcher, at_home, leaving
from megamoe.moe.dispatch.journey import Journey, Order, Splits, packed_width, travel
from megamoe.moe.types import DispatchHandle, RoutingPlan
from megamoe.parallel.link import Link


class AllToAllDispatcher(Dispatcher):
    """Rank p of the group holds the experts p*L ... (p+1)*L - 1.

    Counts go first, because the splits of the rows follow from them; the host waits for them once per layer.
    """

    name = "all_to_all"

    def __init__(self, link: Link, ops: OpsConfig = DEFAULT) -> None:
        self.link, self.ops, self.num_ranks = link, ops, link.num_ranks
        self.by_source = ops.expert_ffn == "by_source"

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        sent_PL = plan.rows_per_expert_E.view(self.num_ranks, -1)
        received_PL = self.link.exchange(sent_PL, None, None, "counts")
        splits = Splits(self.link, sent_PL.sum(1).tolist(), received_PL.sum(1).tolist(), self.ops)
        rows, choices = leaving(rows_TD, plan)
        leave = Order(choices.place_TK, choices.source_A[: sum(splits.send or ())])
        arrival = travel(
            rows, choices, leave, splits, lambda weights_R: (experts_of(received_PL, len(weights_R)), sent_PL.shape[1])
        )
        sent_bytes = self._sent_bytes(splits, rows_TD, plan)
        handle = DispatchHandle(arrival.weights_R, plan, rows_TD.shape[0], arrival.journey, sent_bytes)
        return arrival.rows_RD, received_PL.t() if self.by_source else arrival.rows_per_expert_L, handle

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        journey: Journey = handle.state
        return at_home(journey.home(rows_RD), handle)

    def _sent_bytes(self, splits: Splits, rows_TD: Tensor, plan: RoutingPlan) -> int:
        """Rows with their weights to other ranks, results back to them, and the counts."""
        me, width = self.link.rank, rows_TD.shape[1]
        there, back = (sum(split) - split[me] for split in (splits.send or [0], splits.receive or [0]))
        values = there * (width + packed_width(rows_TD, plan.weights_A)) + back * width
        counts = len(plan.rows_per_expert_E) // self.num_ranks * (self.num_ranks - 1) * 8
        return values * rows_TD.element_size() + counts


def experts_of(received_PL: Tensor, num_rows: int) -> Tensor:
    """Local expert of each arrived row, int64 [R]: they come by source rank, and of each rank by expert.

    Args:
        received_PL: int64 [P, L], rows that each rank sent for each local expert.
        num_rows: R, their sum, so that the host need not ask for it.
    """
    num_ranks, num_local = received_PL.shape
    experts = torch.arange(num_local, device=received_PL.device).repeat(num_ranks)
    return torch.repeat_interleave(experts, received_PL.reshape(-1), output_size=num_rows)


class AllToAll(torch.autograd.Function):
    """all_to_all_single along dim 0 with uneven splits; its backward pass is the same with the splits exchanged."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], link: Link, phase: str) -> Tensor:
        ctx.splits, ctx.phase = Splits(link, send, receive), phase
        return ctx.splits.there(rows, phase)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.splits.back(grads[0], f"{ctx.phase} backward"), None, None, None, None
