"""Op `linear_cross_entropy`: output projection and cross entropy together, a few rows at a time.

The logits of all rows at once are the largest tensor of a training step (T * V). Here at most `chunk_size` rows have
logits at one time, and the gradients are formed while those are at hand, so nothing is computed twice. (Ours; the idea
of forming the gradient in the forward pass is that of Liger-Kernel's fused linear cross entropy.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops.precision import at_least_fp32


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_size: int = 1024, targets: float | None = None
) -> Tensor:
    """Mean cross entropy in nats of `softmax(hidden @ weight.T)` against `labels`, fp32 scalar (fp64 of fp64 inputs).

    Args:
        hidden_TD: [T, D].
        weight_VD: [V, D], same dtype.
        labels_T: int64 [T], each in [0, V).
        chunk_size: rows whose logits exist at one time; 0: all.
        targets: what the sum over rows is divided by; None: T.
    """
    # Asked here: inside the function, grad mode is always off and inputs tell nothing of torch.no_grad().
    wants_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    chunk_size = chunk_size or max(1, hidden_TD.shape[0])
    divisor = float(hidden_TD.shape[0]) if targets is None else targets
    wanted = wants_grad, wants_grad and weight_VD.requires_grad
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, chunk_size, divisor, *wanted)


@torch.no_grad()
def token_scores(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Every row by itself, without gradients: cross entropy, [T] in fp32 or fp64, and whether the label is the
    likeliest entry, bool [T]. Arguments as above."""
    losses, right = [at_least_fp32(hidden_TD.new_zeros(0))], [labels_T.new_zeros(0, dtype=torch.bool)]
    chunk_size = chunk_size or max(1, hidden_TD.shape[0])
    for hidden, labels in zip(hidden_TD.split(chunk_size), labels_T.split(chunk_size), strict=True):
        logits = at_least_fp32(F.linear(hidden, weight_VD))
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        right.append(logits.argmax(-1) == labels)
    return torch.cat(losses), torch.cat(right)


def reference(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """The specification, with all logits at once."""
    return F.cross_entropy(at_least_fp32(F.linear(hidden_TD, weight_VD)), labels_T)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        chunk_size: int,
        divisor: float,
        wants_grad: bool,
        wants_d_weight: bool,
    ) -> Tensor:
        rows = hidden_TD.shape[0]
        total = at_least_fp32(hidden_TD.new_zeros(()))
        d_hidden = torch.empty_like(hidden_TD) if wants_grad else None
        # The weight's gradient is a sum over chunks, so it is kept in fp32 where the weight is in less.
        d_weight = torch.zeros_like(weight_VD, dtype=total.dtype) if wants_d_weight else None
        for start in range(0, rows, chunk_size):
            block = slice(start, start + chunk_size)
            logits = at_least_fp32(torch.mm(hidden_TD[block], weight_VD.t()))
            labels = labels_T[block, None]
            log_norm = logits.logsumexp(-1, keepdim=True)
            total += (log_norm - logits.gather(1, labels)).sum()
            if d_hidden is None:
                continue
            d_logits = logits.sub_(log_norm).exp_()
            d_logits.scatter_add_(1, labels, d_logits.new_full(labels.shape, -1.0))
            d_logits = d_logits.mul_(1.0 / divisor).to(hidden_TD.dtype)
            torch.mm(d_logits, weight_VD, out=d_hidden[block])
            if d_weight is not None:
                _accumulate(d_weight, d_logits, hidden_TD[block])
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight_VD.dtype) if d_weight is not None else None)
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        d_weight = d_weight * scale.to(d_weight.dtype) if d_weight is not None else None
        return d_hidden * scale.to(d_hidden.dtype), d_weight, None, None, None, None, None


def _accumulate(total_VD: Tensor, d_logits_TV: Tensor, hidden_TD: Tensor) -> None:
    if total_VD.dtype == d_logits_TV.dtype:
        total_VD.addmm_(d_logits_TV.t(), hidden_TD)
    else:
        total_VD.add_(torch.mm(d_logits_TV.t(), hidden_TD))
