"""What every router is, and the steps they share: expert choice, the plan's order, losses and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megamoe.config.moe import BroadcastConfig, CapacityConfig
from megamoe.config.ops import OpsConfig
from megamoe.config.routers import AuxiliaryLosses
from megamoe.moe import losses, stats
from megamoe.moe.bounds import Limits, build_bound
from megamoe.moe.broadcast import Broadcast, Decision
from megamoe.moe.capacity import keep_within
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.spread import Spread
from megamoe.moe.stats import Metrics
from megamoe.moe.types import BroadcastRows, Choices, RoutingPlan
from megamoe.ops.plan import plan_rows
from megamoe.ops.row_softmax import row_softmax


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
    broadcast: BroadcastConfig | None = None
    """Whether uncertain tokens go to all experts in training."""


class Rows(NamedTuple):
    """What a router may know about its rows besides their features."""

    token_ids_T: Tensor | None = None
    """int64 [T]: vocabulary entries."""
    sequences_T: Tensor | None = None
    """int64 [T]: number of each row's sequence; negative: padding. None: all rows are one sequence."""
    size: int | None = None
    """Rows of the micro-batch with its padding, equal on all ranks: what a capacity is a share of. None: T."""
    spread: Spread | None = None
    """Where the rows of the router's input are a part of the micro-batch: which one. All other fields are of the whole
    micro-batch. None: it is whole."""

    def whole(self, rows: Tensor) -> Tensor:
        """Values [T, ...] of the input's rows to those of all rows of the micro-batch."""
        return rows if self.spread is None else self.spread.whole(rows)

    def own(self, rows: Tensor) -> Tensor:
        """Of values [T, ...] of all rows of the micro-batch those of the input's rows that are not padding."""
        return rows if self.spread is None else rows[self.spread.own(rows.device)[0]]

    def share(self) -> float:
        """Part of a sum over the whole micro-batch that one of its ranks counts, so that their sum is right."""
        return 1.0 if self.spread is None else 1.0 / self.spread.axis.size


NOTHING = Rows()


class Choice(NamedTuple):
    """What the tokens want, before any expert has a say."""

    expert_ids_TK: Tensor
    """int64 [T, K], by the token's preference."""
    weights_TK: Tensor
    """fp32 [T, K]: gate weights, differentiable."""
    affinity_TK: Tensor
    """fp32 [T, K]: what an expert over capacity compares."""


class Outcome(NamedTuple):
    """What a router computed besides the choice."""

    logits_TE: Tensor
    probs_TE: Tensor | None
    """[T, E]: each token's distribution over all experts, differentiable; None for a router without scores."""
    losses: dict[str, Tensor]
    observations: dict[str, Tensor]
    metrics: Metrics


class Assigned(NamedTuple):
    """Assignments in the plan's order. Fields as in :class:`RoutingPlan`."""

    token_ids_A: Tensor
    expert_ids_A: Tensor
    weights_A: Tensor
    rows_per_expert_E: Tensor
    choices: Choices | None = None


class Broadcasting(NamedTuple):
    """What is broadcast of a micro-batch."""

    decision: Decision
    rows: BroadcastRows


class Router(nn.Module, ABC):
    """Maps rows [T, D] to a :class:`RoutingPlan`, as a pure function of rows, parameters and running statistics.

    Where a micro-batch is spread over ranks (`Rows.spread`), each rank scores its own rows, all ranks decide on the
    scores of the whole micro-batch, and the plan is that of the own rows. Losses and metrics are of the whole
    micro-batch, their gradients those of the own rows, observations this rank's share.

    Running statistics are fp32 buffers. `forward` only observes (`plan.observations`); the training step sums the
    observations over micro-batches and ranks and calls `update` once per optimizer step, so recomputation and
    evaluation cannot move them.

    With `broadcast`, uncertain tokens are taken out of their choice before the experts have a say: they use no
    capacity, are never dropped and do not change what an expert keeps of the others.

    Expert choice (capacity, threshold) looks across the batch and at later positions, so it is neither causal nor
    independent of the batch; it therefore shapes training only, and evaluation is dropless.

    Args:
        size: the model around it.
        capacity: how many tokens an expert may keep.
        ep: where the experts are; for what a router knows about nodes and for choices across ranks.

    Attributes:
        frozen: running statistics of the scores do not move, as the parameters do not; a capacity's estimate does.
    """

    frozen: bool = False

    def __init__(self, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE) -> None:
        super().__init__()
        self.hidden_size, self.num_experts, self.top_k = size.hidden_size, size.num_experts, size.top_k
        self.capacity, self.ep, self.layer, self.ops = capacity, ep, size.layer, size.ops
        self.broadcast = (
            Broadcast(size.broadcast, size.num_experts, size.layer, size.ops.plan)
            if size.broadcast is not None
            else None
        )
        self.bound = build_bound(capacity, size.num_experts, size.top_k, size.hidden_size)
        on_node = ep.on_node(size.num_experts)
        self.all_on_node = all(on_node)
        self.register_buffer("on_node_E", torch.tensor(on_node), persistent=False)

    on_node_E: Tensor

    @abstractmethod
    def forward(self, rows_TD: Tensor, about: Rows = NOTHING) -> RoutingPlan:
        """The plan of T rows."""

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        """Each token's distribution over all experts, fp32 [T, E], from the plan's logits."""
        return row_softmax(logits_TE)

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

    def make_plan(self, choice: Choice, outcome: Outcome, about: Rows, threshold: float = 1.0) -> RoutingPlan:
        """The plan of the tokens' choices after expert choice. The host waits for nothing.

        Args:
            threshold: tau of :func:`keep_within`, applied in training only.
        """
        num_tokens = len(choice.expert_ids_TK)
        limits, threshold = self.limits(about.size or num_tokens), threshold if self.training else 1.0
        decision = self.decide(outcome, about)
        broadcast = self.broadcast_rows(decision, outcome, choice.weights_TK)
        # A choice that comes to nothing goes to expert number E, which there is not.
        if decision is not None:
            nobody_TK = choice.expert_ids_TK.masked_fill(decision.chosen_T[:, None], self.num_experts)
            choice = choice._replace(expert_ids_TK=nobody_TK)
        if limits is not None or threshold < 1.0:
            dropped_TK = ~self.keep(choice, limits, threshold, about).view_as(choice.expert_ids_TK)
            choice = choice._replace(expert_ids_TK=choice.expert_ids_TK.masked_fill(dropped_TK, self.num_experts))
        served_T = (choice.expert_ids_TK < self.num_experts).sum(1)
        rows_per_expert_E = count(choice.expert_ids_TK, self.num_experts + 1)[:-1]
        metrics = self.describe_plan(served_T, rows_per_expert_E, limits, broadcast)
        assigned = self._assign(choice, limits, about)
        return self.plan_of(assigned, outcome, metrics, limits, about, broadcast)

    def _assign(self, choice: Choice, limits: Limits | None, about: Rows) -> Assigned:
        """The assignments of this rank's tokens, in the plan's order."""
        experts_TK, weights_TK = choice.expert_ids_TK, choice.weights_TK
        if about.spread is not None:
            experts_TK, weights_TK = _own_choices(experts_TK, weights_TK, about.spread, self.num_experts)
        # With a capacity there may be fewer assignments than choices, and is no need of memory for all.
        most = 0
        if limits is not None and limits.slots is not None and about.spread is None:
            most = min(experts_TK.numel(), self.num_experts * limits.slots)
        place_TK, source_A, rows_per_expert_E = plan_rows(
            experts_TK, self.num_experts, max_rows=most, implementation=self.ops.plan
        )
        waits = waiting_costs(source_A.device)
        if not waits:
            source_A = source_A[: int(rows_per_expert_E.sum())]
        choices = Choices(experts_TK, weights_TK, place_TK, source_A)
        any_A = source_A.clamp_min(0).long()
        tokens_A, experts_A = any_A // experts_TK.shape[1], experts_TK.flatten()[any_A]
        weights_A = weights_TK.flatten()[any_A]
        if waits:
            nobody_A = source_A < 0
            experts_A, weights_A = (
                experts_A.masked_fill(nobody_A, self.num_experts),
                weights_A.masked_fill(nobody_A, 0.0),
            )
        return Assigned(tokens_A, experts_A, weights_A, rows_per_expert_E, choices)

    def keep(self, choice: Choice, limits: Limits | None, threshold: float, about: Rows) -> Tensor:
        """Which choices the experts keep: bool [T * K]. Choices of expert number E are nobody's and take no room."""
        capacity_E = None
        if limits is not None:
            capacity_E = torch.cat([limits.per_expert_E, limits.per_expert_E.new_zeros(1)])
        return keep_within(
            choice.affinity_TK.detach().reshape(-1),
            choice.expert_ids_TK.reshape(-1),
            self.num_experts + 1,
            capacity_E=capacity_E,
            threshold=threshold,
            drop=self.capacity.drop,
            seed=self.seed(about) if self.capacity.drop == "random" else 0,
            implementation=self.ops.plan,
        )

    def seed(self, about: Rows) -> Tensor | int:
        """Of this micro-batch in this block: from its tokens, so the same on every layout and when recomputed."""
        return self.layer + 1 if about.token_ids_T is None else about.token_ids_T.sum() + self.layer + 1

    def decide(self, outcome: Outcome, about: Rows) -> Decision | None:
        """Which tokens are broadcast; None: broadcasting is off."""
        if self.broadcast is None or not self.training:
            return None
        assert outcome.probs_TE is not None, "a configuration that broadcasts without scores is refused"
        return self.broadcast.decide(outcome.probs_TE, about.sequences_T, about.token_ids_T)

    def broadcast_rows(self, decision: Decision | None, outcome: Outcome, weights_TK: Tensor) -> Broadcasting | None:
        """The rows that were decided on."""
        if decision is None or self.broadcast is None or outcome.probs_TE is None:
            return None
        return Broadcasting(decision, self.broadcast.rows(decision, outcome.probs_TE, weights_TK))

    def describe_plan(
        self,
        served_T: Tensor,
        rows_per_expert_E: Tensor,
        limits: Limits | None,
        broadcast: Broadcasting | None,
    ) -> Metrics:
        """What to report of the assignments of a micro-batch.

        Args:
            served_T: int64, experts that took each token.
        """
        on_node_E = None if self.all_on_node else self.on_node_E
        taken_T, taken_E, metrics = None, rows_per_expert_E, Metrics()
        if broadcast is not None and self.broadcast is not None:
            taken_T = broadcast.decision.chosen_T
            taken_E = rows_per_expert_E + (broadcast.rows.weights_UE != 0).sum(0)
            metrics = self.broadcast.metrics(broadcast.decision, served_T, self.top_k)
        metrics |= stats.dispatch_metrics(taken_E, served_T, self.top_k, on_node_E, taken_T)
        if limits is not None and self.bound is not None:
            metrics["capacity"] = (limits.per_expert_E.float(), "mean")
            metrics |= {name: (value, "mean") for name, value in self.bound.metrics().items()}
        return metrics

    def plan_of(
        self,
        assigned: Assigned,
        outcome: Outcome,
        metrics: Metrics,
        limits: Limits | None,
        about: Rows,
        broadcast: Broadcasting | None,
    ) -> RoutingPlan:
        """The plan of these assignments, which are this rank's."""
        plan = RoutingPlan(
            assigned.token_ids_A,
            assigned.expert_ids_A,
            assigned.weights_A,
            assigned.rows_per_expert_E,
            logits_TE=outcome.logits_TE,
            losses=outcome.losses,
            observations=outcome.observations,
            metrics=outcome.metrics | metrics,
            capacity=limits.slots if limits is not None else None,
            broadcast=broadcast.rows if broadcast is not None else None,
            choices=assigned.choices,
        )
        return plan if about.spread is None else _own_rest(plan, about.spread)


def waiting_costs(device: torch.device) -> bool:
    """Whether the host stands still until it has a number from the device."""
    return device.type != "cpu"


def own_assignments(assigned: Assigned, spread: Spread) -> Assigned:
    """Of the assignments of a whole micro-batch, which are not K choices of each token, those of this rank's rows."""
    place_T = _own_places(spread, assigned.token_ids_A.device)
    place_A = place_T[assigned.token_ids_A]
    kept = (place_A >= 0).nonzero().squeeze(-1)
    experts_A = assigned.expert_ids_A[kept]
    rows_per_expert_E = count(experts_A, len(assigned.rows_per_expert_E))
    return Assigned(place_A[kept], experts_A, assigned.weights_A[kept], rows_per_expert_E)


def _own_choices(experts_TK: Tensor, weights_TK: Tensor, spread: Spread, nobody: int) -> tuple[Tensor, Tensor]:
    """Of the choices of a whole micro-batch those of this rank's rows; its padding chooses nobody."""
    own_T, local_T = spread.own(experts_TK.device)
    experts_TK, weights_TK = experts_TK[own_T], weights_TK[own_T]
    if local_T is None:
        return experts_TK, weights_TK
    shape = spread.batch * spread.length, experts_TK.shape[1]
    experts_TK = experts_TK.new_full(shape, nobody).index_copy_(0, local_T, experts_TK)
    return experts_TK, weights_TK.new_zeros(shape).index_copy(0, local_T, weights_TK)


def _own_rest(plan: RoutingPlan, spread: Spread) -> RoutingPlan:
    """A plan for a whole micro-batch, but for its assignments, as one for the rows of this rank."""
    own_T, _ = spread.own(plan.logits_TE.device)
    broadcast = plan.broadcast
    if broadcast is not None:
        place_U = _own_places(spread, own_T.device)[broadcast.token_ids_U]
        mine = (place_U >= 0).nonzero().squeeze(-1)
        broadcast = BroadcastRows(place_U[mine], broadcast.weights_UE[mine])
    # No capacity: that of the whole micro-batch does not bound this rank's part of it.
    return plan._replace(logits_TE=plan.logits_TE[own_T], broadcast=broadcast, capacity=None)


def _own_places(spread: Spread, device: torch.device) -> Tensor:
    """For every row of a micro-batch its place among this rank's rows, int64; -1: another's."""
    own_T, local_T = spread.own(device)
    place_T = torch.full((spread.num_rows,), -1, device=device)
    place_T[own_T] = torch.arange(len(own_T), device=device) if local_T is None else local_T
    return place_T


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
