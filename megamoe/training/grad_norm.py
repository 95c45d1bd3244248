"""Gradient clipping by the global norm where experts are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megamoe.moe.marker import is_expert
from megamoe.ops.precision import at_least_fp32
from megamoe.parallel.collectives import all_reduce_sum
from megamoe.parallel.groups import Groups


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, groups: Groups) -> Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm`; 0 only measures.

    The gradients are reduced already, so dense ones are equal on all ranks; experts differ over the expert-parallel
    group, and their squared norms are summed over it. Every rank gets the same norm.

    Returns:
        The norm before clipping, fp32 scalar; fp64 where gradients are.
    """
    gradients = [(is_expert(p), p.grad) for p in parameters if p.grad is not None]
    zero = at_least_fp32(gradients[0][1]).new_zeros(()) if gradients else torch.zeros(())
    dense, expert = (_squared_norm([g for e, g in gradients if e is kind], zero) for kind in (False, True))
    all_reduce_sum(expert, groups.ep.handle)
    norm = (dense + expert).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
        for _, gradient in gradients:
            gradient.mul_(scale.to(gradient))
    return norm


def _squared_norm(gradients: list[Tensor], zero: Tensor) -> Tensor:
    return torch.stack([zero, *(at_least_fp32(g).square().sum() for g in gradients)]).sum()
