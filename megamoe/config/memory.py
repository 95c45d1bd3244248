"""Estimated memory of one rank, by kind and ZeRO stage.

Weights, gradients and optimizer states follow from the counts. Activations are a rough sketch, without
allocator caches, communication buffers and kernels' workspaces.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.config.derive import (
    data_parallel_size,
    expert_data_parallel_size,
    head_size,
    is_moe_layer,
    num_kv_heads,
    parameter_counts,
    vocab_size,
)
from megamoe.config.run import RunConfig

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
        activations: rough: what one micro-batch keeps for its backward pass, and one chunk of logits.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the four."""
        return self.weights + self.gradients + self.optimizer + self.activations


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


def _block_elements(config: RunConfig, layer_index: int) -> int:
    """Elements that one token leaves for the backward pass of one block."""
    model, moe = config.model, config.moe
    width = model.hidden_size
    attention = 2 * width + 2 * (model.num_heads + num_kv_heads(config)) * head_size(config)
    if not is_moe_layer(config, layer_index):
        return attention + 2 * width + 3 * model.ffn_size
    routed = moe.top_k * (2 * width + 3 * moe.expert_ffn_size)
    shared = moe.num_shared_experts * 3 * moe.expert_ffn_size
    return attention + 2 * width + routed + shared + moe.num_experts


def _activation_bytes(config: RunConfig) -> int:
    model, training = config.model, config.training
    tokens = training.micro_batch_size * config.data.seq_length
    blocks = [_block_elements(config, index) for index in range(model.num_layers)]
    kept = sum(blocks) if training.recompute == "none" else model.num_layers * model.hidden_size + max(blocks)
    rows = min(model.loss_chunk_size or tokens, tokens)
    logits = 2 * rows * vocab_size(config) * _wide(config)  # logits and their gradient
    return tokens * kept * _element_bytes(config) + logits


def memory_per_rank(config: RunConfig, world_size: int) -> MemoryEstimate:
    """Estimated bytes on one of `world_size` ranks; the degrees are taken to fit the world size."""
    counts, parallel = parameter_counts(config), config.parallel
    experts = counts["experts"].total // (parallel.ep * parallel.etp * parallel.pp)
    dense = (counts["total"].total - counts["experts"].total) // (parallel.tp * parallel.pp)
    ours = _states(config, dense, data_parallel_size(config, world_size))
    routed = _states(config, experts, expert_data_parallel_size(config, world_size))
    weights, gradients, optimizer = (a + b for a, b in zip(ours, routed, strict=True))
    return MemoryEstimate(weights, gradients, optimizer, _activation_bytes(config))
