"""Shapes and gradients of permute_rows, unpermute_rows, unpermute_bwd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.megamoe


@torch.library.register_fake("megamoe::permute_rows")
def _permute_shape(
    x: Tensor, source: Tensor, place: Tensor, values: Tensor | None = None, empty: float = -1.0
) -> Tensor:
    more = 0 if values is None else max(1, values.dtype.itemsize // x.dtype.itemsize)
    return x.new_empty(source.shape[0], x.shape[1] + more)


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, source, place, values, _ = inputs
    if values is not None:
        raise NotImplementedError("megamoe::permute_rows has no gradient where values travel with the rows")
    ctx.save_for_backward(source, place)


def _permute_backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    source, place = ctx.saved_tensors
    return _ops.unpermute_rows(d_y.contiguous(), place, source), None, None, None, None


torch.library.register_autograd("megamoe::permute_rows", _permute_backward, setup_context=_save_permute)


@torch.library.register_fake("megamoe::unpermute_rows")
def _unpermute_shape(y: Tensor, place: Tensor, source: Tensor, weights: Tensor | None = None) -> Tensor:
    return y.new_empty(place.shape[0], y.shape[1])


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, place, source, weights = inputs
    # Without weights the gradient needs no rows: they are not kept.
    ctx.save_for_backward(None if weights is None else y, place, source, weights)


def _unpermute_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    y, place, source, weights = ctx.saved_tensors
    d_out = d_out.contiguous()
    if weights is None:
        return _ops.permute_rows(d_out, source, place), None, None, None
    d_y, d_weights = _ops.unpermute_bwd(d_out, y, place, source, weights)
    return d_y, None, None, d_weights


torch.library.register_autograd("megamoe::unpermute_rows", _unpermute_backward, setup_context=_save_unpermute)


@torch.library.register_fake("megamoe::unpermute_bwd")
def _unpermute_bwd_shape(
    dout: Tensor, y: Tensor, place: Tensor, source: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return y.new_empty(source.shape[0], y.shape[1]), torch.empty_like(weights)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("megamoe::unpermute_bwd is itself a gradient and has none of its own")


# Without this, torch would only warn and go on without the gradient.
torch.library.register_autograd("megamoe::unpermute_bwd", _no_second_gradient)
