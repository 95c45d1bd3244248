"""One leg of a way on which a row travels once to each rank that has experts for it, with the list of those experts.

Two messages go: the rows, and an entry for each expert that takes one of them, its gate weight and a number of two
bytes. Entries stand by row, and of each row the first is marked, so that nothing else need say whose they are: 6 bytes
for each expert of a token with weights in fp32, 48 at K 8. A list of fixed length in further columns of the rows has
room for K entries in every row, most of it empty: 261 bytes of a token at E 64, K 8 over 8 ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.journey import Order, Splits
from megamoe.ops.plan import Plan, plan_rows
from megamoe.ops.rows import permute_rows, unpermute_rows
from megamoe.parallel.link import Link

CODE = torch.int16
"""Which of a rank's experts, and with the bits turned around where the entry is not the first one of its row."""
NUMBER_BYTES = 8
"""Of a number that is exchanged before the rows."""


class Load(NamedTuple):
    """Rows on one rank, and an entry for each expert that takes one of them."""

    rows_ND: Tensor
    row_A: Tensor
    """int64 [A]: row of each entry, ascending."""
    experts_A: Tensor
    """int64 [A] in [0, E); E: nobody's."""
    weights_A: Tensor
    """Gate weights, differentiable."""
    num_experts: int
    """E: of all ranks that the next leg leads to, where there is one, else of this rank."""
    rows_per_source_S: Tensor
    """int64 [S]: rows stand by the rank that they come from."""
    widest: int = 0
    """Most entries of a row that came from elsewhere."""


class Leg(NamedTuple):
    """One exchange as this rank sees it."""

    leave: Order
    """From rows to travel, a place for each of the P ranks."""
    splits: Splits
    where: str
    """What phases of it are called, after what they are: " between nodes"."""
    sent_bytes: int
    """To other ranks, forward, there and back."""

    def home(self, rows_GD: Tensor) -> Tensor:
        """Results to the ranks that the rows came from, added up there: [N, D]. The gradient needs nothing of its own
        input, so that a recomputed pass ends before it."""
        home_ND: Tensor = _Home.apply(rows_GD, self.leave, self.splits, self.where)
        return home_ND


def travel_once(load: Load, link: Link, ops: OpsConfig, where: str = "") -> tuple[Load, Leg]:
    """Rows to the ranks of the link, of which each holds E / P of the experts. The host waits for the numbers of rows.

    Differentiable in rows and weights: the gradient of a row that went to several ranks is the sum of theirs.

    Returns:
        What arrived here, by source rank and of each rank in the order in which it had them; and the leg.
    """
    held = load.num_experts // link.num_ranks
    ranks_A = load.experts_A // held  # nobody's: P
    rows, told_PX = _leaving(load, ranks_A, link.num_ranks, ops)
    entries = plan_rows(ranks_A[:, None], link.num_ranks, implementation=ops.plan)
    told_PX = torch.cat([told_PX, entries.rows_per_expert_E[:, None]], 1)
    heard_PX = link.exchange(told_PX, None, None, f"counts{where}")
    told, heard = torch.stack([told_PX, heard_PX]).tolist()
    row_splits = Splits(link, [sum(n[:-2]) for n in told], [sum(n[:-2]) for n in heard], ops)
    entry_splits = Splits(link, [n[-1] for n in told], [n[-1] for n in heard], ops)
    leave = Order(rows.place_TK, rows.source_R[: sum(row_splits.send or ())])
    source = entries.source_R[: sum(entry_splits.send or ())].long()
    codes = _codes(load, ranks_A, source, leave.place_NK, held)
    rows_GD, weights_B, codes_B = _There.apply(
        load.rows_ND, load.weights_A, codes, leave, source, row_splits, entry_splits, where
    )
    first_B = codes_B >= 0
    arrived = Load(
        rows_GD,
        first_B.cumsum(0) - 1,
        torch.where(first_B, codes_B, ~codes_B).long(),
        weights_B,
        held,
        heard_PX[:, :-2].flatten(),
        max(n[-2] for n in heard),
    )
    sent_bytes = _sent_bytes(load, row_splits, entry_splits, told_PX.shape[1])
    return arrived, Leg(leave, row_splits, where, sent_bytes)


def _leaving(load: Load, ranks_A: Tensor, num_ranks: int, ops: OpsConfig) -> tuple[Plan, Tensor]:
    """Places of leaving rows, by rank and then by row; and int64 [P, S + 1]: of the rows of each source, how many go to
    each rank, and the most entries of one."""
    num_rows, columns = len(load.rows_ND), num_ranks + 1
    entries_NP = load.row_A.new_zeros(num_rows * columns)
    entries_NP.scatter_add_(0, load.row_A * columns + ranks_A, torch.ones_like(ranks_A))
    entries_NP = entries_NP.view(num_rows, columns)[:, :num_ranks]
    there_NP, sources_S = entries_NP > 0, load.rows_per_source_S
    to_NP = torch.where(there_NP, torch.arange(num_ranks, device=there_NP.device), num_ranks)
    rows = plan_rows(to_NP, num_ranks, implementation=ops.plan)
    source_N = torch.repeat_interleave(
        torch.arange(len(sources_S), device=sources_S.device), sources_S, output_size=num_rows
    )
    rows_SP = sources_S.new_zeros(len(sources_S), num_ranks).index_add_(0, source_N, there_NP.long())
    widest_P = entries_NP.amax(0) if num_rows else entries_NP.new_zeros(num_ranks)
    return rows, torch.cat([rows_SP.t(), widest_P[:, None]], 1)


def _codes(load: Load, ranks_A: Tensor, source: Tensor, place_NP: Tensor, held: int) -> Tensor:
    """What travels with the weights of the entries `source`, which leave by rank and then by row."""
    if held > torch.iinfo(CODE).max:
        raise ValueError(f"{held} experts on a rank are too many for a list of {CODE}")
    ranks = ranks_A[source]
    place = place_NP[load.row_A[source], ranks]
    first = torch.diff(place, prepend=place.new_full((1,), -1)) != 0
    local = load.experts_A[source] - ranks * held
    return torch.where(first, local, ~local).to(CODE)


def _sent_bytes(load: Load, rows: Splits, entries: Splits, numbers: int) -> int:
    me, others = rows.link.rank, rows.link.num_ranks - 1
    there, back, along = (
        sum(split) - split[me] for split in (rows.send or [0], rows.receive or [0], entries.send or [0])
    )
    row_bytes = load.rows_ND.shape[1] * load.rows_ND.element_size()
    entry_bytes = load.weights_A.element_size() + CODE.itemsize
    return (there + back) * row_bytes + along * entry_bytes + others * numbers * NUMBER_BYTES


class _There(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        codes: Tensor,
        leave: Order,
        source: Tensor,
        row_splits: Splits,
        entry_splits: Splits,
        where: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.leave, ctx.row_splits, ctx.entry_splits, ctx.where = leave, row_splits, entry_splits, where
        ctx.save_for_backward(source)
        ctx.num_entries = len(weights)
        link, phase = row_splits.link, f"dispatch{where}"
        sent = permute_rows(rows, leave.source_M, leave.place_NK, implementation=row_splits.ops.rows)
        lists = torch.cat([_bytes(weights[source]), _bytes(codes)], 1)
        rows_under_way = link.start(sent, row_splits.send, row_splits.receive, phase)
        lists_under_way = link.start(lists, entry_splits.send, entry_splits.receive, phase)
        del sent, lists
        arrived, lists = rows_under_way.wait(), lists_under_way.wait()
        columns = weights.element_size()
        arrived_codes = _values(lists[:, columns:], codes.dtype)
        ctx.mark_non_differentiable(arrived_codes)
        return arrived, _values(lists[:, :columns], weights.dtype), arrived_codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        leave, rows, entries, phase = ctx.leave, ctx.row_splits, ctx.entry_splits, f"dispatch backward{ctx.where}"
        rows_under_way = rows.link.start(grads[0], rows.receive, rows.send, phase)
        weights_under_way = rows.link.start(grads[1], entries.receive, entries.send, phase)
        d_rows = unpermute_rows(rows_under_way.wait(), leave.place_NK, leave.source_M, implementation=rows.ops.rows)
        d_weights = grads[1].new_zeros(ctx.num_entries).index_copy_(0, source, weights_under_way.wait())
        return d_rows, d_weights, *[None] * 6


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, leave: Order, splits: Splits, where: str) -> Tensor:
        # As an attribute: what is saved for backward, a recomputed pass would have to reach.
        ctx.way = leave, splits, where
        home = splits.back(rows, f"combine{where}")
        return unpermute_rows(home, leave.place_NK, leave.source_M, implementation=splits.ops.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        leave, splits, where = ctx.way
        leaving = permute_rows(grads[0].contiguous(), leave.source_M, leave.place_NK, implementation=splits.ops.rows)
        return splits.there(leaving, f"combine backward{where}"), None, None, None


def _bytes(values: Tensor) -> Tensor:
    """Of each value, uint8 [N, bytes]: not every backend sends every dtype."""
    return values.contiguous()[:, None].view(torch.uint8)


def _values(columns: Tensor, dtype: torch.dtype) -> Tensor:
    return columns.flatten().view(dtype)
