"""Section `model`: the decoder-only transformer around the experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megamoe.config.base import Section


class ModelConfig(Section):
    """Shape of the transformer. Letters as in the tensor suffixes: D, N, G, H, F, V."""

    num_layers: int = Field(4, ge=1, description="Number of transformer blocks.")
    hidden_size: int = Field(128, ge=1, description="Model width D.")
    num_heads: int = Field(4, ge=1, description="Query heads N.")
    num_kv_heads: int | None = Field(
        None, ge=1, description="Key/value heads G of grouped-query attention; null: as many as query heads."
    )
    head_size: int | None = Field(
        None, ge=2, description="Width H of one head (even, for RoPE); null: hidden_size / num_heads."
    )
    ffn_size: int = Field(384, ge=1, description="Feed-forward width F of the dense (non-MoE) blocks.")
    vocab_size: int | None = Field(
        None,
        ge=2,
        description="Rows of the embedding V; null: the tokenizer's size rounded up to a multiple of 64.",
    )
    norm: Literal["torch", "apex"] = Field(
        "torch",
        description="RMSNorm implementation: torch's fused one, or NVIDIA apex's (must be installed).",
    )
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of RMSNorm.")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary position embedding.")
    tie_embeddings: bool = Field(True, description="Use the embedding matrix as the output head.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    loss_chunk_size: int = Field(
        1024, ge=0, description="Rows whose logits exist at one time in the loss; 0: all rows at once."
    )
