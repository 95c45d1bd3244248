"""Expert choice: which of the tokens that chose an expert it keeps (ETR, arXiv 2406.00023, and the GShard baseline)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megamoe.moe.decisions import decided
from megamoe.ops.plan import plan_rows

Drop = Literal["affinity", "position", "random"]


def keep_within(
    affinity_A: Tensor,
    expert_ids_A: Tensor,
    num_experts: int,
    *,
    capacity_E: Tensor | None,
    threshold: float = 1.0,
    drop: Drop = "affinity",
    seed: Tensor | int = 0,
    implementation: str = "auto",
) -> Tensor:
    """Which candidates each expert keeps.

    Args:
        affinity_A: fp32 [A], affinity of each (token, expert) candidate, in token order.
        expert_ids_A: int64 [A], the expert of each candidate.
        capacity_E: int64 [E], at most this many of each expert; None: no bound.
        threshold: tau; keep only the fewest candidates whose positive affinities sum to tau times the expert's
            total. 1 is off. An expert without any positive affinity is not thresholded, so that all-negative
            affinities still fill the capacity (the paper gives neither a value nor this case).
        implementation: of the op `plan`.
        drop: over capacity, `affinity` drops the lowest affinity (ties: the later token), `position` the latest token,
            `random` any, decided by `seed` and the candidate's place. The threshold needs `affinity`.

    Returns:
        bool [A], without a gradient; in a recomputed pass that of the first one.
    """
    assert threshold == 1.0 or drop == "affinity", "the threshold is over the candidates of highest affinity"
    affinity_A = affinity_A.detach()

    def keep() -> Tensor:
        priority_A = _priority(affinity_A, drop, seed)
        if threshold == 1.0:
            return _kept(priority_A, expert_ids_A, num_experts, capacity_E, implementation)
        return _kept_of_total(affinity_A, expert_ids_A, num_experts, capacity_E, threshold)

    return decided(keep)


def _kept(
    priority_A: Tensor | None,
    expert_ids_A: Tensor,
    num_experts: int,
    capacity_E: Tensor | None,
    implementation: str,
) -> Tensor:
    keys_A1 = None if priority_A is None else priority_A[:, None]
    plan = plan_rows(expert_ids_A[:, None], num_experts, keys_A1, capacity_E, implementation=implementation)
    return plan.place_TK[:, 0] >= 0


def _kept_of_total(
    affinity_A: Tensor, expert_ids_A: Tensor, num_experts: int, capacity_E: Tensor | None, threshold: float
) -> Tensor:
    by_affinity = torch.sort(affinity_A, descending=True, stable=True).indices
    order_A = by_affinity[torch.sort(expert_ids_A[by_affinity], stable=True).indices]
    sorted_experts = expert_ids_A[order_A]
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=affinity_A.device)
    counts_E.scatter_add_(0, expert_ids_A, torch.ones_like(expert_ids_A))
    start_E = counts_E.cumsum(0) - counts_E
    kept_sorted = _within_threshold(affinity_A[order_A], sorted_experts, start_E, counts_E, threshold)
    if capacity_E is not None:
        place_A = torch.arange(len(order_A), device=affinity_A.device) - start_E[sorted_experts]
        kept_sorted &= place_A < capacity_E[sorted_experts]
    kept_A = torch.empty_like(kept_sorted)
    kept_A[order_A] = kept_sorted
    return kept_A


def _priority(affinity_A: Tensor, drop: Drop, seed: Tensor | int) -> Tensor | None:
    """What an expert prefers, higher first; None: the order of arrival."""
    if drop == "position":
        return None
    if drop == "affinity":
        return affinity_A
    # A hash and not a generator: the same choice when the pass is run again for its gradients, whatever ran between.
    place_A = (torch.arange(len(affinity_A), device=affinity_A.device) + seed * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        place_A = ((place_A ^ (place_A >> shift)) * factor) & 0xFFFFFFFF
    return ((place_A ^ (place_A >> 16)) - (1 << 31)).to(torch.int32)  # in the same order


def _within_threshold(affinity_A: Tensor, experts_A: Tensor, start_E: Tensor, counts_E: Tensor, tau: float) -> Tensor:
    """Candidates (sorted as above) whose predecessors' positive affinities do not yet sum to tau of the total."""
    # In float64: a cumulative sum over all experts is differenced, and fp32 would let one expert's sum blur another's.
    positive_A = affinity_A.detach().double().clamp_min(0)
    before_A = positive_A.cumsum(0) - positive_A
    total_E = torch.zeros(len(counts_E), dtype=torch.float64, device=affinity_A.device)
    total_E.scatter_add_(0, experts_A, positive_A)
    first_E = start_E.clamp_max(max(0, len(before_A) - 1))
    base_E = before_A[first_E] if len(before_A) else total_E
    within = before_A - base_E[experts_A] < tau * total_E[experts_A]
    return within | (total_E[experts_A] <= 0)
