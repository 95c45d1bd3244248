"""Tiny configurations for tests: everything present, nothing large."""

from __future__ import annotations

from megamoe.config.load import load_config
from megamoe.config.run import RunConfig

TINY = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.vocab_size=320",
    "data.tokenizer.vocab_size=320",
    "data.seq_length=32",
    "moe.num_experts=8",
    "moe.expert_ffn_size=24",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
    # So that the first steps of AdamW do not divide rounding noise by rounding noise.
    "training.optimizer.eps=1e-5",
    # Below the norm of these models' gradients, so that clipping is active.
    "training.gradient_clipping=0.3",
)


def tiny_config(*overrides: str) -> RunConfig:
    """A checked configuration that trains in a blink: 2 blocks of 8 experts, 4 micro-batches of 64 tokens per step."""
    return load_config([], [*TINY, *overrides])
