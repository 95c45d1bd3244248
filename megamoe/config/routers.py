"""Section `moe.router`: one model per kind of router."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megamoe.config.base import Section


class AuxiliaryLosses(Section):
    """What every router with trained scores may add to the loss."""

    balance_loss: float = Field(0.01, ge=0, description="Coefficient of the balance loss E * sum(f_i * P_i).")
    z_loss: float = Field(0.0, ge=0, description="Coefficient of the router z-loss mean(logsumexp(logits)^2).")


class TopKRouterConfig(AuxiliaryLosses):
    """Each token takes its `moe.top_k` experts of highest score."""

    type: Literal["topk"] = "topk"
    score: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="softmax: Switch, GShard, Mixtral. sigmoid: DeepSeek-V3, with a selection bias instead of a loss.",
    )
    normalize_weights: bool = Field(
        True,
        description="Divide the chosen experts' weights by their sum, for top_k > 1 (always so for sigmoid scores).",
    )
    bias_update_rate: float = Field(
        0.0,
        ge=0,
        description="Step of the loss-free balancing bias (arXiv 2408.15664), once per optimizer step; 0: no bias.",
    )
    num_groups: int = Field(
        1, ge=1, description="Groups of consecutive experts (a node each, say) that a token's choice is limited by."
    )
    top_groups: int = Field(
        1, ge=1, description="Groups a token may choose from: those with the highest sum of their two best scores."
    )


class ResonanceRouterConfig(AuxiliaryLosses):
    """Expert-Token Resonance (arXiv 2406.00023): tokens choose experts by affinity, experts choose tokens."""

    type: Literal["resonance"] = "resonance"
    affinity: Literal["grap", "grap_learned", "cosine"] = Field(
        "grap_learned",
        description="Expert vectors: fixed grouped average pooling, learnable on the same disjoint supports, or dense.",
    )
    centre: bool | None = Field(
        None, description="Subtract a running mean of the tokens first; null: yes for grap*, no for cosine."
    )
    centre_momentum: float = Field(0.99, ge=0, lt=1, description="Momentum of that running mean, per optimizer step.")
    scale_init: float | None = Field(
        None,
        gt=0,
        description="Initial kappa of the gate logits kappa * cosine; null: 2 sqrt(D) for grap*, 14 else.",
    )
    learn_scale: bool = Field(True, description="Learn kappa, one per layer, between scale_min and scale_max.")
    scale_min: float | None = Field(
        None, gt=0, description="Smallest kappa; null: sqrt(D) / 2, or scale_init if that is smaller."
    )
    scale_max: float | None = Field(
        None, gt=0, description="Largest kappa; null: 16 sqrt(D), or scale_init if that is larger."
    )
    threshold: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Cumulative-affinity threshold tau of expert choice: keep the fewest candidates whose "
        "positive affinities (with rank_by gate: gate weights) sum to tau of the total; 1: off.",
    )
    rank_by: Literal["affinity", "gate"] = Field(
        "affinity",
        description="What an expert ranks its candidates by: their affinity, or (ours) the gate weight that they give "
        "it, by which a token's first choice stands before other tokens' later ones.",
    )
    scope: Literal["micro_batch", "local", "ep_group"] = Field(
        "micro_batch",
        description="The tokens among which an expert chooses: one micro-batch of one data-parallel rank, the rows of "
        "this rank, or those of all ranks of the expert-parallel group.",
    )
    orthogonality_loss: float = Field(
        0.01,
        ge=0,
        description="Coefficient of the penalty on off-diagonal expert cosines (affinity: cosine only).",
    )
    locality_loss: float = Field(
        0.0,
        ge=0,
        description="Coefficient mu of the KL between this rank's load and one that stays on its node (paper: 0.01).",
    )
    locality_smoothing: float = Field(
        0.5, gt=0, lt=1, description="epsilon_0: share of the local target that is left to experts of other nodes."
    )


class ExpertChoiceRouterConfig(AuxiliaryLosses):
    """Each expert takes the C tokens that score it highest (arXiv 2202.09368); C is `moe.capacity`'s static one."""

    type: Literal["expert_choice"] = "expert_choice"
    balance_loss: float = Field(0.0, ge=0, description="Coefficient of the balance loss; the assignment is balanced.")


class SinkhornRouterConfig(AuxiliaryLosses):
    """Balanced assignment by Sinkhorn iterations in training (arXiv 2202.01169), plain top-k in evaluation."""

    type: Literal["sinkhorn"] = "sinkhorn"
    iterations: int = Field(8, ge=1, description="Alternations between tokens and experts.")
    balance_loss: float = Field(0.0, ge=0, description="Coefficient of the balance loss; the assignment is balanced.")


class HashRouterConfig(Section):
    """A fixed random choice per vocabulary entry (arXiv 2106.04426); nothing is learned, weights are 1 / K."""

    type: Literal["hash"] = "hash"
    seed: int = Field(0, ge=0, description="Seed of the table.")


class BalancedRouterConfig(Section):
    """Tokens in turn to experts in turn, weights 1 / K: an upper bound of speed for benchmarks, not a way to learn."""

    type: Literal["balanced"] = "balanced"


RouterConfig = Annotated[
    TopKRouterConfig
    | ResonanceRouterConfig
    | ExpertChoiceRouterConfig
    | SinkhornRouterConfig
    | HashRouterConfig
    | BalancedRouterConfig,
    Field(discriminator="type"),
]
