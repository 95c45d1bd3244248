"""Expert-Token Resonance (ETR, arXiv 2406.00023): tokens choose experts by cosine affinity, experts choose tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config.derive import scale_limits
from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import ResonanceRouterConfig
from megamoe.moe import losses, stats
from megamoe.moe.bounds import Limits
from megamoe.moe.decisions import best, decided
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.routers.base import (
    NOTHING,
    Choice,
    Outcome,
    Router,
    RouterSize,
    Rows,
    auxiliary_losses,
    count,
    normalised,
)
from megamoe.moe.types import RoutingPlan
from megamoe.ops import registry
from megamoe.ops.affinity import GRAP_AFFINITY, GrapAffinity, slice_owners
from megamoe.ops.affinity_kernels import compiled_takes, with_choice
from megamoe.ops.precision import at_least_fp32
from megamoe.ops.row_softmax import row_softmax
from megamoe.ops.scores import router_scores
from megamoe.parallel import collectives

LARGEST_SAMPLE = 512
"""Rows of a micro-batch that the running mean of the tokens is made of, evenly spread."""


class ResonanceRouter(Router):
    """Affinity routing in both directions.

    1. Affinity delta_ti = cos(x_t - m, w_i) in fp32; m is a running mean of the tokens (ours: hidden states of trained
       models share a direction that would send most tokens to one expert).
    2. Token choice: each token takes its K experts of highest affinity.
    3. Expert choice: each expert keeps, of the tokens that chose it, the ones of highest affinity (`capacity`,
       `threshold`). The printed equation keeps the first by arrival; it contradicts the text, which we follow.
       `rank_by: gate` (ours) ranks by the weights of step 4 instead: a token's first choice weighs more than another
       token's last one even if that one is closer, so fewer tokens are left without their best expert.
    4. Weights: softmax(kappa * delta), normalised over the token's choices before step 3 (ours: the paper is silent).

    Expert vectors w_i: `grap` is grouped average pooling, constant on the i-th of E contiguous slices of the features;
    `grap_learned` (ours) learns the values on the same disjoint slices, so the vectors stay exactly orthogonal;
    `cosine` (ours) is dense, with an orthogonality penalty.
    kappa (ours) is exp(log_scale), clamped to [sqrt(D)/2, 16 sqrt(D)]: cosines of random tokens are of order
    1/sqrt(D), so their softmax without a scale would be uniform.
    """

    token_mean_D: Tensor

    def __init__(
        self, config: ResonanceRouterConfig, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE
    ) -> None:
        super().__init__(size, capacity, ep)
        self.config = config
        self.centre = config.affinity != "cosine" if config.centre is None else config.centre
        self.least_scale, self.initial_scale, self.most_scale = scale_limits(config, size.hidden_size)
        if config.affinity == "cosine":
            self.weight = nn.Parameter(torch.empty(size.num_experts, size.hidden_size))
        elif config.affinity == "grap_learned":
            self.slice_values = nn.Parameter(torch.empty(size.hidden_size))
        if config.learn_scale:
            self.log_scale = nn.Parameter(torch.empty(1))
        self.register_buffer("token_mean_D", torch.zeros(size.hidden_size, dtype=torch.float32))

    def expert_vectors(self) -> Tensor:
        """Unit expert vectors, fp32 [E, D]."""
        if self.config.affinity == "cosine":
            return F.normalize(at_least_fp32(self.weight), dim=-1)
        mask_ED = slice_mask(self.num_experts, self.hidden_size).to(self.token_mean_D)
        if self.config.affinity == "grap_learned":
            mask_ED = mask_ED * at_least_fp32(self.slice_values)
        return F.normalize(mask_ED, dim=-1)

    def scale(self) -> Tensor:
        """kappa, fp32 scalar."""
        if not self.config.learn_scale:
            return torch.full((), self.initial_scale, device=self.token_mean_D.device, dtype=self.token_mean_D.dtype)
        kappa: Tensor = _Within.apply(at_least_fp32(self.log_scale).exp(), self.least_scale, self.most_scale)
        return kappa.squeeze(0)

    def affinity(self, rows_TD: Tensor) -> Tensor:
        """delta [T, E] in [-1, 1], fp32."""
        return self.choose(rows_TD, 0)[0]

    def choose(self, rows_TD: Tensor, top_k: int) -> tuple[Tensor, Tensor | None]:
        """delta [T, E], and the experts of each token's K largest values where the same pass gives them, [T, K]."""
        mean_D = self.token_mean_D if self.centre else None
        if self.config.affinity == "cosine":
            vectors_ED, implementation = self.expert_vectors(), self.ops.router_scores
            return router_scores(rows_TD, vectors_ED, mean_D, normalize=True, implementation=implementation), None
        values_D = self.slice_values if self.config.affinity == "grap_learned" else None
        op = self.grap_affinity(rows_TD)
        if op.name == "kernels" and top_k:
            return with_choice(rows_TD, mean_D, values_D, self.num_experts, top_k)
        return op.function(rows_TD, mean_D, values_D, self.num_experts), None

    def grap_affinity(self, rows_TD: Tensor) -> registry.Choice[GrapAffinity]:
        """The implementation of the op."""
        wanted = self.ops.grap_affinity
        if wanted == "auto" and not compiled_takes(rows_TD.device, self.num_experts, self.hidden_size):
            wanted = "reference"
        return GRAP_AFFINITY.choose(wanted, rows_TD.device, self.token_mean_D.dtype)

    def forward(self, rows_TD: Tensor, about: Rows = NOTHING) -> RoutingPlan:
        affinity_TE, chosen_TK = self.choose(rows_TD, self.top_k if about.spread is None else 0)
        kappa = self.scale()
        logits_TE = kappa * affinity_TE
        if about.spread is not None:  # as one message
            both = about.whole(torch.cat([affinity_TE.detach(), logits_TE], dim=1))
            affinity_TE, logits_TE = both.detach()[:, : self.num_experts], both[:, self.num_experts :]
        probs_TE = row_softmax(logits_TE)
        expert_ids_TK = best(affinity_TE, self.top_k) if chosen_TK is None else decided(chosen_TK.long)
        affinity_TK = affinity_TE.detach().gather(1, expert_ids_TK)
        weights_TK = probs_TE.gather(1, expert_ids_TK)
        if self.top_k > 1:
            weights_TK = normalised(weights_TK)
        outcome = Outcome(
            logits_TE,
            probs_TE,
            losses=self._losses(probs_TE, logits_TE, expert_ids_TK, about),
            observations=self._observe(rows_TD, affinity_TE, about),
            metrics={
                "router_entropy": (losses.entropy(probs_TE), "mean"),
                "router_scale": (kappa.detach(), "mean"),
                "affinity_histogram": (stats.affinity_histogram(affinity_TK, self.hidden_size), "mean"),
            },
        )
        if self.config.affinity == "cosine":  # the others are orthogonal by construction
            outcome.metrics["expert_similarity"] = (stats.expert_similarity(self.weight), "mean")
        rank_TK = affinity_TK if self.config.rank_by == "affinity" else weights_TK.detach()
        return self.make_plan(Choice(expert_ids_TK, weights_TK, rank_TK), outcome, about, self.config.threshold)

    def keep(self, choice: Choice, limits: Limits | None, threshold: float, about: Rows) -> Tensor:
        if self.config.scope != "ep_group" or self.ep.size == 1:
            return super().keep(choice, limits, threshold, about)
        # The affinities of all ranks' tokens, in the order of the ranks; never their rows.
        size = about.size or len(choice.expert_ids_TK)
        experts_TK = self._of_all_ranks(choice.expert_ids_TK, size, self.num_experts)
        affinity_TK = self._of_all_ranks(choice.affinity_TK.detach(), size, 0)
        if about.token_ids_T is not None:
            about = Rows(self._of_all_ranks(about.token_ids_T, size, 0))
        kept = super().keep(Choice(experts_TK, affinity_TK, affinity_TK), limits, threshold, about)
        return kept.view(self.ep.size, -1)[self.ep.rank, : choice.expert_ids_TK.numel()]

    def _of_all_ranks(self, values: Tensor, size: int, filler: int) -> Tensor:
        """Values [T, ...] of every rank, one after the other, each filled up to `size` rows: without their padding,
        ranks hold different numbers of rows."""
        filled = values.new_full((size, *values.shape[1:]), filler)
        filled[: len(values)] = values
        return torch.cat(collectives.all_gather(filled, self.ep.group))

    def limits(self, num_tokens: int) -> Limits | None:
        if self.config.scope != "ep_group":
            return super().limits(num_tokens)
        limits = super().limits(num_tokens * self.ep.size)
        # How an expert's share splits over the ranks is not known before they chose, so no rank's part is bounded.
        return limits._replace(slots=None) if limits is not None and self.ep.size > 1 else limits

    def remarks(self) -> list[str]:
        lines = []
        if self.config.locality_loss and self.all_on_node:
            lines.append(
                "moe.router.locality_loss: every expert is on this node, so it acts as one more balance loss only"
            )
        if self.config.scope == "local":
            lines.append("moe.router.scope local: which tokens an expert keeps depends on the parallel layout")
        return lines

    def _losses(self, probs_TE: Tensor, logits_TE: Tensor, expert_ids_TK: Tensor, about: Rows) -> dict[str, Tensor]:
        terms = auxiliary_losses(self.config, probs_TE, logits_TE, count(expert_ids_TK, self.num_experts))
        if self.config.orthogonality_loss and self.config.affinity == "cosine":
            # Not of rows: every rank of the micro-batch has the whole gradient of it, and they will be added up.
            loss = losses.with_gradient_share(losses.orthogonality_loss(self.weight), about.share())
            terms["orthogonality_loss"] = self.config.orthogonality_loss * loss
        if self.config.locality_loss:
            locality = losses.locality_loss(probs_TE, self.on_node_E, self.config.locality_smoothing)
            terms["locality_loss"] = self.config.locality_loss * locality
        return terms

    def _observe(self, rows_TD: Tensor, affinity_TE: Tensor, about: Rows) -> dict[str, Tensor]:
        if not self.training:
            return {}
        seen = self.bound.observe(affinity_TE) if self.bound is not None else {}
        if about.spread is not None:
            seen = {name: value * about.share() for name, value in seen.items()}
        if self.centre:
            # Every n-th row: a mean over many steps needs no more, and all of them cost as much as their affinities.
            stride = math.ceil(len(affinity_TE) / LARGEST_SAMPLE) or 1
            rows_TD = rows_TD.detach()
            rows_TD = rows_TD[::stride] if about.spread is None else rows_TD[about.spread.every(stride, rows_TD.device)]
            sample_SD = at_least_fp32(rows_TD)
            seen |= {"token_sum": sample_SD.sum(0), "token_count": sample_SD.new_full((1,), float(len(sample_SD)))}
        return seen

    def update(self, observations: dict[str, Tensor]) -> None:
        super().update(observations)
        if "token_sum" not in observations or self.frozen:
            return
        mean_D = (observations["token_sum"] / observations["token_count"].clamp_min(1)).to(self.token_mean_D)
        # A mean that was never set has no past to keep: the first observation is taken whole.
        momentum = self.config.centre_momentum * self.token_mean_D.any().to(mean_D.dtype)
        self.token_mean_D.lerp_(mean_D, 1.0 - momentum)


class _Within(torch.autograd.Function):
    """clamp, with a gradient at the limits for steps that lead back inside, or what once overshot would stay there."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, least: float, most: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.least, ctx.most = least, most
        return value.clamp(least, most)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (value,), grad = ctx.saved_tensors, grads[0]
        # A step goes against its gradient.
        outwards = ((value <= ctx.least) & (grad > 0)) | ((value >= ctx.most) & (grad < 0))
        return grad.masked_fill(outwards, 0.0), None, None


def slice_mask(num_experts: int, hidden_size: int) -> Tensor:
    """1 where a feature belongs to an expert's slice, fp32 [E, D].

    The slices are contiguous and disjoint and cover all features; the first D mod E are one feature longer.
    """
    owner_D = slice_owners(hidden_size, num_experts, torch.device("cpu"))
    return F.one_hot(owner_D, num_experts).t().float().contiguous()
