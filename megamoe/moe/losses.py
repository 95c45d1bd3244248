"""Auxiliary losses: pure functions of what the router computed, fp32 scalars, each a mean over the rows given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megamoe.ops.precision import at_least_fp32


def balance_loss(probs_TE: Tensor, chosen_per_expert_E: Tensor) -> Tensor:
    """E * sum_i f_i * P_i; 1 when balanced (Switch, arXiv 2101.03961, eq. 4; ETR, arXiv 2406.00023).

    f_i: share of the tokens' choices that expert i got, before any drop; no gradient passes through it.
    P_i: mean gate probability of expert i.
    """
    share_E = chosen_per_expert_E.to(probs_TE.dtype) / chosen_per_expert_E.sum().clamp_min(1)
    return probs_TE.shape[1] * torch.dot(share_E, mean_rows(probs_TE))


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean of logsumexp(logits)^2, which keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])


def orthogonality_loss(vectors_ED: Tensor) -> Tensor:
    """Mean squared cosine between different expert vectors, 0 when orthogonal (ours; for dense affinity vectors)."""
    num_experts = vectors_ED.shape[0]
    unit_ED = torch.nn.functional.normalize(at_least_fp32(vectors_ED), dim=-1)
    gram_EE = unit_ED @ unit_ED.t()
    off_diagonal = gram_EE - torch.diag(torch.diagonal(gram_EE))
    return off_diagonal.square().sum() / max(1, num_experts * (num_experts - 1))


def with_gradient_share(loss: Tensor, share: float) -> Tensor:
    """The loss with its gradient multiplied by `share`; its value stays."""
    return loss if share == 1.0 else loss.detach() + share * (loss - loss.detach())


def locality_loss(probs_TE: Tensor, local_E: Tensor, smoothing: float) -> Tensor:
    """KL(D_c || D_l), 0 iff equal (LocMoE, arXiv 2401.13920).

    D_c: mean gate probability of each expert over the rows given. D_l: all on the experts of this node. Ours:
    strictly that KL is infinite, so experts elsewhere share epsilon = smoothing * (1 - n_local / E) of D_l.

    Args:
        local_E: bool, whether an expert is on this node. If all are, D_l is uniform: a balance loss.
    """
    num_experts, num_local = local_E.numel(), local_E.sum().to(probs_TE.dtype)
    epsilon = smoothing * (1 - num_local / num_experts)
    elsewhere = epsilon / (num_experts - num_local).clamp_min(1)
    target_E = torch.where(local_E, (1 - epsilon) / num_local.clamp_min(1), elsewhere)
    load_E = mean_rows(probs_TE)
    # Not xlogy, whose gradient at 0 is not a number.
    return torch.dot(load_E, load_E.clamp_min(torch.finfo(load_E.dtype).tiny).log() - target_E.log())


def entropy(probs_TE: Tensor) -> Tensor:
    """Mean entropy of the router's distribution over its maximum ln E, in [0, 1]. Takes no gradient."""
    probs_TE = probs_TE.detach()
    # Not special.entr, which takes ten times as long for its care about negative numbers.
    nats = -torch.dot(probs_TE.flatten(), probs_TE.clamp_min(torch.finfo(probs_TE.dtype).tiny).log().flatten())
    return nats / (max(1, probs_TE.shape[0]) * math.log(max(2, probs_TE.shape[1])))


def mean_rows(rows_TE: Tensor) -> Tensor:
    """Mean over rows, zero for no rows (a rank may hold none)."""
    return rows_TE.sum(0) / max(1, rows_TE.shape[0])
