"""What follows from a configuration: batch split, expert placement, model dimensions, parameters, FLOPs.

Everything is plain arithmetic on a checked configuration; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megamoe.config.moe import MoEConfig
from megamoe.config.routers import BalancedRouterConfig, HashRouterConfig, ResonanceRouterConfig
from megamoe.config.run import RunConfig

VOCAB_MULTIPLE = 64  # rows of the embedding: keeps the output matrix product on full tiles


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks that see different samples: world size / (tp * pp * cp)."""
    parallel = config.parallel
    return world_size // (parallel.tp * parallel.pp * parallel.cp)


def expert_data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks that hold the same experts: world size / (pp * ep * etp)."""
    parallel = config.parallel
    return world_size // (parallel.pp * parallel.ep * parallel.etp)


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one rank per optimizer step."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, world_size))


def experts_per_rank(config: RunConfig) -> int:
    """Routed experts L on one rank of one MoE block."""
    return config.moe.num_experts // config.parallel.ep


def is_moe_layer(config: RunConfig, layer_index: int) -> bool:
    """Whether block `layer_index` (from 0) has experts: every n-th block after the first k dense ones.

    With `every_n_layers: 2` and no dense prefix these are blocks 1, 3, 5, ...
    """
    moe = config.moe
    past_prefix = layer_index - moe.first_k_dense + 1
    return moe.num_experts > 0 and past_prefix > 0 and past_prefix % moe.every_n_layers == 0


def num_moe_layers(config: RunConfig) -> int:
    """Blocks that have experts."""
    return sum(is_moe_layer(config, index) for index in range(config.model.num_layers))


def padded_vocab(tokenizer_size: int) -> int:
    """The tokenizer's size rounded up to a multiple of 64."""
    return -(-tokenizer_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def vocab_size(config: RunConfig, tokenizer_size: int | None = None) -> int:
    """Rows V of the embedding.

    Args:
        tokenizer_size: size of the tokenizer in use; without it the size that the configuration asks for.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    return padded_vocab(config.data.tokenizer.vocab_size if tokenizer_size is None else tokenizer_size)


def head_size(config: RunConfig) -> int:
    """Width H of one attention head."""
    model = config.model
    return model.head_size if model.head_size is not None else model.hidden_size // model.num_heads


def num_kv_heads(config: RunConfig) -> int:
    """Key/value heads G."""
    model = config.model
    return model.num_kv_heads if model.num_kv_heads is not None else model.num_heads


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one component over the whole model, and those that one token meets."""

    total: int
    active: int


def _router_parameters(moe: MoEConfig, hidden_size: int) -> int:
    """Trainable parameters of one router. A loss-free bias is a buffer and does not count."""
    router = moe.router
    dense = moe.num_experts * hidden_size
    if isinstance(router, HashRouterConfig | BalancedRouterConfig):
        return 0
    if not isinstance(router, ResonanceRouterConfig):
        return dense
    affinity = {"grap": 0, "grap_learned": hidden_size, "cosine": dense}[router.affinity]
    return affinity + int(router.learn_scale)


def scale_limits(router: ResonanceRouterConfig, hidden_size: int) -> tuple[float, float, float]:
    """ETR's kappa: smallest, initial, largest. A limit that is not given makes room for an initial value that is."""
    root = math.sqrt(hidden_size)
    initial = router.scale_init or (14.0 if router.affinity == "cosine" else 2.0 * root)
    return router.scale_min or min(root / 2, initial), initial, router.scale_max or max(16 * root, initial)


CUT_OVER_TP = ("embedding", "head", "attention", "dense_mlp")
"""Components whose matrices are cut over the tp ranks; the others, routed experts aside, are whole on each of them."""
PRODUCTS = ("attention", "dense_mlp", "shared_experts", "router", "experts")
"""Components of a block whose weights are factors of matrix products with every token they meet."""


def block_parameters(config: RunConfig, layer_index: int) -> dict[str, ParameterCount]:
    """Parameters of one block by component, unpadded by any parallel layout; a component it has not counts 0.

    Components: attention, norms, dense_mlp, shared_experts, router, experts.
    """
    model, moe, width = config.model, config.moe, config.model.hidden_size
    has_experts = is_moe_layer(config, layer_index)
    heads = 2 * model.num_heads + 2 * num_kv_heads(config)  # wq and wo, wk and wv
    expert = 3 * width * moe.expert_ffn_size
    sizes = {
        "attention": width * heads * head_size(config),
        "norms": 2 * width,
        "dense_mlp": 0 if has_experts else 3 * width * model.ffn_size,
        "shared_experts": moe.num_shared_experts * expert if has_experts else 0,
        "router": _router_parameters(moe, width) if has_experts else 0,
    }
    counts = {name: ParameterCount(size, size) for name, size in sizes.items()}
    chosen = min(moe.top_k, moe.num_experts)
    routed = (moe.num_experts * expert, chosen * expert) if has_experts else (0, 0)
    return {**counts, "experts": ParameterCount(*routed)}


def parameter_counts(config: RunConfig, tokenizer_size: int | None = None) -> dict[str, ParameterCount]:
    """Parameters of the model by component, unpadded by any parallel layout; `total` is their sum.

    Components: embedding, head (0 when tied), and those of `block_parameters` over all blocks, with the last norm.
    """
    model = config.model
    embedding = vocab_size(config, tokenizer_size) * model.hidden_size
    blocks = [block_parameters(config, index) for index in range(model.num_layers)]
    last_norm = {"norms": ParameterCount(model.hidden_size, model.hidden_size)}
    head = 0 if model.tie_embeddings else embedding
    counts = {"embedding": ParameterCount(embedding, embedding), "head": ParameterCount(head, head)}
    counts |= {name: summed(part[name] for part in (*blocks, last_norm) if name in part) for name in blocks[0]}
    return {**counts, "total": summed(counts.values())}


def on_one_rank(config: RunConfig, counts: dict[str, ParameterCount]) -> tuple[int, int]:
    """Of these components, the parameters that one rank holds: (of routed experts, of all else).

    A little less than in truth where there are fewer key/value heads than tp ranks, which then share heads.
    """
    parallel = config.parallel
    cut = sum(counts[name].total for name in CUT_OVER_TP if name in counts)
    whole = sum(count.total for name, count in counts.items() if name not in (*CUT_OVER_TP, "experts", "total"))
    experts = counts["experts"].total if "experts" in counts else 0
    return experts // (parallel.ep * parallel.etp), cut // parallel.tp + whole


def summed(counts: Iterable[ParameterCount]) -> ParameterCount:
    """Of several components together."""
    parts = tuple(counts)
    return ParameterCount(sum(count.total for count in parts), sum(count.active for count in parts))


def block_flops(config: RunConfig, layer_index: int) -> int:
    """Model FLOPs of one token in one block in training, forward and backward; recomputation does not count.

    6 per weight of a matrix product (2 forward, 4 backward) plus causal attention scores and values:
    3 * 2 * 2 * N * H * S / 2, because a token attends to half of the sequence on average.
    Expert drops are not subtracted: the count is that of `top_k` experts for every token.
    """
    counts = block_parameters(config, layer_index)
    scores = 6 * config.model.num_heads * head_size(config) * config.data.seq_length
    return 6 * sum(counts[name].active for name in PRODUCTS) + scores


def head_flops(config: RunConfig, tokenizer_size: int | None = None) -> int:
    """As `block_flops`, of the output head, tied or not. The embedding's look-up is no product and costs nothing."""
    return 6 * vocab_size(config, tokenizer_size) * config.model.hidden_size


def flops_per_token(config: RunConfig, tokenizer_size: int | None = None) -> int:
    """Model FLOPs of one token in training, forward and backward: all blocks and the head."""
    blocks = sum(block_flops(config, index) for index in range(config.model.num_layers))
    return blocks + head_flops(config, tokenizer_size)
