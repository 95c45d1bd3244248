"""Section `training`: batch, optimizer, schedule, precision, validation, checkpoints, faults, monitors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from megamoe.config.base import Section
from megamoe.config.faults import FaultsConfig


class OptimizerConfig(Section):
    """AdamW for all weights, or Muon for matrices (experts included) with AdamW for the rest."""

    type: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw (torch) or muon (DeepSpeed's; needs gradient_clipping 0, zero_stage below 3, tp and etp 1).",
    )
    lr: float = Field(3e-3, gt=0, description="Peak learning rate of AdamW weights.")
    betas: Annotated[tuple[float, float], Strict(False)] = Field((0.9, 0.95), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay of matrices; never of norms, biases, scales.")
    muon_lr: float = Field(0.02, gt=0, description="Peak learning rate of Muon weights.")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Momentum of Muon.")


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then the named shape down to `min_lr_ratio` of the peak."""

    type: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="wsd: constant, then linear decay over the last `decay_fraction` of the steps."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate as a share of the peak.")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="Share of the steps that wsd decays over.")


class CheckpointConfig(Section):
    """When checkpoints are written, which are kept, and what a start resumes from."""

    every: int = Field(100, ge=0, description="Steps between checkpoints; 0: only at the end or when interrupted.")
    asynchronous: bool = Field(
        True, description="Write while training goes on, from a copy in host memory; false: training waits."
    )
    keep: int = Field(3, ge=1, description="Newest checkpoints that are kept.")
    keep_every: int = Field(0, ge=0, description="Checkpoints at multiples of this step are kept for good; 0: none.")
    resume: str = Field(
        "auto",
        description="auto: the newest sound checkpoint of output_dir, if any; never: refuse a used output_dir; must: "
        "fail without one; or the folder of a checkpoint to begin at: one of output_dir renames later ones, one from "
        "elsewhere counts until output_dir has one. The same command again goes on from what was saved since.",
    )


class ValidationConfig(Section):
    """Loss on held-out documents during training."""

    every: int = Field(50, ge=0, description="Steps between validations; 0: only at the end.")
    batches: int = Field(8, ge=0, description="Global batches per validation; 0: no validation.")


class WandbConfig(Section):
    """Weights & Biases through DeepSpeed's monitor."""

    enabled: bool = False
    project: str = Field("megamoe", description="Project name.")
    group: str | None = Field(None, description="Run group.")
    team: str | None = Field(None, description="Team (entity).")


class MonitorConfig(Section):
    """Sinks besides metrics.jsonl, which is always written and is the source of truth."""

    wandb: WandbConfig = Field(default_factory=WandbConfig)
    tensorboard: bool = Field(False, description="Write TensorBoard events under the run's logs/ folder.")


class TrainingConfig(Section):
    """One training run."""

    steps: int = Field(200, ge=1, description="Optimizer steps; the schedule ends here.")
    stop_after_step: int | None = Field(
        None,
        ge=1,
        description="Save and leave after this step although the schedule goes on (for split jobs, tests).",
    )
    output_dir: str = Field("runs/default", description="Run folder: config, metrics, checkpoints, logs.")
    seed: int = Field(1234, ge=0, description="Seed of every named random stream.")
    micro_batch_size: int = Field(4, ge=1, description="Sequences per forward pass of one rank.")
    global_batch_size: int = Field(16, ge=1, description="Sequences per optimizer step, over all ranks.")
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32",
        description="Weights and activations; bf16 keeps fp32 masters. fp64: everything, slowly, for proofs that two "
        "layouts train the same model (needs zero_stage 0 and adamw).",
    )
    rank_invariant: bool = Field(
        False,
        description="On CPUs, the same bits on any number of data- and expert-parallel ranks (fp32, the same number of "
        "threads on each): every rank's rows are worked on by themselves, gradients are added up in fp64. Slower; see "
        "configs/parallel/rank_invariant.yaml.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    trainable: Annotated[tuple[str, ...], Strict(False)] = Field(
        ("*",),
        min_length=1,
        description="Patterns of parameter names that are trained; `*` is any text, as in blocks.*.ffn.experts.*",
    )
    frozen: Annotated[tuple[str, ...], Strict(False)] = Field(
        (), description="Patterns of parameter names that are not trained, whatever `trainable` says."
    )
    gradient_clipping: float = Field(1.0, ge=0, description="Bound of the global gradient norm; 0: off.")
    recompute: Literal["none", "full", "attention", "moe"] = Field(
        "none",
        description="What runs again in the backward pass instead of being kept. full: every block, of which only the "
        "input is kept; attention: the attention of every block; moe: the experts of every MoE block.",
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    trace_steps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False)] = Field(
        (),
        description="Optimizer steps of which a trace for Perfetto is written to traces/ of the run folder; --trace "
        "STEP on the command line.",
    )
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl and the progress line.")
    timeout_minutes: float = Field(10.0, gt=0, description="Limit of every collective: no rank waits longer.")
