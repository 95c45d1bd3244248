"""Op `expert_ffn`: the SwiGLU feed-forward of every expert on its own rows, gate weight folded in.

    y_r = w2_e ( weight_r * silu(w1_e x_r) * (w3_e x_r) )      with e the expert that row r belongs to

The gate weight multiplies the activation and not the output, so the backward pass of the weight needs no stored
output rows (ours; the products are equal because w2 is linear).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.ops.expert_ffn_blocked import BLOCKED, blocked
from megamoe.ops.expert_ffn_by_source import by_source
from megamoe.ops.expert_ffn_fused import FUSED, fused
from megamoe.ops.expert_ffn_later import Split
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
    Implementation("by_source", by_source),
)
# The same choice as above, of those that can take some experts at a time.
EXPERT_FFN_SPLIT: Op[Split] = Op(
    "expert_ffn",
    Implementation("fused", FUSED, _needs_grouped_mm, _slow_on_cpu),
    Implementation("blocked", BLOCKED),
)
