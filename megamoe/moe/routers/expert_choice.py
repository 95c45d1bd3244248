"""Expert choice (arXiv 2202.09368): each expert takes the tokens that score it highest."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import ExpertChoiceRouterConfig
from megamoe.moe.decisions import best, decided
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.routers.base import (
    NOTHING,
    Assigned,
    Choice,
    Outcome,
    RouterSize,
    Rows,
    auxiliary_losses,
    count,
    own_assignments,
)
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.types import RoutingPlan
from megamoe.ops.row_softmax import row_softmax


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes the C tokens of highest score among all tokens of the micro-batch; C is the static capacity.

    Scores are the softmax of a linear map over experts, and a chosen token's weight is its score as it is. A token gets
    between 0 and E experts: `drop_share` is then the share of K per token that tokens with fewer experts lack.

    Evaluation (ours) is token choice: the K experts of highest score. An expert's best C tokens depend on later
    positions and on the rest of the batch, so the model could neither generate nor be compared by its loss. The
    balance loss counts this choice too, as the experts' choice is balanced already.
    """

    def __init__(
        self, config: ExpertChoiceRouterConfig, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE
    ) -> None:
        super().__init__(size, capacity, ep)
        self.config = config

    def forward(self, rows_TD: Tensor, about: Rows = NOTHING) -> RoutingPlan:
        logits_TE = about.whole(self.logits(rows_TD))
        scores_TE = row_softmax(logits_TE)
        expert_ids_TK = best(scores_TE, self.top_k)
        outcome = Outcome(
            logits_TE,
            scores_TE,
            losses=auxiliary_losses(self.config, scores_TE, logits_TE, count(expert_ids_TK, self.num_experts)),
            observations={},
            metrics=self.describe(scores_TE),
        )
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if self.training:
            return self._experts_choose(scores_TE, outcome, about, weights_TK)
        return self.make_plan(Choice(expert_ids_TK, weights_TK, weights_TK), outcome, about)

    def _experts_choose(self, scores_TE: Tensor, outcome: Outcome, about: Rows, weights_TK: Tensor) -> RoutingPlan:
        assert self.bound is not None, "a configuration without a capacity is refused"
        num_tokens, decision, scores = len(scores_TE), self.decide(outcome, about), scores_TE.detach()
        size = about.size or num_tokens
        if decision is not None:
            scores = scores.masked_fill(decision.chosen_T[:, None], -1.0)  # after all others
        # From the host, so that the shapes below follow without waiting for the device; static: equal for all experts.
        tokens_EC = best_tokens(scores, self.bound.capacities(size)[0])
        experts_EC = torch.arange(self.num_experts, device=tokens_EC.device)[:, None].expand_as(tokens_EC)
        # In the scores' own layout: their gradient has it then, and the same bits whatever zeros are added to it.
        weights_EC = scores_TE.gather(0, tokens_EC.t()).t()
        tokens_A, experts_A, weights_A = tokens_EC.flatten(), experts_EC.flatten(), weights_EC.flatten()
        if decision is not None:
            kept = (~decision.chosen_T)[tokens_A].nonzero().squeeze(-1)
            tokens_A, experts_A, weights_A = tokens_A[kept], experts_A[kept], weights_A[kept]
        rows_per_expert_E = count(experts_A, self.num_experts)
        broadcast, limits = self.broadcast_rows(decision, outcome, weights_TK), self.limits(size)
        metrics = self.describe_plan(count(tokens_A, num_tokens), rows_per_expert_E, limits, broadcast)
        assigned = Assigned(tokens_A, experts_A, weights_A, rows_per_expert_E)
        if about.spread is not None:
            assigned = own_assignments(assigned, about.spread)
        return self.plan_of(assigned, outcome, metrics, limits, about, broadcast)


def best_tokens(scores_TE: Tensor, capacity: int) -> Tensor:
    """The C tokens of highest score for each expert, int64 [E, C], in the order of the tokens; ties: earlier ones. In a
    recomputed pass those of the first one."""

    def choose() -> Tensor:
        by_score_ET = scores_TE.t().sort(dim=-1, descending=True, stable=True).indices
        return by_score_ET[:, :capacity].sort(dim=-1).values

    return decided(choose)
