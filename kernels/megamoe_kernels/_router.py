"""Shapes and gradients of grap_fwd, grap_bwd, router_fwd and router_bwd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.megamoe


def _wide(x: Tensor) -> torch.dtype:
    """In which the rows are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("megamoe::grap_fwd")
def _grap_fwd(x: Tensor, unit: Tensor, mean: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    return (
        x.new_empty(tokens, num_experts, dtype=_wide(x)),
        x.new_empty(tokens, dtype=_wide(x)),
        x.new_empty(tokens, top_k, dtype=torch.int32),
    )


@torch.library.register_fake("megamoe::grap_bwd")
def _grap_bwd(
    grad: Tensor, x: Tensor, unit: Tensor, mean: Tensor, affinity: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(unit)


def _save_grap(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, unit, mean, _, _ = inputs
    affinity, inverse, experts = output
    _no_gradient(ctx, "grap_fwd", mean, inverse, experts)
    ctx.save_for_backward(x, unit, mean, affinity, inverse)


def _grap_gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, unit, mean, affinity, inverse = ctx.saved_tensors
    dx, d_unit = _ops.grap_bwd(grad.contiguous(), x, unit, mean, affinity, inverse)
    return dx, d_unit, None, None, None


torch.library.register_autograd("megamoe::grap_fwd", _grap_gradients, setup_context=_save_grap)


@torch.library.register_fake("megamoe::router_fwd")
def _router_fwd(
    x: Tensor, vectors: Tensor, mean: Tensor | None, normalize: bool, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    return (
        x.new_empty(tokens, vectors.shape[0], dtype=_wide(x)),
        x.new_empty(tokens if normalize else 0, dtype=_wide(x)),
        x.new_empty(tokens, top_k, dtype=torch.int32),
    )


@torch.library.register_fake("megamoe::router_bwd")
def _router_bwd(
    grad: Tensor, x: Tensor, vectors: Tensor, mean: Tensor | None, normalize: bool, scores: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(vectors)


def _save_router(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, vectors, mean, ctx.normalize, _ = inputs
    scores, inverse, experts = output
    _no_gradient(ctx, "router_fwd", mean, inverse, experts)
    ctx.save_for_backward(x, vectors, mean, scores, inverse)


def _router_gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, vectors, mean, scores, inverse = ctx.saved_tensors
    dx, d_vectors = _ops.router_bwd(grad.contiguous(), x, vectors, mean, ctx.normalize, scores, inverse)
    return dx, d_vectors, None, None, None


torch.library.register_autograd("megamoe::router_fwd", _router_gradients, setup_context=_save_router)


def _no_gradient(ctx: Any, op: str, mean: Tensor | None, *outputs: Tensor) -> None:
    """Of the mean, which is a running statistic, and of what comes out beside the scores."""
    if mean is not None and mean.requires_grad:
        raise RuntimeError(
            f"megamoe::{op}: argument mean has no gradient.\n  expected: a tensor without one, .detach()"
        )
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(True)
