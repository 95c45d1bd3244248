"""Op `expert_ffn` on some of a rank's experts at a time, the gradients of their weights after everything else.

A backward pass in chunks sends the gradients of a chunk's rows on as soon as it has them, and nobody waits for those of
the weights: they fill the time that the last exchanges need (ours; that they can wait is Megatron's
`--delay-wgrad-compute`).

The engine of autograd runs, of the nodes that could run, the one whose forward pass was the latest. So the order of the
forward pass is the schedule of the backward one: what is called after `Chunks` was made runs before the weights'
gradients, and what was called before it after them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops.memory import recycled_like

Weights = tuple[Tensor, Tensor, Tensor]
"""w1 [L, F, D], w2 [L, D, F], w3 [L, F, D]; or their gradients."""
Later = Callable[[Weights], None]
"""Writes the gradients of some experts' weights where it is told."""


@dataclass(frozen=True)
class Split:
    """An implementation of the op in two steps, forward and backward."""

    forward: Callable[[Tensor, Tensor, Weights, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
    """Rows, gate weights, weights and rows of each expert, to results and what the backward pass needs of them."""
    backward: Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...], Weights, Tensor], tuple[Tensor, Tensor, Later]]
    """Gradients of the results, then the same, what `forward` kept after the gate weights: to gradients of the rows and
    of the gate weights, and how to compute those of the weights."""

    def __call__(self, weights: Weights) -> Chunks:
        """For one pass."""
        return Chunks(self, weights)


class Chunks:
    """The experts of a rank for one pass, each of them called once.

    Args:
        weights: the parameters. Looked at again in the backward pass, when their values may lie elsewhere (ZeRO-3).
    """

    def __init__(self, split: Split, weights: Weights) -> None:
        self._split, self._weights, self._later = split, weights, dict[int, _Work]()
        self._ticket: Tensor = _WeightGradients.apply(*weights, self._later)

    def __call__(self, experts: slice, rows_RD: Tensor, weights_R: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        """As :func:`megamoe.ops.expert_ffn.reference`, of those experts.

        Args:
            experts: their numbers on this rank, start and stop given.
        """
        of = _Of(self._split, self._weights, experts, self._later)
        return _SomeExperts.apply(rows_RD, weights_R, self._ticket, rows_per_expert_L, of)


class _Work(NamedTuple):
    """On the gradients of some experts' weights."""

    experts: slice
    compute: Later


class _Of(NamedTuple):
    split: Split
    weights: Weights
    experts: slice
    later: dict[int, _Work]
    """By the first expert."""

    def own_weights(self) -> Weights:
        w1, w2, w3 = (w.detach()[self.experts] for w in self.weights)
        return w1, w2, w3


class _SomeExperts(torch.autograd.Function):
    """The ticket has no values: its gradient says that the weights' gradients can be computed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ticket: Tensor, counts: Tensor, of: _Of) -> Tensor:
        out, kept = of.split.forward(rows, weights, of.own_weights(), counts)
        ctx.save_for_backward(rows, weights, counts, *kept)
        ctx.of = of
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, counts, *kept = ctx.saved_tensors
        of: _Of = ctx.of
        d_rows, d_weights, later = of.split.backward(grads[0], rows, weights, tuple(kept), of.own_weights(), counts)
        if ctx.needs_input_grad[2]:
            of.later[of.experts.start] = _Work(of.experts, later)
        return d_rows, d_weights, rows.new_empty(0), None, None


class _WeightGradients(torch.autograd.Function):
    """Nothing in the forward pass."""

    @staticmethod
    def forward(ctx: Any, w1: Tensor, w2: Tensor, w3: Tensor, later: dict[int, _Work]) -> Tensor:
        ctx.weights, ctx.later = (w1, w2, w3), later
        return w1.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_weights = [recycled_like(w) for w in ctx.weights]
        while ctx.later:
            _, work = ctx.later.popitem()
            d_w1, d_w2, d_w3 = (d_w[work.experts] for d_w in d_weights)
            work.compute((d_w1, d_w2, d_w3))
            del work  # and with it the rows
        return *d_weights, None
