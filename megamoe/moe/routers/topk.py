"""Top-k routing: softmax (Switch, GShard, Mixtral) or sigmoid with loss-free balancing (DeepSeek-V3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config.moe import CapacityConfig, TopKRouterConfig
from megamoe.moe import losses
from megamoe.moe.routers.base import Router, auxiliary_losses, count
from megamoe.moe.types import RoutingPlan


class TopKRouter(Router):
    """Each token takes the K experts of highest score; the weights are the scores, normalised over the chosen.

    Selection may add a bias per expert that balances the load without a loss (arXiv 2408.15664): it counts in the
    choice only, and moves by `bias_update_rate` towards the underloaded experts once per optimizer step.
    """

    bias_E: Tensor

    def __init__(
        self,
        config: TopKRouterConfig,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        capacity: CapacityConfig,
    ) -> None:
        super().__init__()
        self.config, self.num_experts, self.top_k, self.capacity = config, num_experts, top_k, capacity
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, rows_TD: Tensor) -> RoutingPlan:
        # In fp32 whatever the model's dtype: two experts' logits often differ by less than bf16 resolves.
        logits_TE = F.linear(rows_TD.float(), self.weight.float())
        scores_TE = logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()
        selection_TE = scores_TE.detach() + self.bias_E.float()
        expert_ids_TK = selection_TE.topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if self.config.score == "sigmoid" or (self.config.normalize_weights and self.top_k > 1):
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        probs_TE = scores_TE if self.config.score == "softmax" else F.normalize(scores_TE, p=1, dim=-1)
        chosen_E = count(expert_ids_TK, self.num_experts)
        return self.make_plan(
            logits_TE,
            expert_ids_TK,
            weights_TK,
            scores_TE.gather(1, expert_ids_TK),
            loss_terms=auxiliary_losses(self.config, probs_TE, logits_TE, chosen_E),
            observations={"chosen_per_expert": chosen_E.float()} if self.config.bias_update_rate else {},
            metrics={"router_entropy": (losses.entropy(probs_TE.detach()), "mean")},
        )

    def update(self, observations: dict[str, Tensor]) -> None:
        if "chosen_per_expert" in observations:
            chosen_E = observations["chosen_per_expert"]
            self.bias_E += self.config.bias_update_rate * torch.sign(chosen_E.mean() - chosen_E).to(self.bias_E)
