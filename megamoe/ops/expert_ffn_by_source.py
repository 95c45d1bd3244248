"""Op `expert_ffn`, its rows one source at a time: what becomes of a source's rows does not depend on the others.

A matrix product of more rows may round each of them differently, and a weight's gradient over all rows is added up in
another order than rank by rank. Here an expert meets the rows of every source by themselves, with the very calls that
the source would make alone, and gradients of weights are added up over sources in fp64, where sums of a few fp32
numbers are exact (ours; see `training/exact_sums.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GRADIENT_SUM = "gradient_sum"
"""Attribute of a parameter: where its gradients are added up in fp64."""


class _BySource(torch.autograd.Function):
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
        counts = rows_LP.tolist()
        h1_RF = rows_RD.new_empty(rows_RD.shape[0], w1.shape[1])
        h3_RF, out_RD = torch.empty_like(h1_RF), torch.zeros_like(rows_RD)
        for expert, own in _parts(counts):
            torch.mm(rows_RD[own], w1[expert].t(), out=h1_RF[own])
            torch.mm(rows_RD[own], w3[expert].t(), out=h3_RF[own])
            act = F.silu(h1_RF[own]).mul_(h3_RF[own]).mul_(weights_R[own, None])
            torch.mm(act, w2[expert].t(), out=out_RD[own])
        ctx.save_for_backward(rows_RD, weights_R, w1, w2, w3, h1_RF, h3_RF)
        ctx.counts, ctx.sums = counts, sums
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_R, w1, w2, w3, h1_RF, h3_RF = ctx.saved_tensors
        d_rows, d_weights = torch.zeros_like(rows_RD), torch.zeros_like(weights_R)
        wanted = any(ctx.needs_input_grad[2:5])
        own_sums = not ctx.sums
        sums = ctx.sums or tuple(torch.zeros_like(w, dtype=torch.float64) for w in (w1, w2, w3))
        for expert, own in _parts(ctx.counts):
            grad, x, weight, h1, h3 = (t[own] for t in (grads[0], rows_RD, weights_R[:, None], h1_RF, h3_RF))
            gate = F.silu(h1)
            act, d_act = gate * h3, torch.mm(grad, w2[expert])
            torch.sum(act * d_act, dim=-1, out=d_weights[own])
            act.mul_(weight)
            d_h3 = gate.mul_(d_act.mul_(weight))
            d_h1 = torch.ops.aten.silu_backward(d_act.mul_(h3), h1)
            torch.mm(d_h3, w3[expert], out=d_rows[own])
            d_rows[own].addmm_(d_h1, w1[expert])
            if wanted:
                for total, left, right in zip(sums, (d_h1, grad, d_h3), (x, act, x), strict=True):
                    total[expert] += torch.mm(left.t(), right)
        gradients: tuple[Tensor | None, ...] = (None, None, None)
        if wanted and own_sums:
            gradients = tuple(total.to(w.dtype) for total, w in zip(sums, (w1, w2, w3), strict=True))
        return d_rows, d_weights, *gradients, None, None


def _parts(counts: list[list[int]]) -> Iterator[tuple[int, slice]]:
    """Each expert with each part of its rows that is from one source."""
    start = 0
    for expert, of_sources in enumerate(counts):
        for num_rows in of_sources:
            if num_rows:
                yield expert, slice(start, start + num_rows)
            start += num_rows


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
    return _BySource.apply(rows_RD, weights_R.to(rows_RD.dtype), w1, w2, w3, rows_LP, sums)
