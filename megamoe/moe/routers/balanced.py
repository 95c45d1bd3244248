"""Forced balance: tokens in turn to experts in turn, for benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import BalancedRouterConfig
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.routers.base import NOTHING, RouterSize, Rows
from megamoe.moe.routers.fixed import FixedRouter
from megamoe.moe.types import RoutingPlan


class BalancedRouter(FixedRouter):
    """Choice k of token t is expert (t * K + k) mod E: loads differ by 1 row at most, whatever the tokens are.

    An upper bound of speed and not a way to learn: a token's experts depend on its place in the micro-batch only.
    """

    def __init__(
        self, config: BalancedRouterConfig, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE
    ) -> None:
        super().__init__(size, capacity, ep)

    def forward(self, rows_TD: Tensor, about: Rows = NOTHING) -> RoutingPlan:
        num_rows = len(rows_TD) if about.spread is None else about.spread.num_rows
        turns_A = torch.arange(num_rows * self.top_k, device=rows_TD.device)
        return self.fixed_plan(rows_TD, turns_A.view(-1, self.top_k) % self.num_experts, about)
