"""Dispatch to experts that are cut over ranks: around any other dispatcher, arrived rows go on to every part."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.all_to_all import experts_of
from megamoe.moe.dispatch.base import DEFAULT, Dispatcher
from megamoe.moe.dispatch.journey import Journey, Order, Splits, packed_width, travel
from megamoe.moe.types import Choices, DispatchHandle, RoutingPlan
from megamoe.parallel.axis import Axis
from megamoe.parallel.link import Link


class _Exchange(NamedTuple):
    """Rows leave by (destination rank, expert), all of them for each rank."""

    journey: Journey
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

    def __init__(self, inner: Dispatcher, etp: Axis, ops: OpsConfig = DEFAULT, layer: int = 0) -> None:
        if etp.group is None:
            raise ValueError("rows cannot reach the other parts of an expert without a process group")
        self.inner, self.etp, self.ops = inner, etp, ops
        self.link = Link(etp.group, layer, "etp")
        self.name = inner.name

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        rows_RD, rows_per_expert_L, inner = self.inner.dispatch(rows_TD, plan)
        to_all_PL = rows_per_expert_L.expand(self.etp.size, -1)
        received_PL = self.link.exchange(to_all_PL, None, None, "counts")
        receive = received_PL.sum(1).tolist()
        held, num_parts = receive[self.etp.rank], self.etp.size
        splits = Splits(self.link, [held] * num_parts, receive, self.ops)
        leave = to_everyone(held, num_parts, rows_RD.device)
        weights_RP = inner.weights_R[:held, None].expand(held, num_parts)
        choices = Choices(leave.place_NK, weights_RP, leave.place_NK, leave.source_M)
        num_local = len(rows_per_expert_L)
        arrival = travel(
            rows_RD[:held],
            choices,
            leave,
            splits,
            lambda weights_Q: (experts_of(received_PL, len(weights_Q)), num_local),
        )
        exchange = _Exchange(arrival.journey, len(rows_RD) - held, inner)
        sent_bytes = inner.sent_bytes + self._sent_bytes(splits, rows_RD, inner.weights_R, num_local)
        handle = inner._replace(weights_R=arrival.weights_R, state=exchange, sent_bytes=sent_bytes)
        return arrival.rows_RD, arrival.rows_per_expert_L, handle

    def combine(self, rows_RD: Tensor, handle: DispatchHandle) -> Tensor:
        exchange: _Exchange = handle.state
        whole_RD = exchange.journey.home(rows_RD)
        return self.inner.combine(F.pad(whole_RD, (0, 0, 0, exchange.num_padded)), exchange.inner)

    def _sent_bytes(self, splits: Splits, rows_RD: Tensor, weights_R: Tensor, num_local: int) -> int:
        """Rows with their weights to other ranks, partial results back to them, and the counts."""
        send, receive = splits.send or [0], splits.receive or [0]
        others, held, width = self.etp.size - 1, send[0], rows_RD.shape[1]
        there, back = others * held * (width + packed_width(rows_RD, weights_R)), (sum(receive) - held) * width
        return (there + back) * rows_RD.element_size() + others * num_local * 8


def to_everyone(num_rows: int, num_ranks: int, device: torch.device) -> Order:
    """Each of N rows to each of P ranks: copy p of row n is row p * N + n."""
    index = torch.arange(num_rows * num_ranks, dtype=torch.int32, device=device)
    return Order(index.view(num_ranks, num_rows).t().contiguous(), index.view(num_rows, num_ranks).t().flatten())
