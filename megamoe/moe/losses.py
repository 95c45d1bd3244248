"""Auxiliary losses: pure functions of what the router computed, fp32 scalars, each a mean over the rows given."""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(probs_TE: Tensor, chosen_per_expert_E: Tensor) -> Tensor:
    """E * sum_i f_i * P_i; 1 when balanced (Switch, arXiv 2101.03961, eq. 4; ETR, arXiv 2406.00023).

    f_i: share of the tokens' choices that expert i got, before any drop; no gradient passes through it.
    P_i: mean gate probability of expert i.
    """
    share_E = chosen_per_expert_E.to(torch.float32) / chosen_per_expert_E.sum().clamp_min(1)
    return probs_TE.shape[1] * torch.dot(share_E, mean_rows(probs_TE))


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean of logsumexp(logits)^2, which keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])


def orthogonality_loss(vectors_ED: Tensor) -> Tensor:
    """Mean squared cosine between different expert vectors, 0 when orthogonal (ours; for dense affinity vectors)."""
    num_experts = vectors_ED.shape[0]
    unit_ED = torch.nn.functional.normalize(vectors_ED.float(), dim=-1)
    gram_EE = unit_ED @ unit_ED.t()
    off_diagonal = gram_EE - torch.diag(torch.diagonal(gram_EE))
    return off_diagonal.square().sum() / max(1, num_experts * (num_experts - 1))


def entropy(probs_TE: Tensor) -> Tensor:
    """Mean entropy of the router's distribution over its maximum ln E, in [0, 1]."""
    nats_T = torch.special.entr(probs_TE).sum(-1)
    return nats_T.sum() / (max(1, probs_TE.shape[0]) * torch.log(torch.tensor(float(max(2, probs_TE.shape[1])))))


def mean_rows(rows_TE: Tensor) -> Tensor:
    """Mean over rows, zero for no rows (a rank may hold none)."""
    return rows_TE.sum(0) / max(1, rows_TE.shape[0])
