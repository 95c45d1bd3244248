"""Op `expert_ffn`, its rows one source at a time: what becomes of a source's rows does not depend on the others.

A matrix product of more rows may round each of them differently, and a weight's gradient over all rows is added up in
another order than rank by rank. Here an expert meets the rows of every source by themselves, with the very calls that
the source would make alone, and gradients of weights are added up over sources in fp64, where sums of a few fp32
numbers are exact (ours; see `training/exact_sums.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops.expert_ffn_blocked import BLOCKED

GRADIENT_SUM = "gradient_sum"
"""Attribute of a parameter: where its gradients are added up in fp64."""


class _BySource(torch.autograd.Function):
    """The blocked implementation for L * P experts, of which P at a time have one matrix.

    So for a moment of the backward pass there are P gradients of every weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_R: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        rows_LP: Tensor,
        sums: tuple[Tensor, ...],
    ) -> Tensor:
        out_RD, kept = BLOCKED.forward(rows_RD, weights_R, (w1, w2, w3), rows_LP.flatten())
        ctx.save_for_backward(rows_RD, weights_R, w1, w2, w3, *kept)
        ctx.rows_LP, ctx.sums = rows_LP, sums
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_R, w1, w2, w3, *kept = ctx.saved_tensors
        weights, rows_LP = (w1, w2, w3), ctx.rows_LP
        d_rows, d_weights, later = BLOCKED.backward(
            grads[0], rows_RD, weights_R, tuple(kept), weights, rows_LP.flatten()
        )
        if not any(ctx.needs_input_grad[2:5]):
            return d_rows, d_weights, *[None] * 5
        of_1, of_2, of_3 = (w.new_empty(rows_LP.numel(), *w.shape[1:]) for w in weights)
        later((of_1, of_2, of_3))
        totals = [of.unflatten(0, rows_LP.shape).sum(1, dtype=torch.float64) for of in (of_1, of_2, of_3)]
        if not ctx.sums:
            return d_rows, d_weights, *(total.to(w1.dtype) for total in totals), None, None
        for so_far, total in zip(ctx.sums, totals, strict=True):
            so_far += total
        return d_rows, d_weights, *[None] * 5


def by_source(
    rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert_L: Tensor
) -> Tensor:
    """As `reference` of the op. Waits for the counts on the host.

    Weights with an attribute `gradient_sum`, fp64 of their shape, have their gradients added there and autograd gets
    none; to others autograd gets the sum, rounded once.

    Args:
        rows_per_expert_L: int64 [L, P]: rows of each expert from each source, in this order; [L]: all from one.
    """
    rows_LP = rows_per_expert_L if rows_per_expert_L.dim() == 2 else rows_per_expert_L[:, None]
    sums = tuple(getattr(w, GRADIENT_SUM) for w in (w1, w2, w3) if hasattr(w, GRADIENT_SUM))
    return _BySource.apply(rows_RD, weights_R, w1, w2, w3, rows_LP, sums)
