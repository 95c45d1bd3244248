"""What every dispatcher is, and how rows stand before they leave and after they came home."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.config.ops import OpsConfig
from megamoe.moe.types import Choices, DispatchHandle, RoutingPlan
from megamoe.ops.rows import gather_rows, sum_rows

DEFAULT = OpsConfig()
"""The fastest implementations there are."""

Work = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What experts do: rows [R, D] grouped by expert, their gate weights [R] and the rows of each expert to rows [R, D]."""
Beside = Callable[[], Tensor]
"""Work on this rank that needs nothing of the exchange."""


class Passage(NamedTuple):
    """Rows that went through their experts."""

    out_TD: Tensor
    beside: Tensor | None
    """What the work beside it gave."""
    sent_bytes: int
    """As in :class:`megamoe.moe.types.DispatchHandle`."""


class Dispatcher(ABC):
    """Brings rows to their experts and their results home. Holds no state between calls but memory.

    The backward pass of `dispatch` is `combine` and the other way round. With identity experts that only multiply by
    the gate weight, combine(dispatch(x)) is x times the sum of its weights, and no result depends on the dispatcher
    beyond the order of additions.
    """

    name: str

    @abstractmethod
    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        """Send each assignment's row to the rank that holds its expert.

        Returns:
            rows_RD: received rows, grouped by local expert, inside a group by source rank and then by token; those
                from the sum of `rows_per_expert_L` on are nobody's.
            rows_per_expert_L: int64 [L], summing to R or less; or [L, P] by source rank, for experts who ask for that.
            handle: for `combine`; carries the gate weights of the received rows.
        """

    @abstractmethod
    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        """Bring the experts' rows home and add them up per token: [T, D]. Weights were applied by the experts."""

    def through(self, rows_TD: Tensor, plan: RoutingPlan, experts: Work, beside: Beside | None = None) -> Passage:
        """Rows to their experts, through them, and home. Who can do these at the same time does it here.

        Args:
            beside: done before the way home, so that a recomputed pass has all that the gradients need without it.
        """
        rows_RD, rows_per_expert_L, handle = self.dispatch(rows_TD, plan)
        out_RD = experts(rows_RD, handle.weights_R, rows_per_expert_L)
        shared = None if beside is None else beside()
        return Passage(self.combine(out_RD, handle), shared, handle.sent_bytes)


def leaving(rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Choices]:
    """Rows and the choices of each: the plan's own, or each assignment as a row with a single choice."""
    if plan.choices is not None:
        return rows_TD, plan.choices
    source_A = torch.arange(len(plan.token_ids_A), dtype=torch.int32, device=rows_TD.device)
    choices = Choices(plan.expert_ids_A[:, None], plan.weights_A[:, None], source_A[:, None], source_A)
    return gather_rows(rows_TD, plan.token_ids_A), choices


def at_home(rows: Tensor, handle: DispatchHandle) -> Tensor:
    """Results [T, D], from those of the rows that `leaving` gave."""
    if handle.plan.choices is not None:
        return rows
    return sum_rows(rows, handle.plan.token_ids_A, handle.num_rows)
