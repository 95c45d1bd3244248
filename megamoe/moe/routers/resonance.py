"""Expert-Token Resonance (ETR, arXiv 2406.00023): tokens choose experts by cosine affinity, experts choose tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config.moe import CapacityConfig, ResonanceRouterConfig
from megamoe.moe import losses
from megamoe.moe.routers.base import Router, auxiliary_losses, count
from megamoe.moe.types import RoutingPlan


class ResonanceRouter(Router):
    """Affinity routing in both directions.

    1. Affinity delta_ti = cos(x_t - m, w_i) in fp32; m is a running mean of the tokens (ours: hidden states of trained
       models share a direction that would send most tokens to one expert).
    2. Token choice: each token takes its K experts of highest affinity.
    3. Expert choice: each expert keeps, of the tokens that chose it, the ones of highest affinity (`capacity`,
       `threshold`). The printed equation keeps the first by arrival; it contradicts the text, which we follow.
    4. Weights: softmax(kappa * delta), normalised over the token's choices before step 3 (ours: the paper is silent).

    Expert vectors w_i: `grap` is grouped average pooling, constant on the i-th of E contiguous slices of the features;
    `grap_learned` (ours) learns the values on the same disjoint slices, so the vectors stay exactly orthogonal;
    `cosine` (ours) is dense, with an orthogonality penalty.
    kappa (ours) is exp(log_scale), clamped to [sqrt(D)/2, 16 sqrt(D)]: cosines of random tokens are of order
    1/sqrt(D), so their softmax without a scale would be uniform.
    """

    token_mean_D: Tensor
    slice_mask_ED: Tensor

    def __init__(
        self,
        config: ResonanceRouterConfig,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        capacity: CapacityConfig,
    ) -> None:
        super().__init__()
        self.config, self.num_experts, self.top_k, self.capacity = config, num_experts, top_k, capacity
        self.hidden_size = hidden_size
        self.centre = config.affinity != "cosine" if config.centre is None else config.centre
        default = 14.0 if config.affinity == "cosine" else 2.0 * math.sqrt(hidden_size)
        self.initial_scale = config.scale_init or default
        if config.affinity == "cosine":
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        elif config.affinity == "grap_learned":
            self.slice_values = nn.Parameter(torch.empty(hidden_size))
        if config.learn_scale:
            self.log_scale = nn.Parameter(torch.empty(1))
        self.register_buffer("token_mean_D", torch.zeros(hidden_size, dtype=torch.float32))
        self.register_buffer("slice_mask_ED", slice_mask(num_experts, hidden_size), persistent=False)

    def expert_vectors(self) -> Tensor:
        """Unit expert vectors, fp32 [E, D]."""
        if self.config.affinity == "cosine":
            return F.normalize(self.weight.float(), dim=-1)
        mask_ED = self.slice_mask_ED.float()
        if self.config.affinity == "grap_learned":
            mask_ED = mask_ED * self.slice_values.float()
        return F.normalize(mask_ED, dim=-1)

    def scale(self) -> Tensor:
        """kappa, fp32 scalar."""
        root = math.sqrt(self.hidden_size)
        if not self.config.learn_scale:
            return torch.tensor(self.initial_scale, device=self.token_mean_D.device)
        return self.log_scale.float().exp().clamp(root / 2, 16 * root).squeeze(0)

    def affinity(self, rows_TD: Tensor) -> Tensor:
        """delta [T, E] in [-1, 1], fp32."""
        rows_TD = rows_TD.float()
        if self.centre:
            rows_TD = rows_TD - self.token_mean_D.float()
        length_T1 = rows_TD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return F.linear(rows_TD, self.expert_vectors()) / length_T1

    def forward(self, rows_TD: Tensor) -> RoutingPlan:
        affinity_TE = self.affinity(rows_TD)
        logits_TE = self.scale() * affinity_TE
        probs_TE = logits_TE.softmax(-1)
        affinity_TK, expert_ids_TK = affinity_TE.detach().topk(self.top_k, dim=-1)
        weights_TK = probs_TE.gather(1, expert_ids_TK)
        if self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return self.make_plan(
            logits_TE,
            expert_ids_TK,
            weights_TK,
            affinity_TK,
            loss_terms=self._losses(probs_TE, logits_TE, expert_ids_TK),
            observations=self._observe(rows_TD),
            metrics={
                "router_entropy": (losses.entropy(probs_TE.detach()), "mean"),
                "router_scale": (self.scale().detach(), "mean"),
            },
            threshold=self.config.threshold,
        )

    def _losses(self, probs_TE: Tensor, logits_TE: Tensor, expert_ids_TK: Tensor) -> dict[str, Tensor]:
        terms = auxiliary_losses(self.config, probs_TE, logits_TE, count(expert_ids_TK, self.num_experts))
        if self.config.orthogonality_loss and self.config.affinity == "cosine":
            terms["orthogonality_loss"] = self.config.orthogonality_loss * losses.orthogonality_loss(self.weight)
        return terms

    def _observe(self, rows_TD: Tensor) -> dict[str, Tensor]:
        if not self.centre:
            return {}
        rows_TD = rows_TD.detach().float()
        return {"token_sum": rows_TD.sum(0), "token_count": rows_TD.new_tensor([float(len(rows_TD))])}

    def update(self, observations: dict[str, Tensor]) -> None:
        if "token_sum" not in observations:
            return
        mean_D = observations["token_sum"] / observations["token_count"].clamp_min(1)
        # A mean that was never set has no past to keep: the first observation is taken whole.
        momentum = self.config.centre_momentum if bool(self.token_mean_D.any()) else 0.0
        self.token_mean_D.mul_(momentum).add_(mean_D.to(self.token_mean_D), alpha=1.0 - momentum)


def slice_mask(num_experts: int, hidden_size: int) -> Tensor:
    """1 where a feature belongs to an expert's slice, fp32 [E, D].

    The slices are contiguous and disjoint and cover all features; the first D mod E are one feature longer.
    """
    small, longer = divmod(hidden_size, num_experts)
    lengths = torch.tensor([small + (i < longer) for i in range(num_experts)])
    owner_D = torch.repeat_interleave(torch.arange(num_experts), lengths)
    return F.one_hot(owner_D, num_experts).t().float().contiguous()
