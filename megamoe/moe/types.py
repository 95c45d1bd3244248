"""What passes between the parts of an MoE layer. NamedTuples, because DeepSpeed's ZeRO-3 finds tensors inside them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

Reduction = Literal["mean", "max", "sum"]
"""How a metric is combined over micro-batches and ranks."""


class BroadcastRows(NamedTuple):
    """Rows that go to many experts at once, and so travel to a rank once and not to each of its experts."""

    token_ids_U: Tensor
    """int64 [U]: row of this rank, ascending."""
    weights_UE: Tensor
    """fp32 [U, E]: gate weights, differentiable; an expert with exactly 0 does not take the row."""


class Choices(NamedTuple):
    """A plan's assignments as K choices of each token, which have a shape that the host knows without waiting."""

    experts_TK: Tensor
    """int64 [T, K]: global expert of each choice; E: nobody's, because its expert dropped it."""
    weights_TK: Tensor
    """fp32 [T, K]: gate weights, differentiable; those of nobody's choices are not used."""
    place_TK: Tensor
    """int32 [T, K]: place of each choice among the assignments; -1: nobody's."""
    source_A: Tensor
    """int32 [A]: the choice t * K + k that each assignment is; -1: none."""


class RoutingPlan(NamedTuple):
    """Which rows go to which experts, with which weight. Made by a router, which changes nothing else.

    Ragged: plain top-k has A = T * K assignments, a bounded capacity drops some. Broadcast rows have none of them.
    The order is contract: by expert, then by token. Where the host would have to wait for the number of assignments (on
    a GPU), A is an upper bound of it: entries from the sum of `rows_per_expert_E` on are nobody's, of row 0 with
    weight 0. Who cannot use those takes `trimmed()`. Who changes assignments sets `choices` to None.
    """

    token_ids_A: Tensor
    """int64 [A]: row of this rank."""
    expert_ids_A: Tensor
    """int64 [A]: global expert, ascending; E: nobody's."""
    weights_A: Tensor
    """fp32 [A]: gate weight, differentiable."""
    rows_per_expert_E: Tensor
    """int64 [E]: number of assignments of each expert; sums to A or less."""
    logits_TE: Tensor
    """fp32 [T, E]: router logits. Where the rows are a part of a micro-batch with padding, those of real rows only."""
    losses: dict[str, Tensor]
    """Auxiliary losses, fp32 scalars, already multiplied by their coefficients."""
    observations: dict[str, Tensor]
    """Sums over this rank's rows that update the router's running statistics once per optimizer step."""
    metrics: dict[str, tuple[Tensor, Reduction]]
    """Values to report, each with its reduction."""
    capacity: int | None = None
    """At most so many rows of each expert, the same on all ranks of the expert-parallel group; None: not known."""
    broadcast: BroadcastRows | None = None
    """Rows besides the assignments, which go to many experts; None (on all ranks alike): there are never any."""
    choices: Choices | None = None
    """The same assignments by token; None: they are not K choices of each token."""

    def trimmed(self) -> RoutingPlan:
        """The plan without entries that are nobody's. The host waits for their number."""
        num_assigned = int(self.rows_per_expert_E.sum())
        if num_assigned == len(self.token_ids_A):
            return self
        choices = self.choices
        return self._replace(
            token_ids_A=self.token_ids_A[:num_assigned],
            expert_ids_A=self.expert_ids_A[:num_assigned],
            weights_A=self.weights_A[:num_assigned],
            choices=choices and choices._replace(source_A=choices.source_A[:num_assigned]),
        )


class LayerAux(NamedTuple):
    """What an MoE layer returns besides its output. Fields as in :class:`RoutingPlan`."""

    losses: dict[str, Tensor]
    observations: dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Reduction]]


class DispatchHandle(NamedTuple):
    """What `combine` needs to bring rows home. Opaque to everyone but the dispatcher that made it."""

    weights_R: Tensor
    """[R]: gate weight of each received row, differentiable; the experts apply it."""
    plan: RoutingPlan
    num_rows: int
    """T: rows of this rank."""
    state: Any = None
    """The dispatcher's own: splits and permutations."""
    sent_bytes: int = 0
    """What this rank sends to other ranks for this layer's forward pass, there and back; the backward pass again."""
