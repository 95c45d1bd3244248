"""Dispatch of rows that go to many experts: around any other dispatcher, each row travels once to every rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.moe.dispatch.all_to_all import AllToAll
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.types import BroadcastRows, DispatchHandle, RoutingPlan
from megamoe.ops.rows import gather_rows, sum_rows
from megamoe.parallel.link import Link


class _Exchange(NamedTuple):
    """How broadcast rows travel. Rows leave by (destination rank, token) and arrive by (source rank, token)."""

    leaving_V: Tensor
    """int64 [V]: place among the U rows of each row that leaves."""
    send_splits: list[int]
    receive_splits: list[int]
    link: Link


class _Together(NamedTuple):
    """The rows of all local experts, assigned and broadcast ones. Sources are the R assigned rows as they arrived, then
    the G broadcast rows."""

    source_Q: Tensor
    """int64 [Q]: the source of each row that the experts work on, in their order."""
    num_assigned: int
    """R."""
    num_broadcast: int
    """G."""
    exchange: _Exchange
    inner: DispatchHandle


class BroadcastDispatcher(Dispatcher):
    """Assigned rows go the way of `inner`. A broadcast row goes once to each rank that holds one of its experts, with
    its weights for the experts there; these work on it side by side, and the sum of what they make of it travels back.

    Sent to each expert by itself it would cost L times as much, L experts on a rank. The numbers of rows go first, and
    the host waits for them, also around a dispatcher that otherwise needs neither. On one rank nothing travels, and the
    broadcast rows become ordinary assignments.
    """

    def __init__(self, inner: Dispatcher, link: Link | None) -> None:
        self.inner, self.link, self.num_ranks = inner, link, 1 if link is None else link.num_ranks
        self.name = inner.name

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        if plan.broadcast is None or self.link is None or self.num_ranks == 1:
            return self.inner.dispatch(rows_TD, as_assignments(plan))
        rows_RD, rows_per_expert_L, handle = self.inner.dispatch(rows_TD, plan)
        rows_GD, weights_GL, exchange, sent_bytes = _send(rows_TD, plan.broadcast, self.link)
        source_Q, weights_Q = merge_by_expert(rows_RD, rows_per_expert_L, handle.weights_R, weights_GL)
        together = _Together(source_Q, len(rows_RD), len(rows_GD), exchange, handle)
        taken_L = (weights_GL != 0).sum(0)
        merged = DispatchHandle(weights_Q, plan, len(rows_TD), together, handle.sent_bytes + sent_bytes)
        return gather_rows(torch.cat([rows_RD, rows_GD]), source_Q), rows_per_expert_L + taken_L, merged

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        if not isinstance(handle.state, _Together):
            return self.inner.combine(rows_RD, handle)
        together: _Together = handle.state
        broadcast = handle.plan.broadcast
        assert broadcast is not None
        # The sum over a rank's experts is formed here, before the way back.
        sources = sum_rows(rows_RD, together.source_Q, together.num_assigned + together.num_broadcast)
        assigned_RD, broadcast_GD = sources.split([together.num_assigned, together.num_broadcast])
        home_TD = self.inner.combine(assigned_RD, together.inner)
        exchange = together.exchange
        home_VD = AllToAll.apply(broadcast_GD, exchange.receive_splits, exchange.send_splits, exchange.link, "combine")
        return home_TD + sum_rows(home_VD, broadcast.token_ids_U[exchange.leaving_V], len(home_TD))


def _send(rows_TD: Tensor, broadcast: BroadcastRows, link: Link) -> tuple[Tensor, Tensor, _Exchange, int]:
    """Broadcast rows that arrive here [G, D], their weights for the experts here [G, L], and what was sent."""
    rows_UD = gather_rows(rows_TD, broadcast.token_ids_U)
    weights_UPL = broadcast.weights_UE.unflatten(1, (link.num_ranks, -1))
    wanted_PU = (weights_UPL != 0).any(-1).t()
    sent_P = wanted_PU.sum(1)
    received_P = link.exchange(sent_P, None, None, "counts")
    place = wanted_PU.nonzero()  # by rank, then by token
    exchange = _Exchange(place[:, 1], sent_P.tolist(), received_P.tolist(), link)
    weights_VL = weights_UPL[place[:, 1], place[:, 0]]
    splits = exchange.send_splits, exchange.receive_splits
    rows_GD = AllToAll.apply(gather_rows(rows_UD, exchange.leaving_V), *splits, link, "dispatch")
    weights_GL = AllToAll.apply(weights_VL, *splits, link, "dispatch")
    there, back = (sum(split) - split[link.rank] for split in splits)
    per_row = rows_TD.shape[1] * rows_TD.element_size()
    weights = there * weights_VL.shape[1] * weights_VL.element_size()
    return rows_GD, weights_GL, exchange, (there + back) * per_row + weights + (link.num_ranks - 1) * 8


def merge_by_expert(
    rows_RD: Tensor, rows_per_expert_L: Tensor, weights_R: Tensor, weights_GL: Tensor
) -> tuple[Tensor, Tensor]:
    """Order of all rows by expert: assigned ones, then broadcast ones; assigned rows that no expert has come last.

    Returns:
        source and gate weight of each row, [Q].
    """
    num_assigned = len(rows_RD)
    place_R = torch.arange(num_assigned, device=rows_RD.device)
    expert_R = torch.searchsorted(rows_per_expert_L.cumsum(0), place_R, right=True)
    pairs = (weights_GL.t() != 0).nonzero()  # by expert, then by row
    expert_Q = torch.cat([expert_R, pairs[:, 0]])
    source_Q = torch.cat([place_R, num_assigned + pairs[:, 1]])
    weights_Q = torch.cat([weights_R, weights_GL.t()[pairs[:, 0], pairs[:, 1]]])
    order_Q = torch.sort(expert_Q, stable=True).indices
    return source_Q[order_Q], weights_Q[order_Q]


def as_assignments(plan: RoutingPlan) -> RoutingPlan:
    """The same plan with an assignment for each expert that takes a broadcast row, in the plan's order."""
    plan, broadcast = plan.trimmed(), plan.broadcast
    if broadcast is None:
        return plan
    pairs = (broadcast.weights_UE.t() != 0).nonzero()  # by expert, then by row
    experts_A = torch.cat([plan.expert_ids_A, pairs[:, 0]])
    tokens_A = torch.cat([plan.token_ids_A, broadcast.token_ids_U[pairs[:, 1]]])
    weights_A = torch.cat([plan.weights_A, broadcast.weights_UE[pairs[:, 1], pairs[:, 0]]])
    order_A = torch.argsort(experts_A * (1 + tokens_A.max() if len(tokens_A) else 1) + tokens_A)
    return plan._replace(
        token_ids_A=tokens_A[order_A],
        expert_ids_A=experts_A[order_A],
        weights_A=weights_A[order_A],
        rows_per_expert_E=plan.rows_per_expert_E + (broadcast.weights_UE != 0).sum(0),
        capacity=None,
        broadcast=None,
        choices=None,
    )
