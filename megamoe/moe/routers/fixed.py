"""What routers share that learn nothing: K given experts per token, each with weight 1 / K."""

from __future__ import annotations

from torch import Tensor

from megamoe.moe.routers.base import Choice, Outcome, Router, Rows
from megamoe.moe.types import RoutingPlan
from megamoe.ops.precision import at_least_fp32


class FixedRouter(Router):
    """A router without parameters and scores: its logits are 0, and an expert over capacity drops the latest tokens.

    (Unless `moe.capacity.drop` is random: all affinities are equal, and ties go to the earlier token.)
    """

    def fixed_plan(self, rows_TD: Tensor, expert_ids_TK: Tensor, about: Rows) -> RoutingPlan:
        """The plan that sends each row of the micro-batch to the experts given, K different ones."""
        dtype = at_least_fp32(rows_TD[:0]).dtype
        weights_TK = rows_TD.new_full(expert_ids_TK.shape, 1.0 / self.top_k, dtype=dtype)
        logits_TE = rows_TD.new_zeros(len(expert_ids_TK), self.num_experts, dtype=dtype)
        outcome = Outcome(logits_TE, None, losses={}, observations={}, metrics={})
        return self.make_plan(Choice(expert_ids_TK, weights_TK, weights_TK), outcome, about)
