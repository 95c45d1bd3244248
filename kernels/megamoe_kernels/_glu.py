"""Shapes and gradients of glu_fwd and glu_bwd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.megamoe


@torch.library.register_fake("megamoe::glu_fwd")
def _glu_shape(
    h1: Tensor, h3: Tensor, weights: Tensor | None = None, counts: Tensor | None = None, kind: str = "swiglu"
) -> Tensor:
    return h1.new_empty(h1.shape)


@torch.library.register_fake("megamoe::glu_bwd")
def _glu_bwd_shape(
    dact: Tensor,
    h1: Tensor,
    h3: Tensor,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    kind: str = "swiglu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if h1.dtype == torch.float64 else torch.float32
    d_weights = h1.new_empty(0 if weights is None else h1.shape[0], dtype=wide)
    return h1.new_empty(h1.shape), h1.new_empty(h1.shape), d_weights, h1.new_empty(h1.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h1, h3, weights, counts, ctx.kind = inputs
    ctx.save_for_backward(h1, h3, weights, counts)


def _backward(ctx: Any, d_act: Tensor) -> tuple[Tensor | None, ...]:
    h1, h3, weights, counts = ctx.saved_tensors
    d_h1, d_h3, d_weights, _ = _ops.glu_bwd(d_act.contiguous(), h1, h3, weights, counts, ctx.kind)
    return d_h1, d_h3, None if weights is None else d_weights, None, None


torch.library.register_autograd("megamoe::glu_fwd", _backward, setup_context=_save)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("megamoe::glu_bwd is itself a gradient and has none of its own")


# Without this, torch would only warn and go on without the gradient.
torch.library.register_autograd("megamoe::glu_bwd", _no_second_gradient)
