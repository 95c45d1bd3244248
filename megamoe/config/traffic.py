"""Bytes that one rank sends in an optimizer step, by axis and by what they are. Plain arithmetic, no torch.

Convention, for a group of P ranks: a collective sends what a rank has to hand to others.

- all_gather of n bytes per rank: (P - 1) n, and reduce_scatter of a whole of n bytes: (P - 1) / P n, as round a ring;
- all_reduce of n bytes: both of them, 2 (P - 1) / P n;
- all_to_all: all rows but those that stay; send: all; receive: nothing.

`testing/traffic.py` counts the same of what runs. Left out are messages of a few bytes (norms, flags, losses, metrics),
what happens in the first step only (shapes, traces), evaluation and checkpoints. Everything is exact where all weights
are trained with AdamW, but for what no configuration says:

- Rows to experts: as if every expert got as many. With a capacity it bounds them, and padded exchanges hold exactly
  that; a bound that follows training, a threshold and broadcasting only lower it.
- Rows that travel once to a rank: as if every set of K experts were as likely; nodes as if they held 8 ranks.
- Rows that are pushed: as if they were padded.
- ZeRO-3 keeps weights between forward and backward pass as long as its limit of reuse allows.
- Muon sends matrices besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Literal

from megamoe.config import derive
from megamoe.config.deepspeed import deepspeed_config
from megamoe.config.exchange_bytes import COUNT, Spread, backward_bytes, forward_bytes, rows_per_token
from megamoe.config.memory import FP32, WIDTH
from megamoe.config.routers import BalancedRouterConfig, ExpertChoiceRouterConfig, HashRouterConfig
from megamoe.config.routers import ResonanceRouterConfig as Resonance
from megamoe.config.run import RunConfig
from megamoe.config.stages import stage_bounds
from megamoe.config.weights import Weight, rank_weights, trained

Sent = dict[str, dict[str, float]]
"""Axis to what it is to bytes."""
PERSISTENT = 100_000
"""Elements up to which DeepSpeed's ZeRO-3 keeps a parameter whole, where its configuration does not say."""
REUSE = 1_000_000_000
"""Elements to the next use within which it keeps a parameter, likewise."""
PER_NODE = 8
"""Ranks of a node, for an exchange between nodes and inside them."""
SIZES = 16
"""Different sizes of a padded exchange (`moe/bounds.py`)."""


def sent_by_stage(config: RunConfig, world_size: int) -> tuple[Sent, ...]:
    """What a rank of each pipeline stage sends per optimizer step; axes and kinds with nothing to send are left out.

    Axes: tp, micro_batch (cp x tp, where more than one rank sees a micro-batch's router scores), cp, ep, etp, pp, dp
    (with cp: all ranks that hold the same dense weights, and experts where these are the same ranks) and edp.
    """
    bounds = pairwise(stage_bounds(config))
    return tuple(_Stage(config, world_size, first, end).sent() for first, end in bounds)


def largest(stages: Iterable[Sent]) -> Sent:
    """Of every axis what the stage sends that sends most over it."""
    found: Sent = {}
    for sent in stages:
        for axis, kinds in sent.items():
            if sum(kinds.values()) > sum(found.get(axis, {}).values()):
                found[axis] = kinds
    return found


def totals(sent: Sent) -> dict[str, float]:
    """Bytes by axis."""
    return {axis: sum(kinds.values()) for axis, kinds in sent.items()}


def axis_sizes(config: RunConfig, world_size: int) -> dict[str, int]:
    """Ranks P of every axis."""
    p = config.parallel
    dp, edp = derive.data_parallel_size(config, world_size), derive.expert_data_parallel_size(config, world_size)
    degrees = {"tp": p.tp, "micro_batch": p.cp * p.tp, "cp": p.cp, "ep": p.ep, "etp": p.etp, "pp": p.pp}
    return {**degrees, "dp": dp * p.cp, "edp": edp}


def capacity(config: RunConfig, rows: int) -> tuple[int, int]:
    """Rows of a micro-batch of `rows` that an expert keeps at most, and the slots that it has in a padded exchange.

    As `StaticBound` of `moe/bounds.py`, which bounds that follow training do not exceed.
    """
    moe = config.moe
    balanced = Fraction(moe.top_k * rows, moe.num_experts)
    static = math.ceil(Fraction(str(moe.capacity.factor)) * balanced)
    least = max(8, math.ceil(Fraction(str(moe.capacity.minimum)) * balanced))
    kept = min(rows, max(least, static))
    step = moe.capacity.tile * max(1, math.ceil(static / SIZES / moe.capacity.tile))
    return kept, min(rows, math.ceil(kept / step) * step)


class _Stage:
    """A rank of the stage that holds the blocks first ... end - 1."""

    def __init__(self, config: RunConfig, world_size: int, first: int, end: int) -> None:
        self.config, self.world_size, self.parallel = config, world_size, config.parallel
        self.sizes = axis_sizes(config, world_size)
        self.first, self.last = first == 0, end == config.model.num_layers
        blocks = range(first, end)
        self.blocks, self.moe_blocks = len(blocks), sum(derive.is_moe_layer(config, index) for index in blocks)
        self.weights = rank_weights(config, first, end)
        self.trained = trained(config, self.weights)
        self.steps = derive.accumulation_steps(config, world_size)
        self.positions = config.training.micro_batch_size * config.data.seq_length // config.parallel.cp
        """Of a micro-batch, in the cp part that the rank's tp group holds."""
        self.rows = self.positions // config.parallel.tp
        """Of them, this rank's between parallel matrices."""
        self.width = WIDTH[config.training.precision]
        self.wide = max(FP32, self.width)
        self.row_bytes = config.model.hidden_size * self.width

    def sent(self) -> Sent:
        axes = {
            "tp": self._tp() if self.parallel.tp > 1 else {},
            "micro_batch": self._scores() if self.sizes["micro_batch"] > 1 else {},
            "cp": self._cp() if self.parallel.cp > 1 else {},
            "ep": self._ep() if self.parallel.ep > 1 else {},
            "etp": self._etp() if self.parallel.etp > 1 else {},
            "pp": self._pp() if self.parallel.pp > 1 else {},
            **self._data(),
        }
        found = {axis: {what: size for what, size in kinds.items() if size} for axis, kinds in axes.items()}
        return {axis: kinds for axis, kinds in found.items() if kinds}

    def _again(self, *kinds: str) -> int:
        """1 where recomputation runs a piece again, else 0."""
        return int(self.config.training.recompute in kinds)

    def _tp(self) -> dict[str, float]:
        size, steps = self.parallel.tp, self.steps
        # Of a gather as of a reduce-scatter. A forward pass has both, a backward pass has both; a pass that is run
        # again ends with what the backward pass needs, so without the last reduce-scatter.
        unit = (size - 1) * self.rows * self.row_bytes
        attention = 4 + self._again("attention", "full") + self._again("full")
        dense = 4 + self._again("full")
        blocks = self.blocks * attention + (self.blocks - self.moe_blocks) * dense
        replicated = sum(w.size for w in self.trained if w.kind == "whole") * self.width
        logits = 3 * self.positions * self.wide if self.last else 0  # of every row a maximum, then two sums
        return {
            "sequences": steps * unit * (blocks + 2 * self.first + 2 * self.last),
            "cross entropy": steps * _all_reduce(logits, size),
            "gradients of whole weights": steps * _all_reduce(replicated, size),
        }

    def _scores(self) -> dict[str, float]:
        router = self.config.moe.router
        if isinstance(router, HashRouterConfig | BalancedRouterConfig):
            return {}
        columns = self.config.moe.num_experts * (2 if isinstance(router, Resonance) else 1)
        passes = self.steps * self.moe_blocks * (1 + self._again("moe", "full"))
        others = self.sizes["micro_batch"] - 1
        return {"router scores": passes * others * self.rows * columns * self.wide}

    def _cp(self) -> dict[str, float]:
        size, tp, head = self.parallel.cp, self.parallel.tp, derive.head_size(self.config)
        heads = self.config.model.num_heads // tp
        kv_heads = max(1, derive.num_kv_heads(self.config) // tp)
        kv_heads *= size // math.gcd(size, kv_heads)  # repeated until they divide
        elements = self.positions * (2 * heads + 2 * kv_heads) * head  # queries and results, keys and values
        passes = self.steps * self.blocks * (2 + self._again("attention", "full"))
        return {"heads for positions": passes * elements * self.width * (size - 1) / size}

    @cached_property
    def _assignments(self) -> tuple[float, float, bool]:
        """Of one micro-batch in one block: rows that this rank sends to experts if all get as many; rows in the
        exchange, that is with the empty slots of a padded one; and whether it is padded."""
        moe, wanted = self.config.moe, float(self.rows * self.config.moe.top_k)
        if moe.capacity.mode == "dropless":
            return wanted, wanted, False
        spread, together = self.sizes["micro_batch"], 1
        if isinstance(moe.router, Resonance) and moe.router.scope == "ep_group":
            together = self.parallel.ep
        kept, slots = capacity(self.config, self.rows * spread * together)
        room = moe.num_experts * kept / (spread * together)
        sent = room if isinstance(moe.router, ExpertChoiceRouterConfig) else min(wanted, room)
        if spread * together > 1 or moe.dispatcher == "all_to_all":
            return sent, sent, False
        return sent, float(moe.num_experts * slots), True

    def _ep(self) -> dict[str, float]:
        if self.config.moe.dispatcher in ("deduplicated", "hierarchical", "groupwise"):
            return {**self._once(), **self._choices()}
        size, again = self.parallel.ep, self._again("moe", "full")
        _, rows, padded = self._assignments
        blocks = self.steps * self.moe_blocks
        there = rows * (size - 1) / size * (self.row_bytes + max(self.wide, self.width))
        back = rows * (size - 1) / size * self.row_bytes
        counts = 0 if padded else (size - 1) * derive.experts_per_rank(self.config) * COUNT
        counts += (size - 1) * COUNT if self.config.moe.broadcast is not None else 0
        return {
            "rows to experts": blocks * (2 + again) * there,
            "rows back": blocks * 2 * back,  # the backward pass needs nothing of it, so it is not run again
            "numbers of rows": blocks * (1 + again) * counts,
            **self._choices(),
            **self._broadcast(),
        }

    def _once(self) -> dict[str, float]:
        """Where a token goes once to a rank. As if none were broadcast, which reach all ranks."""
        moe, parallel = self.config.moe, self.parallel
        name: Literal["deduplicated", "hierarchical", "groupwise"] = moe.dispatcher  # type: ignore[assignment]
        together = {"deduplicated": 1, "hierarchical": PER_NODE, "groupwise": parallel.tp // parallel.etp}[name]
        spread = Spread(moe.num_experts, moe.top_k, parallel.ep, parallel.ep, math.gcd(together, parallel.ep))
        sent, _, _ = self._assignments
        tokens = round(sent / moe.top_k)
        results = rows_per_token(name, spread).sent * tokens * self.row_bytes
        forward = forward_bytes(name, spread, tokens, self.row_bytes, self.wide).sent
        backward = backward_bytes(name, spread, tokens, self.row_bytes, self.wide).sent
        blocks = self.steps * self.moe_blocks
        return {
            "rows to experts, once to a rank": blocks * (1 + self._again("moe", "full")) * (forward - results),
            "rows back": blocks * results,
            "gradients of both": blocks * backward,
        }

    def _choices(self) -> dict[str, float]:
        """Where experts choose among the tokens of all ep ranks: numbers and affinities of choices, and token ids."""
        router, moe = self.config.moe.router, self.config.moe
        if not isinstance(router, Resonance) or router.scope != "ep_group":
            return {}
        if moe.capacity.mode == "dropless" and router.threshold == 1.0:
            return {}
        passes = self.steps * self.moe_blocks * (1 + self._again("moe", "full"))
        per_row = moe.top_k * (COUNT + self.wide) + COUNT
        return {"choices": passes * (self.parallel.ep - 1) * self.rows * per_row}

    def _broadcast(self) -> dict[str, float]:
        """At most: broadcast rows to every rank with their weights for its experts, and back."""
        broadcast, training = self.config.moe.broadcast, self.config.training
        if broadcast is None:
            return {}
        share = Fraction(str(broadcast.max_share)) * self.config.data.seq_length
        rows = training.micro_batch_size * math.ceil(share) / self.sizes["micro_batch"]
        weights = derive.experts_per_rank(self.config) * self.wide
        there, back = self.row_bytes + weights, self.row_bytes
        per_row = (2 + self._again("moe", "full")) * there + 2 * back
        return {"broadcast rows": self.steps * self.moe_blocks * (self.parallel.ep - 1) * rows * per_row}

    def _etp(self) -> dict[str, float]:
        others, again = self.parallel.etp - 1, self._again("moe", "full")
        rows, _, _ = self._assignments
        blocks = self.steps * self.moe_blocks
        counts = derive.experts_per_rank(self.config) * COUNT
        return {
            "rows to parts": blocks * (2 + again) * others * rows * (self.row_bytes + self.wide),
            "rows back": blocks * 2 * others * rows * self.row_bytes,
            "numbers of rows": blocks * (1 + again) * others * counts,
        }

    def _pp(self) -> dict[str, float]:
        hidden = self.steps * self.rows * self.row_bytes
        table = [w for w in self.trained if w.name == "embedding.weight"]
        tied = self.config.model.tie_embeddings and self.first != self.last
        return {
            "hidden states": 0 if self.last else hidden,
            "their gradients": 0 if self.first else hidden,
            # Between the first and the last stage, of the sum over micro-batches.
            "tied embedding": sum(w.size for w in table) * self.wide if tied else 0,
        }

    def _data(self) -> Sent:
        """Gradients and weights between ranks that hold the same."""
        dense = [w for w in self.weights if w.kind != "experts"]
        experts = [w for w in self.weights if w.kind == "experts"]
        # Experts' ranks are the dense weights' ones where as many ranks hold the one together as the other.
        same = self.parallel.tp == self.parallel.ep * self.parallel.etp
        groups = {"dp": dense + experts} if same else {"dp": dense, "edp": experts}
        return {axis: self._replicas(self.sizes[axis], weights) for axis, weights in groups.items()}

    def _replicas(self, size: int, weights: list[Weight]) -> dict[str, float]:
        stage, width = self.parallel.zero_stage, self.width
        names = {w.name for w in self.trained}
        learned = [w for w in weights if w.name in names]
        if stage == 3:
            elements = sum(_padded(w.size, size) for w in learned)
            gradients = self.steps * elements * (size - 1) / size
            return {"gradients": gradients * width, "weights": self._gathered(size, weights) * width}
        # DeepSpeed's stages 1 and 2 all-reduce too, whatever their setting `reduce_scatter` is called, and every rank
        # drops what is not its part; stage 2 does so with every micro-batch.
        gradients = _all_reduce(sum(w.size for w in learned) * width, size) * (self.steps if stage == 2 else 1)
        kinds = {(w.kind == "experts", len(w.shape) > 1) for w in learned}
        flat = (sum(w.size for w in learned if (w.kind == "experts", len(w.shape) > 1) == kind) for kind in kinds)
        gathered = sum(_padded(elements, 2 * size) for elements in flat) * (size - 1) / size if stage else 0
        return {"gradients": gradients, "weights": gathered * width}

    def _gathered(self, size: int, weights: list[Weight]) -> float:
        """Elements that a rank sends for others to have the weights whole: small ones once per step, others with every
        micro-batch."""
        zero = deepspeed_config(self.config, self.world_size)["zero_optimization"]
        small = zero.get("stage3_param_persistence_threshold", PERSISTENT)
        reuse = zero.get("stage3_max_reuse_distance", REUSE)
        later, elements = sum(w.size for w in self.weights), 0
        after = {}
        for weight in self.weights:  # in the order of the forward pass, more or less
            later -= weight.size
            after[weight.name] = 2 * later
        for weight in weights:
            times = 1 if weight.size <= small else self.steps * (1 if after[weight.name] < reuse else 2)
            elements += times * _padded(weight.size, size)
        return elements * (size - 1) / size


def _all_reduce(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
