"""Gradient clipping by the global norm where parameters are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megamoe.moe.marker import is_expert
from megamoe.ops.precision import at_least_fp32
from megamoe.parallel.collectives import all_reduce_sum
from megamoe.parallel.groups import Groups
from megamoe.parallel.shards import shards_of


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, groups: Groups) -> Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm`; 0 only measures.

    The gradients are reduced already. Those of whole parameters are equal on all ranks; of parameters that are cut over
    ranks each holds a part, and squared norms are summed over the group that holds them once. Every rank gets the same
    norm.

    Returns:
        The norm before clipping, fp32 scalar; fp64 where gradients are.
    """
    gradients = [(_spread_over(p), p.grad) for p in parameters if p.grad is not None]
    like = at_least_fp32(gradients[0][1]) if gradients else torch.zeros(())
    # In fp64, so that how parameters are spread does not show but where a sum lies at an edge of fp32's rounding.
    zero = like.new_zeros((), dtype=torch.float64)
    whole, tp, experts = (_squared_norm([g for s, g in gradients if s == kind], zero) for kind in ("", "tp", "experts"))
    all_reduce_sum(tp, groups.tp.handle)
    all_reduce_sum(experts, groups.experts.handle)
    norm = all_reduce_sum(whole + tp + experts, groups.pp.handle).sqrt().to(like.dtype)
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
        for _, gradient in gradients:
            gradient.mul_(scale.to(gradient))
    return norm


def _spread_over(parameter: nn.Parameter) -> str:
    """The group whose ranks together hold the parameter once."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return "another stage"
    if is_expert(parameter):
        return "experts"
    return "tp" if shards_of(parameter) else ""


def _squared_norm(gradients: list[Tensor], zero: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(g, dtype=zero.dtype) for g in gradients]
    return torch.stack([zero, *norms]).square().sum()
