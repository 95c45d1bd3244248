"""What every router is, and the steps they share: expert choice, the plan's order, losses and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megamoe.config.moe import CapacityConfig
from megamoe.config.ops import OpsConfig
from megamoe.config.routers import AuxiliaryLosses
from megamoe.moe import losses, stats
from megamoe.moe.bounds import Limits, build_bound
from megamoe.moe.capacity import keep_within
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.stats import Metrics
from megamoe.moe.types import RoutingPlan


class RouterSize(NamedTuple):
    """What a router is built for."""

    hidden_size: int
    num_experts: int
    top_k: int
    vocab_size: int = 0
    """Needed by routers that look at the token itself (hash)."""
    ops: OpsConfig = OpsConfig()
    """Which implementations to compute with."""
    layer: int = 0
    """Number of the block, so that random drops differ between blocks."""


class Choice(NamedTuple):
    """What the tokens want, before any expert has a say."""

    expert_ids_TK: Tensor
    """int64 [T, K], by the token's preference."""
    weights_TK: Tensor
    """fp32 [T, K]: gate weights, differentiable."""
    affinity_TK: Tensor
    """fp32 [T, K]: what an expert over capacity compares."""
    token_ids_T: Tensor | None = None
    """int64 [T]: vocabulary entries; random drops follow from them, so that they differ from batch to batch."""


class Outcome(NamedTuple):
    """What a router computed besides the choice; goes into the plan as it is."""

    logits_TE: Tensor
    losses: dict[str, Tensor]
    observations: dict[str, Tensor]
    metrics: Metrics


class Router(nn.Module, ABC):
    """Maps rows [T, D] to a :class:`RoutingPlan`, as a pure function of rows, parameters and running statistics.

    Running statistics are fp32 buffers. `forward` only observes (`plan.observations`); the training step sums the
    observations over micro-batches and ranks and calls `update` once per optimizer step, so recomputation and
    evaluation cannot move them.

    Expert choice (capacity, threshold) looks across the batch and at later positions, so it is neither causal nor
    independent of the batch; it therefore shapes training only, and evaluation is dropless.

    Args:
        size: the model around it.
        capacity: how many tokens an expert may keep.
        ep: where the experts are; for what a router knows about nodes and for choices across ranks.
    """

    def __init__(self, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE) -> None:
        super().__init__()
        self.hidden_size, self.num_experts, self.top_k = size.hidden_size, size.num_experts, size.top_k
        self.capacity, self.ep, self.layer = capacity, ep, size.layer
        self.bound = build_bound(capacity, size.num_experts, size.top_k, size.hidden_size)
        on_node = ep.on_node(size.num_experts)
        self.all_on_node = all(on_node)
        self.register_buffer("on_node_E", torch.tensor(on_node), persistent=False)

    on_node_E: Tensor

    @abstractmethod
    def forward(self, rows_TD: Tensor, token_ids_T: Tensor | None = None) -> RoutingPlan:
        """The plan of T rows; `token_ids_T` int64 are their vocabulary entries, for routers that want them."""

    def update(self, observations: dict[str, Tensor]) -> None:
        """Move the running statistics by one optimizer step.

        Args:
            observations: the sums over the whole global batch, on the host, named as in `plan.observations`.
        """
        if self.bound is not None:
            self.bound.update(observations)

    def remarks(self) -> list[str]:
        """What a user should know about these settings, said once at start."""
        return []

    def limits(self, num_tokens: int) -> Limits | None:
        """What expert choice may keep of a micro-batch of T rows; None: everything."""
        if self.bound is None or not self.training:
            return None
        return self.bound.limits(num_tokens, self.on_node_E.device)

    def make_plan(self, choice: Choice, outcome: Outcome, threshold: float = 1.0) -> RoutingPlan:
        """The plan of the tokens' choices after expert choice.

        Args:
            threshold: tau of :func:`keep_within`, applied in training only.
        """
        num_tokens, top_k = choice.expert_ids_TK.shape
        experts_A, weights_A = choice.expert_ids_TK.reshape(-1), choice.weights_TK.reshape(-1)
        tokens_A = torch.arange(num_tokens * top_k, device=experts_A.device) // top_k
        limits, threshold = self.limits(num_tokens), threshold if self.training else 1.0
        if limits is not None or threshold < 1.0:
            # On a GPU the one place where the host waits, for their number.
            kept = self.keep(choice, limits, threshold).nonzero().squeeze(-1)
            experts_A, weights_A, tokens_A = experts_A[kept], weights_A[kept], tokens_A[kept]
        return self.assemble(tokens_A, experts_A, weights_A, outcome, num_tokens, limits)

    def keep(self, choice: Choice, limits: Limits | None, threshold: float) -> Tensor:
        """Which choices the experts keep: bool [T * K]."""
        return keep_within(
            choice.affinity_TK.detach().reshape(-1),
            choice.expert_ids_TK.reshape(-1),
            self.num_experts,
            capacity_E=limits.per_expert_E if limits is not None else None,
            threshold=threshold,
            drop=self.capacity.drop,
            seed=self._seed(choice.token_ids_T) if self.capacity.drop == "random" else 0,
        )

    def _seed(self, token_ids_T: Tensor | None) -> Tensor | int:
        """Of this micro-batch in this block: from its tokens, so the same on every layout and when recomputed."""
        return self.layer + 1 if token_ids_T is None else token_ids_T.sum() + self.layer + 1

    def assemble(
        self,
        tokens_A: Tensor,
        experts_A: Tensor,
        weights_A: Tensor,
        outcome: Outcome,
        num_tokens: int,
        limits: Limits | None,
    ) -> RoutingPlan:
        """Put assignments, which come in the order of their tokens (per expert), into the plan's order; describe it."""
        experts_A, order_A = torch.sort(experts_A, stable=True)
        tokens_A, rows_per_expert_E = tokens_A[order_A], count(experts_A, self.num_experts)
        on_node_E = None if self.all_on_node else self.on_node_E
        metrics = stats.dispatch_metrics(rows_per_expert_E, tokens_A, num_tokens, self.top_k, on_node_E)
        if limits is not None and self.bound is not None:
            metrics["capacity"] = (limits.per_expert_E.float(), "mean")
            metrics |= {name: (value, "mean") for name, value in self.bound.metrics().items()}
        return RoutingPlan(
            token_ids_A=tokens_A,
            expert_ids_A=experts_A,
            weights_A=weights_A[order_A],
            rows_per_expert_E=rows_per_expert_E,
            logits_TE=outcome.logits_TE,
            losses=outcome.losses,
            observations=outcome.observations,
            metrics=outcome.metrics | metrics,
            capacity=limits.slots if limits is not None else None,
        )


def auxiliary_losses(
    config: AuxiliaryLosses, probs_TE: Tensor, logits_TE: Tensor, chosen_per_expert_E: Tensor
) -> dict[str, Tensor]:
    """The losses every router may have, multiplied by their coefficients; those with coefficient 0 are left out."""
    terms = {}
    if config.balance_loss:
        terms["balance_loss"] = config.balance_loss * losses.balance_loss(probs_TE, chosen_per_expert_E)
    if config.z_loss:
        terms["z_loss"] = config.z_loss * losses.z_loss(logits_TE)
    return terms


def normalised(weights_TK: Tensor) -> Tensor:
    """Each token's weights divided by their sum; zeros stay zeros."""
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)


def count(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs, int64 [E]."""
    flat = expert_ids.reshape(-1)
    return torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
