"""Ops that move rows by index: gather rows, and sum rows back. Each is the other's backward pass.

For rows without a regular shape; K choices of every token move by `permute_rows` and `unpermute_rows`, which are ops of
:mod:`megamoe.ops.movement`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops.movement import PERMUTE_ROWS, UNPERMUTE_ROWS


def gather_rows(rows_TD: Tensor, token_ids_A: Tensor) -> Tensor:
    """`out[a] = rows[token_ids[a]]`, [A, D]. An index may occur any number of times, or never."""
    return rows_TD.index_select(0, token_ids_A)


def sum_rows(rows_AD: Tensor, token_ids_A: Tensor, num_rows: int) -> Tensor:
    """`out[t] = sum of rows[a] over all a with token_ids[a] == t`, [T, D]; zero where there is none.

    Added in the order of `a` on a CPU (repeatable bit for bit); CUDA's index_add uses atomics. Nothing is saved for the
    backward pass in the way that a recomputed pass would have to come here for.
    """
    summed_TD: Tensor = _SumRows.apply(rows_AD, token_ids_A, num_rows)
    return summed_TD


def permute_rows(
    rows_TD: Tensor,
    source_R: Tensor,
    place_TK: Tensor,
    values_TK: Tensor | None = None,
    empty: float = -1.0,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Rows of tokens to the places of their choices; see :func:`megamoe.ops.movement.permute_rows_reference`."""
    run = PERMUTE_ROWS.choose(implementation, rows_TD.device, rows_TD.dtype).function
    return run(rows_TD, source_R, place_TK, values_TK, empty)


def unpermute_rows(rows_RD: Tensor, place_TK: Tensor, source_R: Tensor, *, implementation: str = "auto") -> Tensor:
    """Their sum back to the tokens; see :func:`megamoe.ops.movement.unpermute_rows_reference`. Saves for the backward
    pass as :func:`sum_rows` does."""
    summed_TD: Tensor = _UnpermuteRows.apply(rows_RD, place_TK, source_R, implementation)
    return summed_TD


class _UnpermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, place_TK: Tensor, source_R: Tensor, implementation: str) -> Tensor:
        ctx.place_TK, ctx.source_R, ctx.implementation = place_TK, source_R, implementation
        run = UNPERMUTE_ROWS.choose(implementation, rows_RD.device, rows_RD.dtype).function
        return run(rows_RD, place_TK, source_R, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows_RD = permute_rows(grads[0].contiguous(), ctx.source_R, ctx.place_TK, implementation=ctx.implementation)
        return d_rows_RD, None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, token_ids_A: Tensor, num_rows: int) -> Tensor:
        ctx.token_ids_A = token_ids_A
        return rows_AD.new_zeros(num_rows, rows_AD.shape[1]).index_add_(0, token_ids_A, rows_AD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.token_ids_A), None, None
