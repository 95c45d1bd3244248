"""Dispatch where every expert is on this rank: only a permutation."""

from __future__ import annotations

from torch import Tensor

from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.types import DispatchHandle, RoutingPlan
from megamoe.ops.rows import gather_rows, sum_rows


class LocalDispatcher(Dispatcher):
    """The plan's order is already by expert and token, so its rows are gathered as they are."""

    name = "local"

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        rows_RD = gather_rows(rows_TD, plan.token_ids_A)
        handle = DispatchHandle(weights_R=plan.weights_A, plan=plan, num_rows=rows_TD.shape[0])
        return rows_RD, plan.rows_per_expert_E, handle

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        return sum_rows(rows_RD, handle.plan.token_ids_A, handle.num_rows)
