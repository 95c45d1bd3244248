"""Section `parallel`: over which ranks a model, its experts, its sequences and its optimizer are spread."""

from __future__ import annotations

from pydantic import Field

from megamoe.config.base import Section


class ParallelConfig(Section):
    """Degrees of parallelism. Data parallelism is what remains: dp = world size / (tp * pp * cp)."""

    tp: int = Field(
        1,
        ge=1,
        description="Tensor parallel degree: ranks that hold parts of the matrices of attention, dense blocks, "
        "embedding and head; between those each has its part of the sequence.",
    )
    pp: int = Field(
        1, ge=1, description="Pipeline parallel degree: stages of consecutive blocks, balanced by their cost."
    )
    ep: int = Field(
        1,
        ge=1,
        description="Expert parallel degree: ranks over which the experts are spread, across tp, cp and dp.",
    )
    etp: int = Field(1, ge=1, description="Tensor parallel degree inside one expert.")
    cp: int = Field(1, ge=1, description="Context parallel degree: ranks that hold parts of the same sequences.")
    zero_stage: int = Field(
        1,
        ge=0,
        le=3,
        description="What DeepSpeed shards over dp and cp: 1 optimizer, 2 gradients too, 3 weights too.",
    )
    offload_optimizer: bool = Field(
        False,
        description="Keep the optimizer's masters and moments in CPU memory and step there (zero_stage 1 to 3).",
    )
    offload_parameters: bool = Field(
        False, description="Keep the sharded weights in CPU memory between their uses (zero_stage 3)."
    )
