"""Balanced assignment by Sinkhorn iterations (S-BASE, arXiv 2202.01169)."""

from __future__ import annotations

import math

from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import SinkhornRouterConfig
from megamoe.moe.decisions import best
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.routers.base import (
    NOTHING,
    Choice,
    Outcome,
    RouterSize,
    Rows,
    auxiliary_losses,
    count,
    normalised,
)
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.types import RoutingPlan
from megamoe.ops.row_softmax import row_softmax


class SinkhornRouter(LinearRouter):
    """In training each token takes its K experts from an assignment whose load is balanced over the micro-batch.

    The assignment scales exp(logits) until every token gives away 1 and every expert gets T / E; no gradient passes
    through it. The weights are the softmax of the plain logits, normalised over the token's choices if K > 1.

    Evaluation takes the K highest logits, since the assignment looks across the batch. The balance loss (ours) counts
    this choice too, as the assignment is balanced already.
    """

    def __init__(
        self, config: SinkhornRouterConfig, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE
    ) -> None:
        super().__init__(size, capacity, ep)
        self.config = config

    def forward(self, rows_TD: Tensor, about: Rows = NOTHING) -> RoutingPlan:
        logits_TE = about.whole(self.logits(rows_TD))
        probs_TE = row_softmax(logits_TE)
        own_TK = best(logits_TE, self.top_k)
        outcome = Outcome(
            logits_TE,
            probs_TE,
            losses=auxiliary_losses(self.config, probs_TE, logits_TE, count(own_TK, self.num_experts)),
            observations={},
            metrics=self.describe(probs_TE),
        )
        expert_ids_TK = own_TK
        if self.training:
            assigned_TE = log_assignment(logits_TE.detach(), self.config.iterations)
            expert_ids_TK = best(assigned_TE, self.top_k)
        chosen_TK = probs_TE.gather(1, expert_ids_TK)
        weights_TK = normalised(chosen_TK) if self.top_k > 1 else chosen_TK
        return self.make_plan(Choice(expert_ids_TK, weights_TK, chosen_TK), outcome, about)


def log_assignment(logits_TE: Tensor, iterations: int) -> Tensor:
    """Logarithm of exp(logits) with rows and columns scaled in turn to sums 1 and T / E, [T, E].

    It ends with the columns: scaling a row changes nothing in which of its entries are largest. In logarithms, where
    no logit is too large for exp.
    """
    num_tokens, num_experts = logits_TE.shape
    log_load = math.log(max(1, num_tokens) / num_experts)
    for _ in range(iterations):
        logits_TE = logits_TE.log_softmax(1)
        logits_TE = logits_TE.log_softmax(0) + log_load
    return logits_TE
