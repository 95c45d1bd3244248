"""What every router is, and the two steps they share: the plan from the choices, and the balance statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from megamoe.config.moe import CapacityConfig, ResonanceRouterConfig, TopKRouterConfig
from megamoe.moe import losses
from megamoe.moe.capacity import keep_within, static_capacity
from megamoe.moe.types import Reduction, RoutingPlan


class Router(nn.Module, ABC):
    """Maps rows [T, D] to a :class:`RoutingPlan`, as a pure function of rows, parameters and running statistics.

    Running statistics are fp32 buffers. `forward` only observes (`plan.observations`); the training step sums the
    observations over micro-batches and ranks and calls `update` once per optimizer step, so recomputation and
    evaluation cannot move them.
    """

    num_experts: int
    top_k: int
    capacity: CapacityConfig

    @abstractmethod
    def forward(self, rows_TD: Tensor) -> RoutingPlan: ...

    def update(self, observations: dict[str, Tensor]) -> None:
        """Move the running statistics by one optimizer step.

        Args:
            observations: the sums over the whole global batch, named as in `plan.observations`.
        """
        return None

    def capacity_for(self, num_tokens: int) -> int | None:
        """Rows an expert may keep of one micro-batch, or None for no bound. Evaluation is always dropless.

        Step 2 looks across the batch and at later positions, so it is neither causal nor independent of the batch;
        it therefore shapes training only.
        """
        if not self.training or self.capacity.mode == "dropless":
            return None
        return static_capacity(num_tokens, self.num_experts, self.top_k, self.capacity.factor)

    def make_plan(
        self,
        logits_TE: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        affinity_TK: Tensor,
        loss_terms: dict[str, Tensor],
        observations: dict[str, Tensor],
        metrics: dict[str, tuple[Tensor, Reduction]],
        threshold: float = 1.0,
    ) -> RoutingPlan:
        """The plan of the tokens' choices after expert choice (capacity and threshold).

        Args:
            logits_TE: fp32 [T, E]. expert_ids_TK, weights_TK, affinity_TK: [T, K], by the token's preference.
            threshold: tau of :func:`keep_within`, applied in training only.
        """
        num_tokens, top_k = expert_ids_TK.shape
        experts_A, weights_A = expert_ids_TK.reshape(-1), weights_TK.reshape(-1)
        tokens_A = torch.arange(num_tokens * top_k, device=logits_TE.device) // top_k
        capacity, threshold = self.capacity_for(num_tokens), threshold if self.training else 1.0
        if capacity is not None or threshold < 1.0:
            kept_A = keep_within(
                affinity_TK.detach().reshape(-1),
                experts_A,
                self.num_experts,
                capacity=capacity,
                threshold=threshold,
                drop=self.capacity.drop,
            )
            experts_A, weights_A, tokens_A = experts_A[kept_A], weights_A[kept_A], tokens_A[kept_A]
        experts_A, order_A = torch.sort(experts_A, stable=True)
        rows_per_expert_E = count(experts_A, self.num_experts)
        metrics |= dispatch_metrics(rows_per_expert_E, tokens_A, num_tokens, top_k)
        return RoutingPlan(
            token_ids_A=tokens_A[order_A],
            expert_ids_A=experts_A,
            weights_A=weights_A[order_A],
            rows_per_expert_E=rows_per_expert_E,
            logits_TE=logits_TE,
            losses=loss_terms,
            observations=observations,
            metrics=metrics,
        )


def auxiliary_losses(
    config: TopKRouterConfig | ResonanceRouterConfig,
    probs_TE: Tensor,
    logits_TE: Tensor,
    chosen_per_expert_E: Tensor,
) -> dict[str, Tensor]:
    """The losses every router may have, multiplied by their coefficients; those with coefficient 0 are left out."""
    terms = {}
    if config.balance_loss:
        terms["balance_loss"] = config.balance_loss * losses.balance_loss(probs_TE, chosen_per_expert_E)
    if config.z_loss:
        terms["z_loss"] = config.z_loss * losses.z_loss(logits_TE)
    return terms


def count(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs, int64 [E]."""
    flat = expert_ids.reshape(-1)
    return torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def dispatch_metrics(
    rows_per_expert_E: Tensor, token_ids_A: Tensor, num_tokens: int, top_k: int
) -> dict[str, tuple[Tensor, Reduction]]:
    """Load and losses of the plan: share of dropped choices, of tokens without any expert, the largest load."""
    chosen = max(1, num_tokens * top_k)
    served_T = torch.zeros(num_tokens, device=token_ids_A.device).index_fill_(0, token_ids_A, 1.0)
    load_E = rows_per_expert_E.float() * (len(rows_per_expert_E) / chosen)
    return {
        "drop_share": ((num_tokens * top_k - rows_per_expert_E.sum()) / chosen, "mean"),
        "unserved_share": ((num_tokens - served_T.sum()) / max(1, num_tokens), "mean"),
        "max_load": (load_E.max(), "max"),
        "load": (load_E, "mean"),
    }
