"""Op `grap_affinity` on the compiled ops of `megamoe-kernels`: one pass over the rows in each direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops.kernels import unavailable as without_kernels
from megamoe.ops.precision import at_least_fp32
from megamoe.ops.slices import through_length, unit_values

LARGEST_ON_GPU = 1024, 16384
"""Experts and features that the compiled op takes there."""


class _KernelAffinity(torch.autograd.Function):
    """One node for the slices' lengths and the ops: per layer, nodes cost the host more than their arithmetic."""

    @staticmethod
    def forward(
        ctx: Any, rows_TD: Tensor, mean_D: Tensor, values_D: Tensor, num_experts: int, top_k: int
    ) -> tuple[Tensor, Tensor]:
        unit_D, length_D = unit_values(values_D, num_experts)
        rows_TD = rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()
        affinity_TE, inverse_T, experts_TK = torch.ops.megamoe.grap_fwd(rows_TD, unit_D, mean_D, num_experts, top_k)
        ctx.save_for_backward(rows_TD, unit_D, length_D, mean_D, affinity_TE, inverse_T)
        ctx.mark_non_differentiable(experts_TK)
        return affinity_TE, experts_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_TD, unit_D, length_D, mean_D, affinity_TE, inverse_T = ctx.saved_tensors
        saved = (rows_TD, unit_D, mean_D, affinity_TE, inverse_T)
        d_rows_TD, d_unit_D = torch.ops.megamoe.grap_bwd(grads[0].contiguous(), *saved)
        d_values_D = None
        if ctx.needs_input_grad[2]:
            d_values_D = through_length(d_unit_D, unit_D, length_D, affinity_TE.shape[1])
        return d_rows_TD, None, d_values_D, None, None


def with_choice(
    rows_TD: Tensor, mean_D: Tensor | None, values_D: Tensor | None, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """As :func:`megamoe.ops.affinity.reference`, and the choice of each token from the same pass.

    Returns:
        Affinity [T, E], and the experts of its K largest values, int32 [T, K], largest first; of equal ones the lower
        expert. Nothing waits for the device.
    """
    like = at_least_fp32(rows_TD[:0])
    mean_D = like.new_zeros(rows_TD.shape[1]) if mean_D is None else mean_D.detach().to(like)
    values_D = like.new_ones(rows_TD.shape[1]) if values_D is None else values_D.to(like)
    affinity_TE, experts_TK = _KernelAffinity.apply(rows_TD, mean_D, values_D, num_experts, top_k)
    return affinity_TE, experts_TK


def compiled(rows_TD: Tensor, mean_D: Tensor | None, values_D: Tensor | None, num_experts: int) -> Tensor:
    """As :func:`megamoe.ops.affinity.reference`; the fastest one where it can run."""
    return with_choice(rows_TD, mean_D, values_D, num_experts, top_k=0)[0]


def compiled_takes(device: torch.device, num_experts: int, hidden_size: int) -> bool:
    """A GPU's block keeps a token's slices in the memory that its threads share."""
    return device.type != "cuda" or (num_experts <= LARGEST_ON_GPU[0] and hidden_size <= LARGEST_ON_GPU[1])


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why the compiled op cannot run there; empty: it can."""
    return without_kernels("grap_fwd", device, dtype)
