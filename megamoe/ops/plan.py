"""Op `plan`: which choices of an expert are kept, and the row that each kept one gets, ordered by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.ops.kernels import unavailable
from megamoe.ops.registry import Implementation, Op

LARGEST_ON_GPU = 1024
"""Experts that the compiled op counts there."""


class Plan(NamedTuple):
    """Where the rows of an expert layer come from and where each choice went. Nobody and nowhere are -1.

    Attributes:
        place_TK: int32 [T, K], the row of a token's k-th choice.
        source_R: int32 [R], the choice t * K + k that a row holds.
        rows_per_expert_E: int64 [E].
    """

    place_TK: Tensor
    source_R: Tensor
    rows_per_expert_E: Tensor


Planner = Callable[[Tensor, int, Tensor | None, Tensor | None, int, int], Plan]


def reference(
    experts_TK: Tensor,
    num_experts: int,
    keys_TK: Tensor | None = None,
    capacity_E: Tensor | None = None,
    slots: int = 0,
    max_rows: int = 0,
) -> Plan:
    """The specification.

    Rows are ordered by expert, and for each expert by token and choice, not by key. All results are exact, so every
    implementation gives the same.

    Args:
        experts_TK: int64 or int32 [T, K]; a value outside [0, num_experts) is nobody's choice.
        keys_TK: fp32 or int32 [T, K], what an expert prefers when it cannot keep all: higher first, ties: lower
            t * K + k first, NaN is the highest, -0 equals +0. None: order of arrival.
        capacity_E: int64 [E], at most this many rows of each expert; None: no bound.
        slots: C > 0: expert e has rows e * C to e * C + C - 1 and fills them from the first, so R = E * C. 0: rows
            without gaps, R = T * K or `max_rows`.
        max_rows: R > 0 without slots; what would lie at or beyond R has no row and is not counted.

    Returns:
        See :class:`Plan`.
    """
    assert slots == 0 or max_rows == 0, "slots have R = E * C rows"
    nobody, choices = num_experts, experts_TK.numel()
    expert_A = experts_TK.reshape(-1).long()
    expert_A = torch.where((expert_A < 0) | (expert_A >= num_experts), nobody, expert_A)
    limit_E = _limits(expert_A, num_experts, capacity_E, slots)
    if keys_TK is not None and (slots or capacity_E is not None):
        by_key_A = torch.sort(keys_TK.reshape(-1), descending=True, stable=True).indices
        expert_A = torch.where(_rank(expert_A, num_experts, by_key_A) < limit_E[expert_A], expert_A, nobody)

    rows = num_experts * slots if slots else max_rows or choices
    rank_A = _rank(expert_A, num_experts)
    kept_E = _count(expert_A, num_experts).minimum(limit_E)
    first_E = torch.arange(num_experts + 1, device=kept_E.device) * slots if slots else kept_E.cumsum(0) - kept_E
    row_A = torch.where(rank_A < limit_E[expert_A], first_E[expert_A] + rank_A, rows).clamp_max(rows)
    source_R = torch.full((rows + 1,), -1, dtype=torch.int32, device=row_A.device)  # the last for all without a row
    source_R[row_A] = torch.arange(choices, dtype=torch.int32, device=row_A.device)
    place_TK = torch.where(row_A < rows, row_A, -1).to(torch.int32).view_as(experts_TK)
    return Plan(place_TK, source_R[:rows], (rows - first_E).clamp_min(0).minimum(kept_E)[:num_experts])


def _limits(expert_A: Tensor, num_experts: int, capacity_E: Tensor | None, slots: int) -> Tensor:
    """How many rows each expert may have, nobody (the last) none."""
    limit_E = torch.full((num_experts + 1,), slots or len(expert_A), device=expert_A.device)
    limit_E[num_experts] = 0
    if capacity_E is not None:
        limit_E[:num_experts] = limit_E[:num_experts].minimum(capacity_E.clamp_min(0))
    return limit_E


def _rank(expert_A: Tensor, num_experts: int, order_A: Tensor | None = None) -> Tensor:
    """How many choices of the same expert come before each one, in the order given or that of arrival."""
    if order_A is None:
        by_expert_A = torch.sort(expert_A, stable=True).indices
    else:
        by_expert_A = order_A[torch.sort(expert_A[order_A], stable=True).indices]
    counts_E = _count(expert_A, num_experts)
    start_E = counts_E.cumsum(0) - counts_E
    rank_A = torch.empty_like(expert_A)
    rank_A[by_expert_A] = torch.arange(len(expert_A), device=expert_A.device) - start_E[expert_A[by_expert_A]]
    return rank_A


def _count(expert_A: Tensor, num_experts: int) -> Tensor:
    """Choices of each expert, and of nobody in the last."""
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_A.device)
    return counts_E.scatter_add_(0, expert_A, torch.ones_like(expert_A))


def kernels(
    experts_TK: Tensor,
    num_experts: int,
    keys_TK: Tensor | None = None,
    capacity_E: Tensor | None = None,
    slots: int = 0,
    max_rows: int = 0,
) -> Plan:
    """As :func:`reference`, compiled: a counting sort without a wait of the host."""
    keys_TK = None if keys_TK is None else keys_TK.detach().contiguous()
    planned = torch.ops.megamoe.plan(experts_TK.contiguous(), num_experts, keys_TK, capacity_E, slots, max_rows)
    return Plan(*planned)


def _not_built(device: torch.device, dtype: torch.dtype) -> str:
    return unavailable("plan", device, dtype)


PLAN: Op[Planner] = Op(
    "plan",
    Implementation("kernels", kernels, _not_built),
    Implementation("reference", reference),
)


def _compiled_takes(num_experts: int, keys_TK: Tensor | None, device: torch.device) -> bool:
    """A GPU's blocks count the rows of all experts in the memory that they share; keys of a proof in fp64 are wider."""
    if device.type == "cuda" and num_experts > LARGEST_ON_GPU:
        return False
    return keys_TK is None or keys_TK.dtype in (torch.float32, torch.int32)


def plan_rows(
    experts_TK: Tensor,
    num_experts: int,
    keys_TK: Tensor | None = None,
    capacity_E: Tensor | None = None,
    slots: int = 0,
    max_rows: int = 0,
    *,
    implementation: str = "auto",
) -> Plan:
    """Which choices are kept and where their rows lie; arguments as in :func:`reference`.

    Raises:
        KernelUnavailable: `implementation` names one that cannot run here.
    """
    if implementation == "auto" and not _compiled_takes(num_experts, keys_TK, experts_TK.device):
        implementation = "reference"
    run = PLAN.choose(implementation, experts_TK.device, torch.float32).function
    return run(experts_TK, num_experts, keys_TK, capacity_E, slots, max_rows)
