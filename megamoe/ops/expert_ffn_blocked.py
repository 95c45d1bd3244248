"""Op `expert_ffn` for CPUs: one expert at a time, forward and backward by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops.expert_ffn_later import Later, Split, Weights
from megamoe.ops.memory import recycled_like

_Of = Callable[[int, Later], None]
"""What is done with the work on the gradients of an expert's weights, given its number."""


class _BlockedFFN(torch.autograd.Function):
    """Against plain autograd this keeps an expert's activation in the cache between its elementwise steps, writes the
    weight gradients straight into one stacked tensor, and recomputes silu(h1)*h3 instead of storing it."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts: Tensor
    ) -> Tensor:
        out_RD, kept = _forward(rows_RD, weights_R, (w1, w2, w3), counts)
        ctx.save_for_backward(rows_RD, weights_R, w1, w2, w3, *kept)
        ctx.counts = counts
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_R, w1, w2, w3, *kept = ctx.saved_tensors
        # All three or none: to freeze one of an expert's matrices alone is rare.
        wanted = any(ctx.needs_input_grad[2:5])
        d_w1, d_w2, d_w3 = (recycled_like(w) if wanted else None for w in (w1, w2, w3))

        def at_once(expert: int, compute: Later) -> None:
            if d_w1 is not None and d_w2 is not None and d_w3 is not None:
                compute((d_w1[expert], d_w2[expert], d_w3[expert]))

        gradients = _backward(grads[0], rows_RD, weights_R, tuple(kept), (w1, w2, w3), ctx.counts, at_once)
        return *gradients, d_w1, d_w2, d_w3, None


def _forward(
    rows_RD: Tensor, weights_R: Tensor, matrices: Weights, counts_L: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Results, and h1 and h3."""
    splits = counts_L.tolist()
    h1_RF = rows_RD.new_empty(rows_RD.shape[0], matrices[0].shape[1])
    h3_RF, out_RD = torch.empty_like(h1_RF), torch.empty_like(rows_RD)
    out_RD[sum(splits) :] = 0
    rowwise = (rows_RD, weights_R.to(rows_RD.dtype)[:, None], h1_RF, h3_RF, out_RD)
    for x, weight, h1, h3, out, w1_e, w2_e, w3_e in _per_expert(splits, rowwise, matrices):
        torch.mm(x, w1_e.t(), out=h1)
        torch.mm(x, w3_e.t(), out=h3)
        act = F.silu(h1).mul_(h3).mul_(weight)
        torch.mm(act, w2_e.t(), out=out)
    return out_RD, (h1_RF, h3_RF)


def _backward(
    grad_RD: Tensor,
    rows_RD: Tensor,
    weights_R: Tensor,
    kept: tuple[Tensor, ...],
    matrices: Weights,
    counts_L: Tensor,
    of_weights: _Of,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the gate weights."""
    splits, narrow_R = counts_L.tolist(), weights_R.to(rows_RD.dtype)
    d_rows, d_weights = torch.empty_like(rows_RD), torch.empty_like(narrow_R)
    d_rows[sum(splits) :] = 0
    d_weights[sum(splits) :] = 0
    rowwise = (grad_RD, rows_RD, narrow_R[:, None], *kept, d_rows, d_weights)
    for expert, parts in enumerate(_per_expert(splits, rowwise, matrices)):
        grad, x, weight, h1, h3, d_x, d_weight, w1_e, w2_e, w3_e = parts
        gate = F.silu(h1)
        act = gate * h3
        d_act = torch.mm(grad, w2_e)
        # Not einsum: a dot product per row becomes a batch of 1 x 1 matrix products, ten times as slow.
        torch.sum(act * d_act, dim=-1, out=d_weight)
        act.mul_(weight)
        d_h3 = gate.mul_(d_act.mul_(weight))
        torch.mm(d_h3, w3_e, out=d_x)
        d_h1 = torch.ops.aten.silu_backward(d_act.mul_(h3), h1)
        d_x.addmm_(d_h1, w1_e)
        of_weights(expert, partial(_of_weights, grad, x, act, d_h1, d_h3))
    return d_rows, d_weights.to(weights_R.dtype)


def _of_weights(grad: Tensor, x: Tensor, act: Tensor, d_h1: Tensor, d_h3: Tensor, into: Weights) -> None:
    """Gradients of one expert's weights."""
    d_w1, d_w2, d_w3 = into
    torch.mm(grad.t(), act, out=d_w2)
    torch.mm(d_h3.t(), x, out=d_w3)
    torch.mm(d_h1.t(), x, out=d_w1)


def _backward_later(
    grad_RD: Tensor,
    rows_RD: Tensor,
    weights_R: Tensor,
    kept: tuple[Tensor, ...],
    matrices: Weights,
    counts_L: Tensor,
) -> tuple[Tensor, Tensor, Later]:
    queue: list[Later] = []
    gradients = _backward(
        grad_RD, rows_RD, weights_R, kept, matrices, counts_L, lambda expert, compute: queue.append(compute)
    )

    def later(into: Weights) -> None:
        for compute, d_w1, d_w2, d_w3 in zip(queue, *into, strict=True):
            compute((d_w1, d_w2, d_w3))

    return *gradients, later


def _per_expert(
    splits: list[int], rowwise: tuple[Tensor, ...], stacked: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """For every expert, empty ones included: its rows of each `rowwise` tensor, its matrix of each `stacked` one. Where
    there are P times as many splits as matrices, each matrix serves P of them."""
    matrices = ([m for m in t.unbind() for _ in range(len(splits) // len(t))] for t in stacked)
    return zip(*(t[: sum(splits)].split(splits) for t in rowwise), *matrices, strict=True)


def blocked(
    rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert_L: Tensor
) -> Tensor:
    """As `reference` of the op; the fastest one on a CPU. Waits for the counts on the host."""
    return _BlockedFFN.apply(rows_RD, weights_R, w1, w2, w3, rows_per_expert_L)


BLOCKED = Split(_forward, _backward_later)
"""The same in two steps, with the same bits."""
