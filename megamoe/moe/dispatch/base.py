"""What every dispatcher is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from megamoe.moe.types import DispatchHandle, RoutingPlan


class Dispatcher(ABC):
    """Brings rows to their experts and their results home. Holds no state between calls.

    The backward pass of `dispatch` is `combine` and the other way round. With identity experts that only multiply by
    the gate weight, combine(dispatch(x)) is x times the sum of its weights, and no result depends on the dispatcher
    beyond the order of additions.
    """

    name: str

    @abstractmethod
    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        """Send each assignment's row to the rank that holds its expert.

        Returns:
            rows_RD: received rows, grouped by local expert, inside a group by source rank and then by token.
            rows_per_expert_L: int64 [L], summing to R.
            handle: for `combine`; carries the gate weights of the received rows.
        """

    @abstractmethod
    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        """Bring the experts' rows home and add them up per token: [T, D]. Weights were applied by the experts."""
