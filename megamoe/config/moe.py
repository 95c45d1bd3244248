"""Section `moe`: experts, router, capacity and dispatch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megamoe.config.base import Section


class TopKRouterConfig(Section):
    """Each token takes its `moe.top_k` experts of highest score."""

    type: Literal["topk"] = "topk"
    score: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="softmax: Switch, GShard, Mixtral. sigmoid: DeepSeek-V3, with a selection bias instead of a loss.",
    )
    normalize_weights: bool = Field(
        True, description="Divide the chosen experts' weights by their sum (always so for sigmoid scores)."
    )
    bias_update_rate: float = Field(
        0.0,
        ge=0,
        description="Step of the loss-free balancing bias (arXiv 2408.15664), once per optimizer step; 0: no bias.",
    )
    balance_loss: float = Field(0.01, ge=0, description="Coefficient of the balance loss E * sum(f_i * P_i).")
    z_loss: float = Field(0.0, ge=0, description="Coefficient of the router z-loss mean(logsumexp(logits)^2).")


class ResonanceRouterConfig(Section):
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
    learn_scale: bool = Field(True, description="Learn kappa (one per layer), clamped to [sqrt(D)/2, 16 sqrt(D)].")
    threshold: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Cumulative-affinity threshold tau of expert choice: keep the fewest candidates whose "
        "positive affinities sum to tau of the total; 1: off.",
    )
    balance_loss: float = Field(0.01, ge=0, description="Coefficient of the balance loss E * sum(f_i * P_i).")
    z_loss: float = Field(0.0, ge=0, description="Coefficient of the router z-loss mean(logsumexp(logits)^2).")
    orthogonality_loss: float = Field(
        0.01,
        ge=0,
        description="Coefficient of the penalty on off-diagonal expert cosines (affinity: cosine only).",
    )


RouterConfig = Annotated[TopKRouterConfig | ResonanceRouterConfig, Field(discriminator="type")]


class CapacityConfig(Section):
    """How many tokens an expert may keep of those that chose it, per micro-batch of one rank."""

    mode: Literal["dropless", "static"] = Field(
        "dropless", description="dropless: all of them. static: C = ceil(factor * K * T / E)."
    )
    factor: float = Field(1.1, gt=0, description="Capacity factor cf of the bounded modes.")
    drop: Literal["affinity", "position"] = Field(
        "affinity",
        description="What an expert over capacity drops: its lowest affinities, or the latest tokens.",
    )


class MoEConfig(Section):
    """Experts and routing. `num_experts: 0` makes a dense model."""

    num_experts: int = Field(8, ge=0, description="Routed experts E per MoE block, over all ranks; 0: dense model.")
    top_k: int = Field(2, ge=1, description="Experts per token K.")
    expert_ffn_size: int = Field(192, ge=1, description="Feed-forward width F of one expert.")
    every_n_layers: int = Field(1, ge=1, description="Every n-th block after the dense ones is an MoE block.")
    first_k_dense: int = Field(0, ge=0, description="The first k blocks are dense.")
    num_shared_experts: int = Field(
        0,
        ge=0,
        description="Experts every token passes, kept as one dense feed-forward of that many times F.",
    )
    router: RouterConfig = Field(default_factory=TopKRouterConfig, description="The router, chosen by `type`.")
    capacity: CapacityConfig = Field(default_factory=CapacityConfig, description="Tokens an expert may keep.")
    dispatcher: Literal["auto", "local", "all_to_all"] = Field(
        "auto",
        description="How rows reach their experts; auto: all_to_all where parallel.ep > 1, else local.",
    )
