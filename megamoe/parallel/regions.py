"""Communication inside the model, with its backward pass: the borders between regions that hold different parts.

Activations are batch first and the sequence is dim 1. On an axis of size 1 every function gives back its argument. All
ranks of the axis call the same functions in the same order; their graphs are alike, so backward passes meet too.
(Ours, after the conjugate pairs of Megatron-LM, arXiv 1909.08053 and 2205.05198: what one direction gathers, the other
reduces and scatters.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megamoe.parallel.axis import Axis

# Named all_gather_into_tensor and reduce_scatter_tensor before torch 2.13, which warns of those names at every call.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

_HOW = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """[B, s, ...] of every rank -> [B, s*P, ...] in rank order; backward: the ranks' gradients summed, own part."""
    return x if axis.size == 1 else _GatherSequence.apply(x, axis)


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """[B, s*P, ...] partial sums -> [B, s, ...], own part of their sum over ranks; backward: all-gather.

    Raises:
        RuntimeError: where P does not divide the sequence.
    """
    return x if axis.size == 1 else _ReduceScatterSequence.apply(x, axis)


def gather_shared(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """All ranks' tensors along `dim`, in rank order, for a use that is the same on every rank.

    Every rank then has the whole gradient, so backward takes the own part of it and communicates nothing.
    """
    return x if axis.size == 1 else _GatherShared.apply(x, axis, dim % x.dim())


def sum_partials(x: Tensor, axis: Axis) -> Tensor:
    """Sum over ranks, for a use that is the same on every rank; backward: identity."""
    return x if axis.size == 1 else _SumPartials.apply(x, axis)


def sum_gradients(x: Tensor, axis: Axis) -> Tensor:
    """Identity, for a tensor that is equal on every rank and that each uses differently; backward: sum over ranks."""
    return x if axis.size == 1 else _SumGradients.apply(x, axis)


def sum_replicated_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """From now on, sum the gradient of each over the axis as it arrives. In the gradient's dtype.

    For parameters that every rank holds whole and applies to its own tokens only. Every backward pass must reach the
    same of them on every rank, for each sum is one collective. Once per parameter: a second call would sum twice.
    """
    if axis.size == 1:
        return
    for parameter in parameters:
        parameter.register_hook(lambda gradient: reduced(gradient, axis))


def reduced(x: Tensor, axis: Axis, how: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Combined element by element over ranks, a new tensor (`x` itself where the rank is alone). Has no backward."""
    if axis.size == 1:
        return x
    result = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=_HOW[how], group=axis.group)
    return result


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather(x, axis, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(grads[0], ctx.axis), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _scatter_sum(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.axis, 1), None


class _GatherShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _gather(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank], None, None


class _SumPartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return reduced(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduced(grads[0], ctx.axis), None


def _gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The ranks' tensors one after the other along `dim`. Copied once more only where a dim before it is not 1."""
    parts = x.new_empty(axis.size, *x.shape)
    _all_gather(parts.view(-1), x.contiguous().view(-1), group=axis.group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    """The own part of the sum over ranks, along dim 1. Copied first only if there is more than one sequence."""
    parts = x.unflatten(1, (axis.size, -1)).movedim(1, 0).contiguous()
    own = parts.new_empty(parts.shape[1:])
    _reduce_scatter(own.view(-1), parts.view(-1), group=axis.group)
    return own
