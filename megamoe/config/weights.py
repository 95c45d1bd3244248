"""The weights that one rank holds, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from megamoe.config import derive
from megamoe.config.routers import BalancedRouterConfig, HashRouterConfig, ResonanceRouterConfig
from megamoe.config.run import RunConfig

Kind = Literal["cut", "whole", "experts"]
"""cut: over tp; whole: on every tp rank; experts: over ep and etp."""


class Weight(NamedTuple):
    """A parameter as one rank holds it."""

    name: str
    """As in the model."""
    shape: tuple[int, ...]
    """Of this rank's part."""
    kind: Kind

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def rank_weights(config: RunConfig, first: int, end: int) -> list[Weight]:
    """Those of a rank of the pipeline stage that holds the blocks first ... end - 1, in the model's order.

    A tied embedding is on the first and on the last stage.
    """
    model, last = config.model, end == config.model.num_layers
    table = derive.vocab_size(config) // config.parallel.tp, model.hidden_size
    weights = []
    if first == 0 or (last and model.tie_embeddings):
        weights.append(Weight("embedding.weight", table, "cut"))
    for index in range(first, end):
        weights += [part._replace(name=f"blocks.{index}.{part.name}") for part in _block(config, index)]
    if last:
        weights.append(Weight("norm.weight", (model.hidden_size,), "whole"))
    if last and not model.tie_embeddings:
        weights.append(Weight("head.weight", table, "cut"))
    return weights


def trained(config: RunConfig, weights: list[Weight]) -> list[Weight]:
    """Those that `training.trainable`, `training.frozen` and broadcasting leave to train."""
    broadcast = config.moe.broadcast
    routers = ("*.ffn.router.*",) if broadcast is not None and broadcast.freeze_router else ()
    frozen = (*config.training.frozen, *routers)

    def matches(weight: Weight, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(weight.name, pattern) for pattern in patterns)

    return [w for w in weights if matches(w, config.training.trainable) and not matches(w, frozen)]


def _block(config: RunConfig, index: int) -> Iterator[Weight]:
    width = config.model.hidden_size
    yield Weight("attention_norm.weight", (width,), "whole")
    yield from _attention(config)
    yield Weight("ffn_norm.weight", (width,), "whole")
    if not derive.is_moe_layer(config, index):
        yield from _feed_forward("ffn", width, config.model.ffn_size // config.parallel.tp, "cut")
        return
    moe, parallel = config.moe, config.parallel
    yield from _router(config)
    held, part = derive.experts_per_rank(config), moe.expert_ffn_size // parallel.etp
    for name, shape in (("w1", (part, width)), ("w2", (width, part)), ("w3", (part, width))):
        yield Weight(f"ffn.experts.{name}", (held, *shape), "experts")
    if moe.num_shared_experts:
        yield from _feed_forward("ffn.shared_experts", width, moe.num_shared_experts * moe.expert_ffn_size, "whole")


def _attention(config: RunConfig) -> Iterator[Weight]:
    width, size, tp = config.model.hidden_size, derive.head_size(config), config.parallel.tp
    heads, kv_heads = config.model.num_heads // tp * size, derive.num_kv_heads(config) * size
    # With fewer heads than ranks, every rank holds all of them.
    spread = derive.num_kv_heads(config) >= tp
    yield Weight("attention.wq.weight", (heads, width), "cut")
    for name in ("wk", "wv"):
        yield Weight(f"attention.{name}.weight", (kv_heads // tp if spread else kv_heads, width), _kind(spread))
    yield Weight("attention.wo.weight", (width, heads), "cut")


def _kind(is_cut: bool) -> Kind:
    return "cut" if is_cut else "whole"


def _feed_forward(name: str, width: int, ffn: int, kind: Kind) -> Iterator[Weight]:
    for matrix, shape in (("w1", (ffn, width)), ("w2", (width, ffn)), ("w3", (ffn, width))):
        yield Weight(f"{name}.{matrix}.weight", shape, kind)


def _router(config: RunConfig) -> Iterator[Weight]:
    router, width = config.moe.router, config.model.hidden_size
    if isinstance(router, HashRouterConfig | BalancedRouterConfig):
        return
    if not isinstance(router, ResonanceRouterConfig):
        yield Weight("ffn.router.weight", (config.moe.num_experts, width), "whole")
        return
    if router.affinity == "cosine":
        yield Weight("ffn.router.weight", (config.moe.num_experts, width), "whole")
    elif router.affinity == "grap_learned":
        yield Weight("ffn.router.slice_values", (width,), "whole")
    if router.learn_scale:
        yield Weight("ffn.router.log_scale", (1,), "whole")
