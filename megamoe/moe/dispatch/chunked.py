"""Dispatch in chunks of experts, so that the exchange of one is under way while another computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.all_to_all import experts_of
from megamoe.moe.dispatch.base import DEFAULT, Beside, Passage, Work, at_home, leaving
from megamoe.moe.dispatch.chunk_broadcast import Guests
from megamoe.moe.dispatch.chunk_journey import Part, Trip
from megamoe.moe.dispatch.journey import EMPTY, Order, Splits, packed_width
from megamoe.moe.dispatch.padded import PaddedDispatcher
from megamoe.moe.experts import Experts
from megamoe.moe.types import Choices, DispatchHandle, RoutingPlan
from megamoe.ops.expert_ffn_later import Chunks
from megamoe.ops.plan import plan_rows
from megamoe.parallel.link import Link


class ChunkedDispatcher(PaddedDispatcher):
    """As padded, or all_to_all, with the experts of each rank in n chunks, one after the other.

    The forward pass sends the rows of all chunks, does the work beside, and then for each chunk waits for its rows, has
    them worked on and begins to send the results. All results are waited for together and added up at once, so that no
    sum depends on n. The backward pass is the same from behind; gradients of the weights come after those of all rows,
    while these are on their way.

    Counts are exchanged once for all chunks, and not at all where the plan has a capacity and `padded` is set.

    Args:
        chunks: n, at most the experts of a rank; where it does not divide them, the first chunks have one more.
        padded: whether plans with a capacity travel padded to it.
    """

    name = "chunked"

    def __init__(self, link: Link, ops: OpsConfig = DEFAULT, chunks: int = 2, padded: bool = True) -> None:
        super().__init__(link, ops)
        self.chunks, self.padded = chunks, padded
        self._chunk_major: Tensor | None = None

    def dispatch(self, rows_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor, DispatchHandle]:
        """In one piece, assignments alone."""
        return super().dispatch(rows_TD, plan if self.padded else plan._replace(capacity=None))

    def through(self, rows_TD: Tensor, plan: RoutingPlan, experts: Work, beside: Beside | None = None) -> Passage:
        if not isinstance(experts, Experts):
            raise TypeError(f"chunks are of experts with weights of their own, not of {type(experts).__name__}")
        guests = None if plan.broadcast is None else Guests(rows_TD, plan.broadcast, self.link)
        rows, choices = leaving(rows_TD, plan)
        trip = self._trip(rows, choices, plan)
        aside: list[Tensor] = []

        def pipeline(rows: Tensor, weights: Tensor, experts_in_chunks: Callable[[], Chunks]) -> Tensor:
            arriving = trip.depart(rows, weights)
            chunks = experts_in_chunks()  # after the rows departed: see there
            if beside is not None:
                aside.append(beside())
            return trip.home(_each_chunk(trip, arriving, chunks, guests))

        home_TD = at_home(
            experts(rows, choices.weights_TK, None, pipeline), DispatchHandle(choices.weights_TK, plan, len(rows_TD))
        )
        sent_bytes = self._bytes_of(trip, rows, plan)
        if guests is not None:
            home_TD, sent_bytes = home_TD + guests.home(), sent_bytes + guests.sent_bytes
        return Passage(home_TD, aside[0] if aside else None, sent_bytes)

    def _trip(self, rows: Tensor, choices: Choices, plan: RoutingPlan) -> Trip:
        """What travels where, in chunks."""
        num_experts, num_ranks = len(plan.rows_per_expert_E), self.num_ranks
        spans = chunk_spans(num_experts // num_ranks, self.chunks)
        capacity = plan.capacity if self.padded else None
        if capacity is None:
            parts = self._ragged(plan.rows_per_expert_E.view(num_ranks, -1), spans)
        else:
            self._agree(capacity, plan.rows_per_expert_E)
            parts = self._slots(capacity, spans)
        if self._chunk_major is None or self._chunk_major.device != rows.device:
            self._chunk_major = chunk_major(spans, num_ranks).to(rows.device)
        place, source, _ = plan_rows(
            self._chunk_major[choices.experts_TK], num_experts, slots=capacity or 0, implementation=self.ops.plan
        )
        leave = Order(place, source[: parts[-1].rows.stop])  # without those that their experts dropped
        return Trip(self.link, self.ops, leave, parts, rows.shape[1], choices.weights_TK.dtype)

    def _ragged(self, sent_PL: Tensor, spans: list[slice]) -> list[Part]:
        received_PL = self.link.exchange(sent_PL, None, None, "counts")
        sent, received = torch.stack([sent_PL, received_PL]).tolist()
        parts, start = [], 0
        for span in spans:
            send, receive = ([sum(counts[span]) for counts in of] for of in (sent, received))
            rows = slice(start, start + sum(send))
            start = rows.stop
            splits = Splits(self.link, send, receive, self.ops)
            parts.append(Part(span, rows, splits, partial(_experts_of_counts, received_PL[:, span])))
        return parts

    def _slots(self, capacity: int, spans: list[slice]) -> list[Part]:
        per_expert, splits = self.num_ranks * capacity, Splits(self.link, ops=self.ops)
        return [
            Part(
                span,
                slice(span.start * per_expert, span.stop * per_expert),
                splits,
                partial(_experts_of_slots, self.num_ranks, span.stop - span.start, capacity),
            )
            for span in spans
        ]

    def _bytes_of(self, trip: Trip, rows: Tensor, plan: RoutingPlan) -> int:
        """Rows with their weights to other ranks, results back to them, and counts where these go."""
        me, others, there, back, counts = self.link.rank, self.num_ranks - 1, 0, 0, 0
        for part in trip.parts:
            _, send, receive, _ = part.splits
            if send is None or receive is None:
                elsewhere = (part.rows.stop - part.rows.start) // self.num_ranks * others
                there, back = there + elsewhere, back + elsewhere
            else:
                there, back = there + sum(send) - send[me], back + sum(receive) - receive[me]
                counts = len(plan.rows_per_expert_E) // self.num_ranks * others * 8
        values = there * (trip.width + packed_width(rows, plan.weights_A)) + back * trip.width
        return values * rows.element_size() + counts


def _each_chunk(trip: Trip, arriving: tuple[Tensor, ...], chunks: Chunks, guests: Guests | None) -> list[Tensor]:
    """Through the experts, and on the way home; its tickets."""
    returning = []
    if guests is not None:
        guests.arrive()
    for number, (part, ticket) in enumerate(zip(trip.parts, arriving, strict=True)):
        arrived = trip.arrived(number, ticket)
        if guests is None:
            out = chunks(part.experts, *arrived)
        else:
            merged = guests.join(part.experts, *arrived)
            out = guests.part(chunks(part.experts, *merged[:3]), merged)
        returning.append(trip.send_home(number, out))
    if guests is not None:
        guests.send_home()
    return returning


def chunk_spans(num_local: int, chunks: int) -> list[slice]:
    """The experts of each chunk, by their numbers on a rank.

    Raises:
        ValueError: there are more chunks than experts.
    """
    if not 1 <= chunks <= num_local:
        raise ValueError(f"{num_local} experts on a rank do not make {chunks} chunks")
    each, more = divmod(num_local, chunks)
    starts = [number * each + min(number, more) for number in range(chunks + 1)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def chunk_major(spans: list[slice], num_ranks: int) -> Tensor:
    """Place of each global expert in the order by chunk, rank and number there, int64 [E + 1]; nobody's stays last."""
    num_local = spans[-1].stop
    experts_PL = torch.arange(num_ranks * num_local).view(num_ranks, num_local)
    ordered_E = torch.cat([experts_PL[:, span].flatten() for span in spans])
    return torch.cat([torch.argsort(ordered_E), torch.tensor([len(ordered_E)])])


def _experts_of_counts(received_PL: Tensor, weights_R: Tensor) -> tuple[Tensor, int]:
    return experts_of(received_PL, len(weights_R)), received_PL.shape[1]


def _experts_of_slots(num_ranks: int, num_local: int, capacity: int, weights_S: Tensor) -> tuple[Tensor, int]:
    """Slots come by source rank and expert; empty ones are nobody's."""
    experts_L1 = torch.arange(num_local, device=weights_S.device)[:, None]
    experts_S = experts_L1.expand(num_ranks, num_local, capacity).flatten()
    return experts_S.masked_fill(weights_S == EMPTY, num_local), num_local
