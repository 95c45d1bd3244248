"""Op `expert_ffn` for GPUs: grouped products with the fused gated linear unit between them, backward by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops.expert_ffn_later import Later, Split, Weights
from megamoe.ops.glu import GLU, GLU_BACKWARD
from megamoe.ops.precision import at_least_fp32


class _FusedFFN(torch.autograd.Function):
    """Keeps the rows, h1 and h3; the activation is formed again in the pass that has h1 and h3 at hand anyway.

    Between the products, forward and backward together, tensors of [R, F] are read 5 times and written 4 times; plain
    autograd reads them 14 times, writes them 8 times, and keeps 5 of them instead of 2.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_L: Tensor
    ) -> Tensor:
        out_RD, kept = _forward(rows_RD, weights_R, (w1, w2, w3), counts_L)
        ctx.save_for_backward(rows_RD, weights_R, w1, w2, w3, counts_L, *kept)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_R, w1, w2, w3, counts_L, *kept = ctx.saved_tensors
        grad_RD, ends_L = grads[0].contiguous(), kept[0]
        d_h1_RF, d_h3_RF, d_weights_R, act_RF = _of_hidden(grad_RD, weights_R, w2, counts_L, tuple(kept))
        d_w2 = _sum_of_each(grad_RD, act_RF, ends_L) if ctx.needs_input_grad[3] else None
        del act_RF
        d_w1 = _sum_of_each(d_h1_RF, rows_RD, ends_L) if ctx.needs_input_grad[2] else None
        d_w3 = _sum_of_each(d_h3_RF, rows_RD, ends_L) if ctx.needs_input_grad[4] else None
        d_rows_RD = None
        if ctx.needs_input_grad[0]:
            d_rows_RD = _of_rows(d_h1_RF, d_h3_RF, w1, w3, ends_L)
        return d_rows_RD, d_weights_R, d_w1, d_w2, d_w3, None


def _forward(
    rows_RD: Tensor, weights_R: Tensor, matrices: Weights, counts_L: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Results, and the ends of the groups, h1 and h3."""
    w1, w2, w3 = matrices
    ends_L = counts_L.cumsum(0).to(torch.int32)
    glu = GLU.choose("auto", rows_RD.device, rows_RD.dtype).function
    h1_RF = _times_each(rows_RD, w1.transpose(1, 2), ends_L)
    h3_RF = _times_each(rows_RD, w3.transpose(1, 2), ends_L)
    act_RF = glu(h1_RF, h3_RF, at_least_fp32(weights_R), counts_L, "swiglu")
    return _times_each(act_RF, w2.transpose(1, 2), ends_L), (ends_L, h1_RF, h3_RF)


def _of_hidden(
    grad_RD: Tensor, weights_R: Tensor, w2: Tensor, counts_L: Tensor, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h1, h3 and the gate weights; and the activation, once more."""
    ends_L, h1_RF, h3_RF = kept
    glu_backward = GLU_BACKWARD.choose("auto", grad_RD.device, grad_RD.dtype).function
    d_act_RF = _times_each(grad_RD, w2, ends_L)
    d_h1_RF, d_h3_RF, d_weights_R, act_RF = glu_backward(
        d_act_RF, h1_RF, h3_RF, at_least_fp32(weights_R), counts_L, "swiglu"
    )
    return d_h1_RF, d_h3_RF, d_weights_R.to(weights_R.dtype), act_RF


def _of_rows(d_h1_RF: Tensor, d_h3_RF: Tensor, w1: Tensor, w3: Tensor, ends_L: Tensor) -> Tensor:
    return _times_each(d_h1_RF, w1, ends_L).add_(_times_each(d_h3_RF, w3, ends_L))


def _backward_later(
    grad_RD: Tensor,
    rows_RD: Tensor,
    weights_R: Tensor,
    kept: tuple[Tensor, ...],
    matrices: Weights,
    counts_L: Tensor,
) -> tuple[Tensor, Tensor, Later]:
    w1, w2, w3 = matrices
    grad_RD, ends_L = grad_RD.contiguous(), kept[0]
    d_h1_RF, d_h3_RF, d_weights_R, act_RF = _of_hidden(grad_RD, weights_R, w2, counts_L, kept)

    def later(into: Weights) -> None:
        products = ((d_h1_RF, rows_RD), (grad_RD, act_RF), (d_h3_RF, rows_RD))
        for d_w, (left, right) in zip(into, products, strict=True):
            d_w.copy_(_sum_of_each(left, right, ends_L))  # grouped_mm writes to no given place

    return _of_rows(d_h1_RF, d_h3_RF, w1, w3, ends_L), d_weights_R, later


def _times_each(rows_RX: Tensor, matrices_LXY: Tensor, ends_L: Tensor) -> Tensor:
    """Rows of each group times its matrix, [R, Y]. Rows beyond the last group are not written."""
    if not len(rows_RX):
        return rows_RX.new_empty(0, matrices_LXY.shape[2])
    return F.grouped_mm(rows_RX, matrices_LXY, offs=ends_L)


def _sum_of_each(left_RX: Tensor, right_RY: Tensor, ends_L: Tensor) -> Tensor:
    """left.T @ right over the rows of each group, [L, X, Y]. Rows beyond the last group are not read."""
    if not len(left_RX):
        return left_RX.new_zeros(len(ends_L), left_RX.shape[1], right_RY.shape[1])
    return F.grouped_mm(left_RX.t(), right_RY, offs=ends_L)


def fused(rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert_L: Tensor) -> Tensor:
    """As `reference` of the op. The host waits for nothing, where grouped_mm does not (on a GPU: bf16 from Hopper on).

    Rows beyond the counts: never read; their output and the gradient to them are whatever was in memory, the gradient
    of their weights is 0.
    """
    return _FusedFFN.apply(rows_RD, weights_R, w1, w2, w3, rows_per_expert_L)


FUSED = Split(_forward, _backward_later)
"""The same in two steps, with the same bits."""
