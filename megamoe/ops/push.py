"""Ops of the one-sided exchange: rows straight to their places by expert in the memory of the ranks that hold these.

    there: row of x_t goes to row `first[p, e] + i` at the owner of e, as i-th of this rank p for expert e
    home:  out_t = sum over k of y at the owner of choice (t, k), in the order of k

Every rank tells all others how many rows it has for each expert; then everyone knows where each row lies, by expert
and inside by rank, without gaps, and nobody has to answer. Which peers' memory that is, and the number of the exchange,
come with each call; `kernels/csrc/cuda/comm.cuh` says what has to be called in which order. Each direction is the
other's backward pass. There is no implementation in plain torch, which cannot order the accesses of several processes
to the same memory; what the ops do all together is specified by :func:`push_reference` and :func:`pull_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megamoe.ops import kernels
from megamoe.ops.precision import at_least_fp32

OPS = ("window_bytes", "exchange_counts", "wait_counts", "dispatch_push", "wait_flags", "publish_rows", "combine_pull")
MAX_RANKS = 32
"""Of a group, as the compiled ops take them."""
TILE = 32
"""Rows of one rank for one expert that arrive under one flag."""
REPORT = 8
"""Numbers of a report, int32: 1 where a wait has ended at its limit; what was waited for (a place in AWAITED); the
peer; the expert, -1: none; first row; the exchange; rows counted, rows wanted."""
AWAITED = ("nothing", "counts", "rows", "results", "done")


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why rows cannot be pushed there; empty: they can."""
    return next((reason for op in OPS if (reason := kernels.unavailable(op, device, dtype))), "")


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the numbers that travel beside rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def box(place: int, num_local: int, capacity: int, row_bytes: int, addresses: Sequence[int]) -> Tensor:
    """What the ops know of the memory of a group: int64 [4 + P] on the CPU.

    Args:
        place: of this rank in the group.
        num_local: L, experts of each rank.
        capacity: C, most rows that a rank has for one expert.
        row_bytes: of the widest row, rounded up to 16.
        addresses: of each rank's memory, as this rank reaches it.
    """
    return torch.tensor([place, num_local, capacity, row_bytes, *addresses])


def num_flags(num_ranks: int, num_local: int, capacity: int) -> int:
    """Of one buffer."""
    return num_ranks * num_local * -(-capacity // TILE)


def first_rows(counts_PE: Tensor) -> Tensor:
    """The row at the owner of e that is the first of rank p's for it, int32 [P, E]: by expert, then by rank."""
    num_ranks, num_experts = counts_PE.shape
    by_owner = counts_PE.view(num_ranks, num_ranks, -1).permute(1, 2, 0).reshape(num_ranks, -1)  # [P, L * P]
    before = by_owner.cumsum(1, dtype=torch.int32) - by_owner
    return before.view(num_ranks, -1, num_ranks).permute(2, 0, 1).reshape(num_ranks, num_experts).contiguous()


def places_at_owners(
    experts_TK: Tensor, place_TK: Tensor, counts_PE: Tensor, first_PE: Tensor, rank: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Where the choices of rank `rank` end up.

    Args:
        experts_TK: global expert of each choice; those of nobody are not used.
        place_TK: int32, place of each choice among the rank's assignments by expert; -1: none.
        num_rows: rows that each owner's memory has.

    Returns:
        int32 [T, K], owner * num_rows + row there, -1: none; int32 [E], first assignment of each expert.
    """
    num_experts = counts_PE.shape[1]
    start_E = counts_PE[rank].cumsum(0, dtype=torch.int32) - counts_PE[rank]
    owner_E = torch.arange(num_experts, dtype=torch.int32, device=counts_PE.device) // (num_experts // len(counts_PE))
    shift_E = first_PE[rank] - start_E + owner_E * num_rows
    shifted_TK = place_TK + shift_E[experts_TK.clamp(0, num_experts - 1)]
    return shifted_TK.masked_fill(place_TK < 0, -1), start_E


def push_reference(rows: Sequence[Tensor], places: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    """The specification of the way there, for all ranks at once.

    Args:
        rows: of each rank what each of its choices brings, [T, K, ...].
        places: of each rank, as :func:`places_at_owners` gives them.

    Returns:
        Of each rank what has arrived, [num_rows, ...]; zeros where nothing has.
    """
    arrived = rows[0].new_zeros(len(rows) * num_rows, *rows[0].shape[2:])
    for rows_TKD, place_TK in zip(rows, places, strict=True):
        arrived[place_TK[place_TK >= 0].long()] = rows_TKD[place_TK >= 0]
    return list(arrived.split(num_rows))


def pull_reference(rows: Sequence[Tensor], places: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    """The specification of the way home: of each rank the sum of each token's rows, [T, D], in fp32, rounded once."""
    at_owners = torch.cat([rows_RD[:num_rows] for rows_RD in rows])
    home = []
    for place_TK in places:
        total_TD = at_least_fp32(at_owners.new_zeros(len(place_TK), at_owners.shape[1]))
        for place_T in place_TK.unbind(1):
            total_TD += at_owners[place_T.clamp_min(0).long()].masked_fill((place_T < 0)[:, None], 0.0)
        home.append(total_TD.to(at_owners.dtype))
    return home
