"""Dispatch to experts that are cut over ranks: around any other dispatcher, arrived rows go on to every part."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.moe.dispatch.all_to_all import AllToAll, expert_order
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.types import DispatchHandle, RoutingPlan
from megamoe.ops.rows import gather_rows, sum_rows
from megamoe.parallel import collectives
from megamoe.parallel.axis import Axis


class _Exchange(NamedTuple):
    """One exchange as this rank sees it. Rows leave by (destination rank, expert), all of them for each rank."""

    send_splits: list[int]
    """As many rows for every rank, [P]."""
    receive_splits: list[int]
    """Rows from each rank, [P]."""
    expert_order_Q: Tensor
    """int64 [Q]: place in arrival order (source rank, expert, inner order) of each row in expert order."""
    num_padded: int
    """Rows that no expert has and that stayed here: the inner dispatcher's last."""
    inner: DispatchHandle


class ExpertTensorDispatcher(Dispatcher):
    """The P ranks of an expert-tensor group hold parts of the same L experts, cut along the feed-forward width, and
    receive different tokens: the inner dispatch runs over other groups, one for each part.

    What arrived at one of them therefore goes to all, each makes of the rows of all what its part can, and the source
    adds the P partial results up before `inner` brings them home. Rows come grouped by expert, inside a group by source
    rank and then in the inner order. The numbers of rows go first, and the host waits for them, also around a
    dispatcher that needs neither.
    """

    def __init__(self, inner: Dispatcher, etp: Axis) -> None:
        if etp.group is None:
            raise ValueError("rows cannot reach the other parts of an expert without a process group")
        self.inner, self.etp = inner, etp
        self.name = inner.name

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        rows_RD, rows_per_expert_L, inner = self.inner.dispatch(rows_TD, plan)
        received_PL = torch.stack(collectives.all_gather(rows_per_expert_L, self.etp.group))
        receive_splits = received_PL.sum(1).tolist()
        held = receive_splits[self.etp.rank]
        exchange = _Exchange(
            [held] * self.etp.size, receive_splits, expert_order(received_PL), len(rows_RD) - held, inner
        )
        rows_QD = self._to_every_part(rows_RD[:held], exchange)
        weights_Q = self._to_every_part(inner.weights_R[:held], exchange)
        sent_bytes = inner.sent_bytes + self._sent_bytes(exchange, rows_RD, inner.weights_R, rows_per_expert_L)
        handle = inner._replace(weights_R=weights_Q, state=exchange, sent_bytes=sent_bytes)
        return rows_QD, received_PL.sum(0), handle

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        exchange: _Exchange = handle.state
        arrival_QD = sum_rows(rows_RD, exchange.expert_order_Q, len(rows_RD))
        partial_QD = AllToAll.apply(arrival_QD, exchange.receive_splits, exchange.send_splits, self.etp.group)
        whole_RD = partial_QD.unflatten(0, (self.etp.size, exchange.send_splits[0])).sum(0)
        return self.inner.combine(F.pad(whole_RD, (0, 0, 0, exchange.num_padded)), exchange.inner)

    def _to_every_part(self, held: Tensor, exchange: _Exchange) -> Tensor:
        """Rows [R, D] or values [R] of all ranks of the group, in expert order. Backward: the sum over the parts."""
        sent = held.repeat(self.etp.size, *[1] * (held.dim() - 1))
        arrived = AllToAll.apply(sent, exchange.send_splits, exchange.receive_splits, self.etp.group)
        return gather_rows(arrived, exchange.expert_order_Q)

    def _sent_bytes(self, exchange: _Exchange, rows_RD: Tensor, weights_R: Tensor, rows_per_expert_L: Tensor) -> int:
        """Rows with their weights to other ranks, partial results back to them, and the counts."""
        others, held = self.etp.size - 1, exchange.send_splits[0]
        back = sum(exchange.receive_splits) - held
        rows = (others * held + back) * rows_RD.shape[1] * rows_RD.element_size()
        counts = len(rows_per_expert_L) * rows_per_expert_L.element_size()
        return rows + others * (held * weights_R.element_size() + counts)
