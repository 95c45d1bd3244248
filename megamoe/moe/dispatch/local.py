"""Dispatch where every expert is on this rank: only a permutation."""

from __future__ import annotations

from torch import Tensor

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.base import DEFAULT, Dispatcher, at_home
from megamoe.moe.types import DispatchHandle, RoutingPlan
from megamoe.ops.rows import gather_rows, permute_rows, unpermute_rows


class LocalDispatcher(Dispatcher):
    """The plan's order is already by expert and token. Nothing waits for the device."""

    name = "local"

    def __init__(self, ops: OpsConfig = DEFAULT) -> None:
        self.ops = ops

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        handle = DispatchHandle(weights_R=plan.weights_A, plan=plan, num_rows=rows_TD.shape[0])
        choices = plan.choices
        if choices is None:
            rows_AD = gather_rows(rows_TD, plan.token_ids_A)
        else:
            rows_AD = permute_rows(rows_TD, choices.source_A, choices.place_TK, implementation=self.ops.rows)
        return rows_AD, plan.rows_per_expert_E, handle

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        choices = handle.plan.choices
        if choices is None:
            return at_home(rows_RD, handle)
        return unpermute_rows(rows_RD, choices.place_TK, choices.source_A, implementation=self.ops.rows)
