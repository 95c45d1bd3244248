"""The whole configuration of a run."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megamoe.config.base import Section
from megamoe.config.data import DataConfig
from megamoe.config.finetune import FinetuneConfig
from megamoe.config.model import ModelConfig
from megamoe.config.moe import MoEConfig
from megamoe.config.ops import OpsConfig
from megamoe.config.parallel import ParallelConfig
from megamoe.config.training import TrainingConfig


class RunConfig(Section):
    """What a run is. Everything is decided here before anything starts; nothing is repaired on the way."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    moe: MoEConfig = Field(default_factory=MoEConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    finetune: FinetuneConfig | None = Field(
        None, description="Supervised fine-tuning (launch/finetune.py); null in pretraining."
    )
    ops: OpsConfig = Field(default_factory=OpsConfig)
    deepspeed_extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed through to the DeepSpeed config; a key that megamoe writes itself is refused.",
    )
