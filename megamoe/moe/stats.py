"""Statistics that a layer reports: pure functions of what was routed, each value with its reduction."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.moe.types import Reduction
from megamoe.ops.precision import at_least_fp32

Metrics = dict[str, tuple[Tensor, Reduction]]

HISTOGRAM_BINS = 32
HISTOGRAM_REACH = 8.0
"""Affinities are shown times sqrt(D), from -8 to 8: random tokens have standard deviation 1 there for any D."""


def dispatch_metrics(
    rows_per_expert_E: Tensor,
    served_T: Tensor,
    top_k: int,
    on_node_E: Tensor | None,
    broadcast_T: Tensor | None = None,
) -> Metrics:
    """Load and losses of a plan.

    Args:
        rows_per_expert_E: broadcast rows included.
        served_T: experts that took each token; of the assignments alone.
        broadcast_T: bool, tokens that lack nothing because they are broadcast; None: there are none.

    Returns:
        `load`: rows of each expert, 1 is the balanced K * T / E. `max_load`: the largest. `drop_share`: of the tokens'
        K choices, those without an expert; what a token gets beyond K makes up for nothing. `unserved_share`: tokens
        without any expert. `node_share`: of the rows, those whose expert is on this node; left out where all experts
        are (`on_node_E` None).
    """
    num_tokens = len(served_T)
    chosen = max(1, num_tokens * top_k)
    if broadcast_T is not None:
        served_T = served_T.masked_fill(broadcast_T, top_k)
    load_E = rows_per_expert_E.float() * (len(rows_per_expert_E) / chosen)
    metrics: Metrics = {
        "drop_share": ((top_k - served_T).clamp_min(0).sum() / chosen, "mean"),
        "unserved_share": ((served_T == 0).sum() / max(1, num_tokens), "mean"),
        "max_load": (load_E.max(), "max"),
        "load": (load_E, "mean"),
    }
    if on_node_E is not None:
        rows = rows_per_expert_E.float()
        metrics["node_share"] = ((rows * on_node_E).sum() / rows.sum().clamp_min(1), "mean")
    return metrics


def affinity_histogram(affinity_TK: Tensor, hidden_size: int) -> Tensor:
    """Share of the tokens' choices whose affinity times sqrt(D) lies in each of 32 even bins over [-8, 8], fp32 [32].

    The first and last bin hold what lies beyond.
    """
    edge = HISTOGRAM_REACH * (1 - 1e-6)
    scaled = (at_least_fp32(affinity_TK) * math.sqrt(hidden_size)).clamp(-edge, edge)
    counts = torch.histc(scaled, HISTOGRAM_BINS, -HISTOGRAM_REACH, HISTOGRAM_REACH)
    return counts / max(1, affinity_TK.numel())


def expert_similarity(vectors_ED: Tensor) -> Tensor:
    """Mean absolute cosine between different experts' vectors: 0 when orthogonal, 1 when all point the same way."""
    unit_ED = F.normalize(at_least_fp32(vectors_ED.detach()), dim=-1)
    num_experts = unit_ED.shape[0]
    total = (unit_ED @ unit_ED.t()).abs().sum() - unit_ED.square().sum()
    return total / max(1, num_experts * (num_experts - 1))
