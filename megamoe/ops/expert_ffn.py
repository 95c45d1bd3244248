"""Op `expert_ffn`: the SwiGLU feed-forward of every expert on its own rows, gate weight folded in.

    y_r = w2_e ( weight_r * silu(w1_e x_r) * (w3_e x_r) )      with e the expert that row r belongs to

The gate weight multiplies the activation and not the output, so the backward pass of the weight needs no stored
output rows (ours; the products are equal because w2 is linear).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops.expert_ffn_fused import fused
from megamoe.ops.memory import recycled_like
from megamoe.ops.registry import Implementation, Op

ExpertFFN = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def reference(
    rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert_L: Tensor
) -> Tensor:
    """The specification: a loop over experts in plain autograd.

    Args:
        rows_RD: rows grouped by expert, [R, D].
        weights_R: gate weight of each row, [R].
        w1, w3: [L, F, D]; w2: [L, D, F].
        rows_per_expert_L: int64 [L], summing to R or less. Rows beyond that sum are padding: they belong to no expert
            and add to no gradient of a weight; what comes out for them, and their own gradient, are not specified.

    Returns:
        [R, D], in the order of `rows_RD`.
    """
    counts = rows_per_expert_L.tolist()
    used = sum(counts)
    groups = zip(rows_RD[:used].split(counts), weights_R[:used].split(counts), strict=True)
    # An expert without rows still multiplies an empty slice, so that its weights are part of the graph.
    return torch.cat(
        [
            F.linear(F.silu(F.linear(x, a)) * F.linear(x, c) * weight[:, None].to(x.dtype), b)
            for (x, weight), a, b, c in zip(groups, w1, w2, w3, strict=True)
        ]
        + [rows_RD.new_zeros(rows_RD.shape[0] - used, rows_RD.shape[1])]
    )


class _BlockedFFN(torch.autograd.Function):
    """One expert at a time, forward and backward by hand.

    Against plain autograd this keeps an expert's activation in the cache between its elementwise steps, writes the
    weight gradients straight into one stacked tensor, and recomputes silu(h1)*h3 instead of storing it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts: Tensor
    ) -> Tensor:
        splits = counts.tolist()
        h1_RF = rows_RD.new_empty(rows_RD.shape[0], w1.shape[1])
        h3_RF, out_RD = torch.empty_like(h1_RF), torch.empty_like(rows_RD)
        out_RD[sum(splits) :] = 0
        rowwise = (rows_RD, weights_R[:, None], h1_RF, h3_RF, out_RD)
        for x, weight, h1, h3, out, w1_e, w2_e, w3_e in _per_expert(splits, rowwise, (w1, w2, w3)):
            torch.mm(x, w1_e.t(), out=h1)
            torch.mm(x, w3_e.t(), out=h3)
            act = F.silu(h1).mul_(h3).mul_(weight)
            torch.mm(act, w2_e.t(), out=out)
        ctx.save_for_backward(rows_RD, weights_R, w1, w2, w3, h1_RF, h3_RF)
        ctx.splits = splits
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_R, w1, w2, w3, h1_RF, h3_RF = ctx.saved_tensors
        d_rows, d_weights = torch.empty_like(rows_RD), torch.empty_like(weights_R)
        d_rows[sum(ctx.splits) :] = 0
        d_weights[sum(ctx.splits) :] = 0
        # All three or none: to freeze one of an expert's matrices alone is rare.
        wanted = any(ctx.needs_input_grad[2:5])
        d_w1, d_w2, d_w3 = (recycled_like(w) if wanted else w.new_empty(len(w), 0) for w in (w1, w2, w3))
        rowwise = (grads[0], rows_RD, weights_R[:, None], h1_RF, h3_RF, d_rows, d_weights)
        stacked = (w1, w2, w3, d_w1, d_w2, d_w3)
        for parts in _per_expert(ctx.splits, rowwise, stacked):
            grad, x, weight, h1, h3, d_x, d_weight, w1_e, w2_e, w3_e, d_w1_e, d_w2_e, d_w3_e = parts
            gate = F.silu(h1)
            act = gate * h3
            d_act = torch.mm(grad, w2_e)
            # Not einsum: a dot product per row becomes a batch of 1 x 1 matrix products, ten times as slow.
            torch.sum(act * d_act, dim=-1, out=d_weight)
            act.mul_(weight)
            if wanted:
                torch.mm(grad.t(), act, out=d_w2_e)
            d_h3 = gate.mul_(d_act.mul_(weight))
            torch.mm(d_h3, w3_e, out=d_x)
            d_h1 = torch.ops.aten.silu_backward(d_act.mul_(h3), h1)
            d_x.addmm_(d_h1, w1_e)
            if wanted:
                torch.mm(d_h3.t(), x, out=d_w3_e)
                torch.mm(d_h1.t(), x, out=d_w1_e)
        return d_rows, d_weights, *((d_w1, d_w2, d_w3) if wanted else (None, None, None)), None


def _per_expert(
    splits: list[int], rowwise: tuple[Tensor, ...], stacked: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """For every expert, empty ones included: its rows of each `rowwise` tensor, its matrix of each `stacked` one."""
    return zip(*(t[: sum(splits)].split(splits) for t in rowwise), *(t.unbind() for t in stacked), strict=True)


def blocked(
    rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert_L: Tensor
) -> Tensor:
    """As :func:`reference`; the fastest one on a CPU. Waits for the counts on the host."""
    return _BlockedFFN.apply(rows_RD, weights_R.to(rows_RD.dtype), w1, w2, w3, rows_per_expert_L)


def grouped_mm(
    rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert_L: Tensor
) -> Tensor:
    """As :func:`reference` through torch's `grouped_mm`: one launch for all experts, no wait of the host."""
    ends_L = rows_per_expert_L.cumsum(0).to(torch.int32)
    h1_RF = F.grouped_mm(rows_RD, w1.transpose(1, 2), offs=ends_L)
    h3_RF = F.grouped_mm(rows_RD, w3.transpose(1, 2), offs=ends_L)
    act_RF = F.silu(h1_RF) * h3_RF * weights_R[:, None].to(rows_RD.dtype)
    return F.grouped_mm(act_RF, w2.transpose(1, 2), offs=ends_L)


def _needs_grouped_mm(device: torch.device, dtype: torch.dtype) -> str:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not take {dtype}"
    return ""


def _slow_on_cpu(device: torch.device, dtype: torch.dtype) -> str:
    return "" if device.type == "cuda" else "without a GPU it is a loop of many small steps"


EXPERT_FFN: Op[ExpertFFN] = Op(
    "expert_ffn",
    Implementation("fused", fused, _needs_grouped_mm, _slow_on_cpu),
    Implementation("grouped_mm", grouped_mm, _needs_grouped_mm, _slow_on_cpu),
    Implementation("blocked", blocked),
    Implementation("reference", reference),
)
