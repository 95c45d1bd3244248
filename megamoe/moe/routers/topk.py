"""Top-k routing: softmax (Switch, GShard, Mixtral) or sigmoid with loss-free balancing (DeepSeek-V3)."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import TopKRouterConfig
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


class TopKRouter(LinearRouter):
    """Each token takes the K experts of highest score; the weights are the scores, normalised over the chosen.

    Selection may add a bias per expert that balances the load without a loss (arXiv 2408.15664): it counts in the
    choice only, and moves by `bias_update_rate` towards the underloaded experts once per optimizer step. It may be
    limited to the best groups of consecutive experts (arXiv 2412.19437), so that a token reaches few nodes.
    """

    bias_E: Tensor

    def __init__(
        self, config: TopKRouterConfig, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE
    ) -> None:
        super().__init__(size, capacity, ep)
        self.config = config
        self.register_buffer("bias_E", torch.zeros(size.num_experts, dtype=torch.float32))

    def forward(self, rows_TD: Tensor, about: Rows = NOTHING) -> RoutingPlan:
        logits_TE = about.whole(self.logits(rows_TD))
        scores_TE = row_softmax(logits_TE) if self.config.score == "softmax" else logits_TE.sigmoid()
        selection_TE = within_best_groups(scores_TE.detach() + self.bias_E, self.config)
        expert_ids_TK = best(selection_TE, self.top_k)
        chosen_TK = scores_TE.gather(1, expert_ids_TK)
        weights_TK = chosen_TK
        # Not for one expert: its weight would always be 1, and the router would learn nothing.
        if self.top_k > 1 and (self.config.score == "sigmoid" or self.config.normalize_weights):
            weights_TK = normalised(chosen_TK)
        probs_TE = scores_TE if self.config.score == "softmax" else normalised(scores_TE)
        chosen_E = count(expert_ids_TK, self.num_experts)
        outcome = Outcome(
            logits_TE,
            probs_TE,
            losses=auxiliary_losses(self.config, probs_TE, logits_TE, chosen_E),
            observations=self._observe(expert_ids_TK, chosen_E, about),
            metrics=self.describe(probs_TE),
        )
        return self.make_plan(Choice(expert_ids_TK, weights_TK, chosen_TK), outcome, about)

    def _observe(self, expert_ids_TK: Tensor, chosen_E: Tensor, about: Rows) -> dict[str, Tensor]:
        if not self.config.bias_update_rate:
            return {}
        own_E = chosen_E if about.spread is None else count(about.own(expert_ids_TK), self.num_experts)
        return {"chosen_per_expert": own_E.float()}

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        return row_softmax(logits_TE) if self.config.score == "softmax" else normalised(logits_TE.sigmoid())

    def update(self, observations: dict[str, Tensor]) -> None:
        super().update(observations)
        if "chosen_per_expert" in observations and not self.frozen:
            chosen_E = observations["chosen_per_expert"]
            step_E = self.config.bias_update_rate * torch.sign(chosen_E.mean() - chosen_E)
            self.bias_E.add_(step_E.to(self.bias_E))


def within_best_groups(selection_TE: Tensor, config: TopKRouterConfig) -> Tensor:
    """-inf for experts outside of a token's `top_groups` best groups; a group's rank is the sum of its two best."""
    if config.top_groups >= config.num_groups:
        return selection_TE
    grouped_TGM = selection_TE.unflatten(-1, (config.num_groups, -1))
    rank_TG = grouped_TGM.topk(min(2, grouped_TGM.shape[-1]), dim=-1).values.sum(-1)
    best_TG = torch.zeros_like(rank_TG, dtype=torch.bool)
    best_TG.scatter_(1, rank_TG.topk(config.top_groups, dim=-1).indices, True)
    return grouped_TGM.masked_fill(~best_TG[..., None], -torch.inf).flatten(1)
