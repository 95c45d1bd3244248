"""Embedding, and output projection with cross entropy, over a vocabulary that is cut into equal parts over ranks.

Rank p holds the entries p*V/P ... (p+1)*V/P - 1. Tokens, labels and hidden rows are whole and equal on all ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megamoe.parallel.axis import Axis
from megamoe.parallel.linear import mark_part, share
from megamoe.parallel.regions import reduced


class VocabParallelEmbedding(nn.Embedding):
    """Rows of the table [V, D] by token, weight [V/P, D].

    Raises:
        TopologyError: where P does not divide V.
    """

    def __init__(self, vocab_size: int, hidden: int, tp: Axis) -> None:
        super().__init__(share(vocab_size, tp, f"{vocab_size} vocabulary entries"), hidden)
        self.tp = tp
        mark_part(self.weight, 0, tp)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """[B, S] -> [B, S, D], zero rows where another rank holds the entry; the caller adds the ranks' up."""
        if self.tp.size == 1:
            return super().forward(tokens_BS)
        local_BS, elsewhere_BS = _place(tokens_BS, self.num_embeddings, self.tp)
        return F.embedding(local_BS, self.weight).masked_fill_(elsewhere_BS.unsqueeze(-1), 0.0)


def vocab_parallel_cross_entropy(
    hidden_TD: Tensor,
    weight_VD_part: Tensor,
    labels_T: Tensor,
    tp: Axis,
    chunk_size: int = 1024,
    targets: float | None = None,
) -> Tensor:
    """Mean cross entropy in nats of `softmax(hidden @ weight.T)` over the whole vocabulary against `labels`.

    fp32 scalar (fp64 of fp64 inputs), equal on all ranks. Backward, which takes the same factor on all ranks: of the
    weight part the whole gradient, of the hidden rows this rank's partial sum; the `gather_sequence` they came from
    adds the ranks' up. Two small all-reduces per chunk, none in backward.

    Args:
        hidden_TD: [T, D].
        weight_VD_part: [V/P, D], same dtype.
        labels_T: int64 [T], each in [0, V).
        chunk_size: rows whose logits exist at one time; 0: all.
        targets: what the sum over rows is divided by; None: T.
    """
    # Asked here: inside the function, grad mode is always off and inputs tell nothing of torch.no_grad().
    wants_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD_part.requires_grad)
    wanted = wants_grad, wants_grad and weight_VD_part.requires_grad
    chunk_size = chunk_size or max(1, hidden_TD.shape[0])
    divisor = float(hidden_TD.shape[0]) if targets is None else targets
    return _CrossEntropy.apply(hidden_TD, weight_VD_part, labels_T, tp, chunk_size, divisor, *wanted)


@torch.no_grad()
def vocab_parallel_scores(
    hidden_TD: Tensor, weight_VD_part: Tensor, labels_T: Tensor, tp: Axis, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Every row by itself, without gradients: cross entropy, [T] in fp32 or fp64, and whether the label is the
    likeliest entry (of equal ones the first), bool [T]. Equal on all ranks; arguments as above."""
    losses, right = [_wide(hidden_TD.new_zeros(0))], [labels_T.new_zeros(0, dtype=torch.bool)]
    chunk_size = chunk_size or max(1, hidden_TD.shape[0])
    for hidden, labels in zip(hidden_TD.split(chunk_size), labels_T.split(chunk_size), strict=True):
        logits = _wide(F.linear(hidden, weight_VD_part))
        right.append(_likeliest(logits, tp) == labels)
        losses.append(_softmax(logits, labels, tp).losses_T)
    return torch.cat(losses), torch.cat(right)


class _Softmax(NamedTuple):
    """Of one chunk; everything but what is named local is equal on all ranks."""

    losses_T: Tensor
    probabilities_TV: Tensor
    """Local: of this rank's entries."""
    local_T: Tensor
    """Local: the label's column, 0 where another rank holds it."""
    elsewhere_T: Tensor
    """Local: another rank holds the label."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        tp: Axis,
        chunk_size: int,
        divisor: float,
        wants_grad: bool,
        wants_d_weight: bool,
    ) -> Tensor:
        total = _wide(hidden_TD.new_zeros(()))
        d_hidden = torch.empty_like(hidden_TD) if wants_grad else None
        # The weight's gradient is a sum over chunks, so it is kept in fp32 where the weight is in less.
        d_weight = torch.zeros_like(weight_VD, dtype=total.dtype) if wants_d_weight else None
        for start in range(0, hidden_TD.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            softmax = _softmax(_wide(torch.mm(hidden_TD[rows], weight_VD.t())), labels_T[rows], tp)
            total += softmax.losses_T.sum()
            if d_hidden is None:
                continue
            d_logits = _d_logits(softmax).mul_(1.0 / divisor).to(hidden_TD.dtype)
            torch.mm(d_logits, weight_VD, out=d_hidden[rows])
            if d_weight is not None:
                _accumulate(d_weight, d_logits, hidden_TD[rows])
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight_VD.dtype) if d_weight is not None else None)
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        d_weight = d_weight * scale.to(d_weight.dtype) if d_weight is not None else None
        return d_hidden * scale.to(d_hidden.dtype), d_weight, None, None, None, None, None, None


def _softmax(logits_TV: Tensor, labels_T: Tensor, tp: Axis) -> _Softmax:
    """Softmax over the vocabulary of all ranks; overwrites the logits."""
    local_T, elsewhere_T = _place(labels_T, logits_TV.shape[1], tp)
    # Relative to the row's maximum over all ranks, so that no exponential overflows and the largest is 1.
    logits_TV.sub_(reduced(logits_TV.amax(-1), tp, "max").unsqueeze(-1))
    label_T = logits_TV.gather(1, local_T.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere_T, 0.0)
    exponentials_TV = logits_TV.exp_()
    norm_T, label_T = reduced(torch.stack([exponentials_TV.sum(-1), label_T]), tp)
    probabilities_TV = exponentials_TV.div_(norm_T.unsqueeze(-1))
    return _Softmax(norm_T.log() - label_T, probabilities_TV, local_T, elsewhere_T)


def _d_logits(softmax: _Softmax) -> Tensor:
    """Gradient of the sum of the losses: probability, less 1 at the label. Overwrites the probabilities."""
    minus_one_T = (~softmax.elsewhere_T).to(softmax.probabilities_TV.dtype).neg_()
    return softmax.probabilities_TV.scatter_add_(1, softmax.local_T.unsqueeze(-1), minus_one_T.unsqueeze(-1))


def _likeliest(logits_TV: Tensor, tp: Axis) -> Tensor:
    """Entry with the largest logit, the first of equal ones, int64 [T]."""
    part, (largest_T, local_T) = logits_TV.shape[1], logits_TV.max(-1)
    is_largest_T = largest_T == reduced(largest_T, tp, "max")
    return reduced(torch.where(is_largest_T, local_T + tp.rank * part, tp.size * part), tp, "min")


def _place(entries: Tensor, part: int, tp: Axis) -> tuple[Tensor, Tensor]:
    """Numbers inside this rank's part of `part` entries (0 for those of other ranks), and which are of other ranks.

    A number that no rank holds stays with the first or the last, where it fails as an index, as it does in one process.
    """
    owner = entries.div(part, rounding_mode="floor").clamp_(0, tp.size - 1)
    elsewhere = owner != tp.rank
    return (entries - tp.rank * part).masked_fill_(elsewhere, 0), elsewhere


def _wide(tensor: Tensor) -> Tensor:
    """fp32 at least. Not at_least_fp32: ops/ stands beside this room."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _accumulate(total_VD: Tensor, d_logits_TV: Tensor, hidden_TD: Tensor) -> None:
    if total_VD.dtype == d_logits_TV.dtype:
        total_VD.addmm_(d_logits_TV.t(), hidden_TD)
    else:
        total_VD.add_(torch.mm(d_logits_TV.t(), hidden_TD))
