"""Estimated memory of one rank, by kind and ZeRO stage.

Weights, gradients and optimizer states follow from the counts. Activations are a rough sketch, without
allocator caches, communication buffers and kernels' workspaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.config.stages import stage_bounds, stage_parameters

FP32 = 4  # bytes
WIDTH = {"bf16": 2, "fp32": FP32, "fp64": 8}
"""Bytes of a number in each `training.precision`."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    Attributes:
        weights: the model's weights in `training.precision`.
        gradients: accumulation in fp32 or fp64, plus the gradients of the backward pass where weights are bf16.
        optimizer: fp32 master weights (ZeRO 1 to 3) and the optimizer's moments, in fp32 or fp64.
        activations: rough: what the micro-batches under way keep for their backward pass, and one chunk of logits.
        host: of these kinds, what is offloaded to CPU memory; it is in none of the others.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """Sum of what is on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


class Kept(NamedTuple):
    """Elements that one token leaves for the backward pass of one block."""

    input: int
    attention: int
    feed_forward: int


def memory_per_rank(config: RunConfig, world_size: int) -> MemoryEstimate:
    """Estimated bytes on one of `world_size` ranks, of the pipeline stage that needs most on its device.

    The degrees are taken to fit the world size.
    """
    return max(memory_by_stage(config, world_size), key=lambda estimate: estimate.total)


def memory_by_stage(config: RunConfig, world_size: int) -> tuple[MemoryEstimate, ...]:
    """As `memory_per_rank`, for a rank of each pipeline stage."""
    bounds, micro_batches = stage_bounds(config), derive.accumulation_steps(config, world_size)
    estimates = []
    for stage, (first, end) in enumerate(pairwise(bounds)):
        # 1F1B: a stage is ahead of the last one by as many micro-batches as there are stages between them.
        under_way = min(config.parallel.pp - stage, micro_batches) if config.parallel.pp > 1 else 1
        estimates.append(_of_stage(config, world_size, first, end, under_way))
    return tuple(estimates)


def _of_stage(config: RunConfig, world_size: int, first: int, end: int, under_way: int) -> MemoryEstimate:
    parallel = config.parallel
    experts, dense = derive.on_one_rank(config, stage_parameters(config, first, end))
    replicas = derive.data_parallel_size(config, world_size) * parallel.cp  # DeepSpeed shards over both
    ours = _states(config, dense, replicas)
    routed = _states(config, experts, derive.expert_data_parallel_size(config, world_size))
    weights, gradients, optimizer = (a + b for a, b in zip(ours, routed, strict=True))
    activations = _activation_bytes(config, first, end, under_way)
    host = (weights if parallel.offload_parameters else 0) + (optimizer if parallel.offload_optimizer else 0)
    weights = 0 if parallel.offload_parameters else weights
    optimizer = 0 if parallel.offload_optimizer else optimizer
    return MemoryEstimate(weights, gradients, optimizer, activations, host)


def _moment_bytes(config: RunConfig) -> int:
    # Muon keeps one moment for matrices, which are nearly all weights.
    return _wide(config) if config.training.optimizer.type == "muon" else 2 * _wide(config)


def _states(config: RunConfig, size: int, ranks: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer for `size` parameters that `ranks` ranks hold together."""
    stage, width = config.parallel.zero_stage, _element_bytes(config)
    shard = -(-size // ranks)
    gradient = _wide(config) + (width if width < FP32 else 0)
    master = FP32 if stage > 0 else 0
    return (
        width * (shard if stage == 3 else size),
        gradient * (shard if stage >= 2 else size),
        (master + _moment_bytes(config)) * (shard if stage >= 1 else size),
    )


def _element_bytes(config: RunConfig) -> int:
    return WIDTH[config.training.precision]


def _wide(config: RunConfig) -> int:
    """Bytes of what is never narrower than fp32: sums, moments, logits."""
    return max(FP32, _element_bytes(config))


def _kept(config: RunConfig, layer_index: int) -> Kept:
    """Per token of this rank's cp part of the sequences; where those are cut over tp as well, a share of a token.

    What goes into a matrix that is cut over tp has been gathered over tp, and is there as a whole.
    """
    model, moe, tp, etp = config.model, config.moe, config.parallel.tp, config.parallel.etp
    width = model.hidden_size
    heads = 2 * (model.num_heads + derive.num_kv_heads(config)) * derive.head_size(config)
    attention = width + heads // tp
    if not derive.is_moe_layer(config, layer_index):
        return Kept(width // tp, attention, width // tp + width + 3 * model.ffn_size // tp)
    # Ranks that share an expert have the rows of all of them, and of each row their part of the expert's width.
    routed = moe.top_k * (2 * width * etp + 3 * moe.expert_ffn_size)
    shared = moe.num_shared_experts * 3 * moe.expert_ffn_size
    return Kept(width // tp, attention, (2 * width + routed + shared + moe.num_experts) // tp)


def _activation_bytes(config: RunConfig, first: int, end: int, under_way: int) -> int:
    model, training, parallel = config.model, config.training, config.parallel
    tokens = training.micro_batch_size * config.data.seq_length // parallel.cp
    kept, again = _elements(config, (index for index in range(first, end)))
    rows = min(model.loss_chunk_size or tokens, tokens) if end == model.num_layers else 0
    logits = 2 * rows * (derive.vocab_size(config) // parallel.tp) * _wide(config)  # logits and their gradient
    return tokens * (under_way * kept + again) * _element_bytes(config) + logits


def _elements(config: RunConfig, blocks: Iterable[int]) -> tuple[int, int]:
    """Elements per token that these blocks keep, and the most that one of them makes again in its backward pass."""
    recompute = config.training.recompute
    kept, again = 0, 0
    for index in blocks:
        block = _kept(config, index)
        left_out = {
            "none": 0,
            "full": block.attention + block.feed_forward,
            "attention": block.attention,
            "moe": block.feed_forward if derive.is_moe_layer(config, index) else 0,
        }[recompute]
        kept, again = kept + sum(block) - left_out, max(again, left_out)
    return kept, again
