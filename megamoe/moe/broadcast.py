"""GW-MoE (arXiv 2406.12375): in training, tokens whose routing is uncertain go to all experts."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megamoe.config.moe import BroadcastConfig
from megamoe.moe.capacity import Drop, keep_within
from megamoe.moe.decisions import best
from megamoe.moe.stats import Metrics
from megamoe.moe.types import BroadcastRows

ENTROPY_BINS = 32


class Broadcast(nn.Module):
    """Which tokens are broadcast, and with which weights. Inactive outside of training.

    1. A token is uncertain if the entropy of its router's whole distribution is at least the threshold.
    2. Of the uncertain tokens of a sequence, at most ceil(max_share * its length) get a slot: the first ones (as
       released), or those of highest entropy (ours). The others are routed as usual. Padding is never uncertain.
    3. A token with a slot gets sum_i g_i E_i(x) instead of its top-k output, g the distribution over all experts.

    Args:
        config: what counts as uncertain, slots, weights.
        num_experts: E.
        layer: number of the block, so that random choices differ between blocks.
        plan: implementation of the op that gives slots.
    """

    threshold: Tensor

    def __init__(self, config: BroadcastConfig, num_experts: int, layer: int = 0, plan: str = "auto") -> None:
        super().__init__()
        self.config, self.num_experts, self.layer, self.plan = config, num_experts, layer, plan
        # In the checkpoint where it is measured, on a model that changes afterwards. NaN: not measured yet.
        measured = config.threshold == "quantile"
        value = torch.tensor(math.nan if measured else config.entropy, dtype=torch.float32)
        self.register_buffer("threshold", value, persistent=measured)

    def decide(self, probs_TE: Tensor, sequences_T: Tensor | None, token_ids_T: Tensor | None = None) -> Decision:
        """The tokens that are broadcast.

        Args:
            probs_TE: the router's distribution.
            sequences_T: int64, number of each row's sequence in [0, T); negative: padding. None: one sequence.
            token_ids_T: int64, vocabulary entries; random choices follow from them.
        """
        entropy_T = normalised_entropy(probs_TE)
        if sequences_T is None:
            sequences_T = torch.zeros(len(entropy_T), dtype=torch.int64, device=entropy_T.device)
        real_T = sequences_T >= 0
        # A threshold that was not measured compares false with everything: nothing is broadcast.
        uncertain_T = real_T & (entropy_T >= self.threshold)
        lengths_T = _count(sequences_T, real_T)
        slots_T = (self.config.max_share * lengths_T.double() - 1e-9).ceil().long()
        drop: Drop = "position" if self.config.slots == "first" else "affinity"
        first = partial(_first, plan=self.plan)
        chosen_T = first(uncertain_T, entropy_T, sequences_T, slots_T, drop)
        if self.config.choose == "lowest_entropy":
            chosen_T = first(real_T, -entropy_T, sequences_T, _count(sequences_T, chosen_T), "affinity")
        elif self.config.choose == "random":
            seed = self.layer if token_ids_T is None else token_ids_T.sum() + self.layer
            chosen_T = first(real_T, entropy_T, sequences_T, _count(sequences_T, chosen_T), "random", seed)
        return Decision(entropy_T, real_T, uncertain_T, chosen_T)

    def rows(self, decision: Decision, probs_TE: Tensor, weights_TK: Tensor) -> BroadcastRows:
        """The rows to broadcast with their weights.

        Args:
            weights_TK: the tokens' weights in ordinary routing, whose sum `match_topk` keeps.
        """
        token_ids_U = decision.chosen_T.nonzero().squeeze(-1)
        weights_UE = probs_TE[token_ids_U]
        if self.config.top_m is not None and self.config.top_m < self.num_experts:
            best_UM = best(weights_UE, self.config.top_m)
            chosen_UE = torch.zeros_like(weights_UE).scatter_(1, best_UM, 1.0)
            weights_UE = weights_UE * chosen_UE
            weights_UE = weights_UE / weights_UE.sum(-1, keepdim=True)
        if self.config.scale == "match_topk":
            weights_UE = weights_UE * weights_TK[token_ids_U].sum(-1, keepdim=True)
        return BroadcastRows(token_ids_U, weights_UE)

    def metrics(self, decision: Decision, served_T: Tensor, top_k: int) -> Metrics:
        """`uncertain_share`, `broadcast_share`: of the tokens. `entropy_histogram`: of the normalised entropy, [32].
        `dropped_uncertain`: of the choices that experts dropped, those of uncertain tokens, which found no slot; 0
        where none was dropped. Of one micro-batch: what is reported is the mean over them, however full each is.

        Args:
            served_T: int64, experts that took each token.
        """
        tokens = decision.real_T.sum().clamp_min(1)
        histogram = torch.histc(decision.entropy_T[decision.real_T].float(), ENTROPY_BINS, 0.0, 1.0)
        return {
            "uncertain_share": (decision.uncertain_T.sum() / tokens, "mean"),
            "broadcast_share": (decision.chosen_T.sum() / tokens, "mean"),
            "entropy_histogram": (histogram / tokens, "mean"),
            "dropped_uncertain": (_uncertain_among_dropped(decision, served_T, top_k), "mean"),
        }


class Decision(NamedTuple):
    """Of every row; none has a gradient."""

    entropy_T: Tensor
    """Normalised entropy, fp32 at least."""
    real_T: Tensor
    """bool: not padding."""
    uncertain_T: Tensor
    """bool: entropy at the threshold or above."""
    chosen_T: Tensor
    """bool: broadcast."""


def normalised_entropy(probs_TE: Tensor) -> Tensor:
    """Entropy of each row's distribution over its maximum ln E, [T] in [0, 1], without a gradient."""
    probs_TE = probs_TE.detach()
    nats_T = -(probs_TE * probs_TE.clamp_min(torch.finfo(probs_TE.dtype).tiny).log()).sum(-1)
    return (nats_T / math.log(max(2, probs_TE.shape[1]))).clamp(0.0, 1.0)


def _uncertain_among_dropped(decision: Decision, served_T: Tensor, top_k: int) -> Tensor:
    dropped_T = (top_k - served_T).clamp_min(0).masked_fill(decision.chosen_T, 0)
    return (dropped_T * decision.uncertain_T).sum() / dropped_T.sum().clamp_min(1)


def _first(
    candidates_T: Tensor,
    priority_T: Tensor,
    sequences_T: Tensor,
    slots_T: Tensor,
    drop: Drop,
    seed: Tensor | int = 0,
    plan: str = "auto",
) -> Tensor:
    """Of each sequence's candidates the first `slots_T[sequence]`, bool [T]. The same op as experts' choice, with
    sequences in place of experts."""
    nobody = len(candidates_T)
    sequences_T = torch.where(candidates_T, sequences_T, nobody)
    capacity = torch.cat([slots_T, slots_T.new_zeros(1)])
    return keep_within(
        priority_T, sequences_T, nobody + 1, capacity_E=capacity, drop=drop, seed=seed, implementation=plan
    )


def _count(sequences_T: Tensor, which_T: Tensor) -> Tensor:
    """How many of each sequence's rows, int64 [T] by sequence."""
    return torch.zeros_like(sequences_T).index_add_(0, sequences_T.clamp_min(0), which_T.long())
