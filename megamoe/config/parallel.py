"""Section `parallel`: degrees of parallelism and the ZeRO stage."""

from __future__ import annotations

from pydantic import Field

from megamoe.config.base import Section


class ParallelConfig(Section):
    """Degrees of parallelism. Data parallelism is what remains: dp = world size / (tp * pp * cp)."""

    tp: int = Field(1, ge=1, description="Tensor parallel degree.")
    pp: int = Field(1, ge=1, description="Pipeline parallel degree.")
    ep: int = Field(1, ge=1, description="Expert parallel degree: ranks over which the experts are spread.")
    etp: int = Field(1, ge=1, description="Tensor parallel degree inside one expert.")
    cp: int = Field(1, ge=1, description="Context parallel degree.")
    zero_stage: int = Field(
        1,
        ge=0,
        le=3,
        description="What DeepSpeed shards over dp: 1 optimizer, 2 gradients too, 3 weights too.",
    )
