"""Dispatch over an expert-parallel group on which a token travels once to each rank, and one result of it back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.base import DEFAULT, Dispatcher
from megamoe.moe.dispatch.broadcast import as_assignments
from megamoe.moe.dispatch.journey import Order
from megamoe.moe.dispatch.once import Leg, Load, travel_once
from megamoe.moe.types import DispatchHandle, RoutingPlan
from megamoe.ops.plan import plan_rows
from megamoe.ops.rows import permute_rows, unpermute_rows
from megamoe.parallel.link import Link


class _Journey(NamedTuple):
    """Of the rows of one layer."""

    legs: tuple[Leg, ...]
    """In the order of the way there."""
    arrive: Order
    """From the rows that arrived to the experts."""


class DeduplicatedDispatcher(Dispatcher):
    """Rank p of the group holds the experts p*L ... (p+1)*L - 1.

    A row goes once to each rank that has experts for it, with the list of these and its weights for them. There it is
    copied for each of them, and what they make of it is added up before it returns, in fp32 and rounded once; the rank
    of the token adds up what the ranks made of it. So a token costs as many rows as it reaches ranks, each way, however
    many experts: tokens that are broadcast too, which need no dispatcher of their own here.

    The numbers of rows go first, and the host waits for them once per leg.
    """

    name = "deduplicated"

    def __init__(self, link: Link, ops: OpsConfig = DEFAULT) -> None:
        self.stops: tuple[tuple[Link, str], ...] = ((link, ""),)
        self.ops = ops

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        load, legs = self.numbered(load_of(rows_TD, plan)), []
        for link, where in self.stops:
            load, leg = travel_once(load, link, self.ops, where)
            legs.append(leg)
        arrive, entries_R, rows_per_expert_L = self._arrive(load)
        rows_RD = permute_rows(load.rows_ND, arrive.source_M, arrive.place_NK, implementation=self.ops.rows)
        weights_R = load.weights_A.index_select(0, entries_R)
        sent_bytes = sum(leg.sent_bytes for leg in legs)
        handle = DispatchHandle(weights_R, plan, len(rows_TD), _Journey(tuple(legs), arrive), sent_bytes)
        return rows_RD, rows_per_expert_L, handle

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        journey: _Journey = handle.state
        arrive = journey.arrive
        rows = unpermute_rows(rows_RD, arrive.place_NK, arrive.source_M, implementation=self.ops.rows)
        for leg in reversed(journey.legs):
            rows = leg.home(rows)
        return rows

    def numbered(self, load: Load) -> Load:
        """The load with experts numbered in the order in which the stops divide them among ranks."""
        return load

    def sources(self, load: Load) -> Tensor | None:
        """Place in the group of each source of an arrived load, int64 [S]; None: ascending."""
        return None

    def _arrive(self, load: Load) -> tuple[Order, Tensor, Tensor]:
        """From rows to experts; the entry that each row at the experts is of, int64 [R]; and rows of each expert."""
        order_B, experts_B = None, load.experts_A
        if (places_S := self.sources(load)) is not None:
            places_N = torch.repeat_interleave(places_S, load.rows_per_source_S, output_size=len(load.rows_ND))
            order_B = torch.argsort(places_N[load.row_A], stable=True)
            experts_B = experts_B[order_B]
        planned = plan_rows(experts_B[:, None], load.num_experts, implementation=self.ops.plan)
        entries_R = planned.source_R.long()
        if order_B is not None:
            entries_R = order_B[entries_R]
        width, index_B = max(1, load.widest), torch.arange(len(experts_B), device=experts_B.device)
        slots_B = index_B - torch.searchsorted(load.row_A, load.row_A)  # number of an entry among those of its row
        source_R = (load.row_A * width + slots_B)[entries_R]
        place_NW = source_R.new_full((len(load.rows_ND), width), -1, dtype=torch.int32)
        place_NW.view(-1)[source_R] = index_B.int()
        return Order(place_NW, source_R.int()), entries_R, planned.rows_per_expert_E


def load_of(rows_TD: Tensor, plan: RoutingPlan) -> Load:
    """The rows of a plan, with an entry for each choice, or where it has none for each assignment."""
    if plan.choices is not None and plan.broadcast is None:
        experts_TK = plan.choices.experts_TK
        row_A = torch.arange(experts_TK.numel(), device=experts_TK.device) // experts_TK.shape[1]
        experts_A, weights_A = experts_TK.reshape(-1).long(), plan.choices.weights_TK.reshape(-1)
    else:
        if plan.broadcast is not None:
            plan = as_assignments(plan)
        row_A, order_A = torch.sort(plan.token_ids_A, stable=True)
        experts_A, weights_A = plan.expert_ids_A[order_A], plan.weights_A.index_select(0, order_A)
    rows_per_source_S = torch.full((1,), len(rows_TD), device=rows_TD.device)
    return Load(rows_TD, row_A, experts_A, weights_A, len(plan.rows_per_expert_E), rows_per_source_S)
