"""Section `moe`: experts, router, capacity and dispatch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megamoe.config.base import Section
from megamoe.config.routers import RouterConfig, TopKRouterConfig


class CapacityConfig(Section):
    """How many tokens an expert may keep of those that chose it, per micro-batch of one data-parallel rank."""

    mode: Literal["dropless", "static", "locmoe", "etr_bound", "etr_success"] = Field(
        "dropless",
        description="dropless: all of them. static: C = ceil(factor * K * T / E). locmoe: LocMoE's bound from the "
        "first step, then frozen. etr_bound: the same, following training. etr_success: static, shrunk as experts "
        "tell their tokens apart. The last three need the resonance router.",
    )
    factor: float = Field(1.1, gt=0, description="Capacity factor cf of the bounded modes.")
    drop: Literal["affinity", "position", "random"] = Field(
        "affinity",
        description="What an expert over capacity drops: its lowest affinities, the latest tokens, or random ones.",
    )
    minimum: float = Field(
        0.25, gt=0, le=1, description="Least capacity that a bound may ask for, as a share of the balanced load K*T/E."
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Momentum of a bound's estimate, per optimizer step.")
    warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps with the static capacity before the bound is followed."
    )
    tile: int = Field(
        16, ge=1, description="Padded exchanges hold a multiple of this many rows per expert (the kernel's tile)."
    )


class BroadcastConfig(Section):
    """GW-MoE (arXiv 2406.12375): in training, tokens whose routing is uncertain go to all experts. Evaluation and
    generation are unchanged."""

    threshold: Literal["quantile", "fixed"] = Field(
        "quantile",
        description="Which tokens are uncertain. quantile: those above this quantile of each block's router entropy, "
        "measured on the model that fine-tuning starts from and kept in the checkpoint. fixed: above `entropy`.",
    )
    quantile: float = Field(0.95, gt=0, lt=1, description="Of the router entropies that are measured at the start.")
    calibration_tokens: int = Field(
        131_072, ge=1, description="Tokens of the training data that the quantile is measured on (all, if fewer)."
    )
    entropy: float = Field(
        0.866,
        ge=0,
        le=1,
        description="With threshold fixed: least entropy of an uncertain token, divided by ln E (released settings at "
        "E = 8: .769, .866; 0: every token).",
    )
    max_share: float = Field(
        0.05, gt=0, le=1, description="Of each sequence, at most this share of the tokens is broadcast (rounded up)."
    )
    slots: Literal["highest_entropy", "first"] = Field(
        "highest_entropy", description="Which of a sequence's uncertain tokens get its slots if they are too many."
    )
    scale: Literal["sum1", "match_topk"] = Field(
        "sum1",
        description="Weights of a broadcast token: the router's distribution over all experts, or that times the sum "
        "of the token's top-k weights, which are less than 1 where the router does not normalise them.",
    )
    top_m: int | None = Field(
        None, ge=2, description="Only the best so many experts, with weights renormalised; null: all of them."
    )
    freeze_router: bool = Field(
        True, description="Do not train the routers, nor move the running statistics of their scores."
    )
    choose: Literal["uncertain", "random", "lowest_entropy"] = Field(
        "uncertain",
        description="For comparison: broadcast as many random tokens of each sequence, or as many of lowest entropy, "
        "as there are uncertain ones with a slot.",
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
    broadcast: BroadcastConfig | None = Field(
        None, description="Broadcast uncertain tokens to all experts in training (GW-MoE); null: no."
    )
    dispatcher: Literal[
        "auto", "local", "all_to_all", "padded", "deduplicated", "hierarchical", "groupwise", "push"
    ] = Field(
        "auto",
        description="How rows reach their experts. local: no exchange. all_to_all: exactly the rows kept, after an "
        "exchange of their numbers. padded: the capacity's rows for every expert, without an exchange of numbers or a "
        "wait for it; needs a capacity, and whole micro-batches on a rank (tp and cp 1). deduplicated: a token once to "
        "each rank that has experts for it, its results added up there. hierarchical: a token once to each node, and "
        "there once to each rank. groupwise: the same with tensor-parallel groups for nodes (LocMoE). push: rows "
        "written straight into the memory of ranks on the same node, sized by a capacity as padded. auto: local where "
        "parallel.ep is 1, else padded where it can be and all_to_all where not.",
    )
    chunks: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="In how many chunks of its experts a rank takes its rows, so that the exchange of one hides behind "
        "the computation of another; with dispatcher auto, padded or all_to_all. auto: by a model of the costs; 1 on "
        "CPUs.",
    )
