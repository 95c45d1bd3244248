"""Op `expert_ffn`: the SwiGLU feed-forward of every expert on its own rows, gate weight folded in.

    y_r = w2_e ( weight_r * silu(w1_e x_r) * (w3_e x_r) )      with e the expert that row r belongs to

The gate weight multiplies the activation and not the output, so the backward pass of the weight needs no stored
output rows (ours; the products are equal because w2 is linear).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        rows_per_expert_L: int64 [L], summing to R.

    Returns:
        [R, D], in the order of `rows_RD`.
    """
    groups = zip(rows_RD.split(rows_per_expert_L.tolist()), weights_R.split(rows_per_expert_L.tolist()), strict=True)
    # An expert without rows still multiplies an empty slice, so that its weights are part of the graph.
    return torch.cat(
        [
            F.linear(F.silu(F.linear(x, a)) * F.linear(x, c) * weight[:, None].to(x.dtype), b)
            for (x, weight), a, b, c in zip(groups, w1, w2, w3, strict=True)
        ]
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
        for e, block in _blocks(splits):
            torch.mm(rows_RD[block], w1[e].t(), out=h1_RF[block])
            torch.mm(rows_RD[block], w3[e].t(), out=h3_RF[block])
            act = F.silu(h1_RF[block]).mul_(h3_RF[block]).mul_(weights_R[block, None])
            torch.mm(act, w2[e].t(), out=out_RD[block])
        ctx.save_for_backward(rows_RD, weights_R, w1, w2, w3, h1_RF, h3_RF)
        ctx.splits = splits
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_R, w1, w2, w3, h1_RF, h3_RF = ctx.saved_tensors
        grad_RD = grads[0]
        d_rows, d_weights = torch.empty_like(rows_RD), torch.empty_like(weights_R)
        d_w1, d_w2, d_w3 = torch.empty_like(w1), torch.empty_like(w2), torch.empty_like(w3)
        for e, block in _blocks(ctx.splits):
            h1, h3, grad, x, weight = (
                h1_RF[block],
                h3_RF[block],
                grad_RD[block],
                rows_RD[block],
                weights_R[block, None],
            )
            gate = F.silu(h1)
            act = gate * h3
            d_act = torch.mm(grad, w2[e])
            d_weights[block] = torch.einsum("rf,rf->r", d_act, act)
            torch.mm(grad.t(), act.mul_(weight), out=d_w2[e])
            d_act.mul_(weight)
            d_h3 = gate.mul_(d_act)
            d_h1 = torch.ops.aten.silu_backward(d_act.mul_(h3), h1)
            torch.mm(d_h1.t(), x, out=d_w1[e])
            torch.mm(d_h3.t(), x, out=d_w3[e])
            torch.mm(d_h1, w1[e], out=d_rows[block])
            d_rows[block].addmm_(d_h3, w3[e])
        return d_rows, d_weights, d_w1, d_w2, d_w3, None


def _blocks(splits: list[int]) -> list[tuple[int, slice]]:
    """(expert, its slice of rows) for every expert, the empty ones included."""
    blocks, start = [], 0
    for expert, rows in enumerate(splits):
        blocks.append((expert, slice(start, start + rows)))
        start += rows
    return blocks


def blocked(
    rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert_L: Tensor
) -> Tensor:
    """As :func:`reference`; the fastest one on a CPU. Waits for the counts on the host."""
    return _BlockedFFN.apply(rows_RD, weights_R.to(rows_RD.dtype), w1, w2, w3, rows_per_expert_L)


def grouped_mm(
    rows_RD: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert_L: Tensor
) -> Tensor:
    """As :func:`reference` through `torch.nn.functional.grouped_mm`: one launch for all experts, no wait of the host."""
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
    Implementation("grouped_mm", grouped_mm, _needs_grouped_mm, _slow_on_cpu),
    Implementation("blocked", blocked),
    Implementation("reference", reference),
)
