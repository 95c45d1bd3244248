"""Dispatch over an expert-parallel group by all-to-all with even splits: every expert gets its capacity of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
from megamoe.moe.dispatch.base import DEFAULT, Dispatcher, leaving
from megamoe.moe.dispatch.journey import EMPTY, Order, Splits, packed_width, travel
from megamoe.moe.types import DispatchHandle, RoutingPlan
from megamoe.ops.plan import plan_rows
from megamoe.parallel import collectives
from megamoe.parallel.link import Link


class PaddedDispatcher(Dispatcher):
    """Rank p of the group holds the experts p*L ... (p+1)*L - 1; every rank sends C = `plan.capacity` slots to each.

    All shapes follow from C, which the ranks agree on beforehand: no exchange of numbers, and the host waits for
    nothing. Which slots hold a row is seen from the gate weight that travels with it. The rows that experts work on,
    and their order, are those of the ragged exchange, so the results have the same bits. All ranks pass the same number
    of rows T. A plan without a capacity (evaluation) goes the ragged way.
    """

    name = "padded"

    def __init__(self, link: Link, ops: OpsConfig = DEFAULT) -> None:
        self.link, self.ops, self.num_ranks = link, ops, link.num_ranks
        self.ragged = AllToAllDispatcher(link, ops)
        self._agreed = False

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        if plan.capacity is None:
            return self.ragged.dispatch(rows_TD, plan)
        num_experts, capacity = len(plan.rows_per_expert_E), plan.capacity
        self._agree(capacity, plan.rows_per_expert_E)
        rows, choices = leaving(rows_TD, plan)
        place_TK, source_S, _ = plan_rows(choices.experts_TK, num_experts, slots=capacity, implementation=self.ops.plan)
        leave, splits = Order(place_TK, source_S), Splits(self.link, ops=self.ops)
        num_local = num_experts // self.num_ranks

        def by_expert(weights_S: Tensor) -> tuple[Tensor, int]:
            experts_L1 = torch.arange(num_local, device=weights_S.device)[:, None]
            experts_S = experts_L1.expand(self.num_ranks, num_local, capacity).flatten()
            return experts_S.masked_fill(weights_S == EMPTY, num_local), num_local

        arrival = travel(rows, choices, leave, splits, by_expert)
        width = rows_TD.shape[1] + packed_width(rows_TD, plan.weights_A)
        elsewhere = len(source_S) - len(source_S) // self.num_ranks
        sent_bytes = elsewhere * (width + rows_TD.shape[1]) * rows_TD.element_size()
        handle = DispatchHandle(arrival.weights_R, plan, rows_TD.shape[0], arrival.journey, sent_bytes)
        return arrival.rows_RD, arrival.rows_per_expert_L, handle

    def _agree(self, capacity: int, like: Tensor) -> None:
        """Compare C over the ranks, the first time only: different sizes would end every process without a reason.

        Raises:
            ValueError: the ranks do not agree.
        """
        if self._agreed:
            return
        sizes = collectives.all_gather(torch.tensor([capacity], device=like.device), self.link.group)
        found = [int(size) for size in sizes]
        if len(set(found)) > 1:
            raise ValueError(f"a padded exchange needs as many rows on every rank; capacities over ranks: {found}")
        self._agreed = True

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        return self.ragged.combine(rows_RD, handle)  # the way home follows from the way there
