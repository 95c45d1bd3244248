"""RunConfig to the DeepSpeed configuration, every key with its reason.

megamoe owns what it writes: `deepspeed_extra` adds to it (mappings merge) and may change only the keys in
`ADJUSTABLE`. The facts behind the reasons are properties of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megamoe.config.derive import accumulation_steps, parameter_counts
from megamoe.config.problems import Problem
from megamoe.config.run import RunConfig

MAX_BUCKET = 500_000_000  # elements; DeepSpeed's own default

# What a user writes instead of a key that we own; a key that is not ours but would contradict us is here too.
OWNED: dict[str, str] = {
    "train_batch_size": "use training.global_batch_size",
    "train_micro_batch_size_per_gpu": "use training.micro_batch_size",
    "gradient_accumulation_steps": "it follows from training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "use training.gradient_clipping",
    "bf16": "use training.precision",
    "bfloat16": "use training.precision",
    "fp16": "use training.precision; fp16 is not supported",
    "amp": "use training.precision",
    "torch_autocast": "use training.precision",
    "data_types.grad_accum_dtype": "gradients accumulate in fp32, those of fp64 in fp64",
    "data_types.param_dtype": "use training.precision",
    "data_types.buffer_dtype": "running statistics are never narrowed",
    "data_types.keep_in_fp32_modules": "running statistics are never narrowed",
    "zero_optimization.stage": "use parallel.zero_stage",
    "zero_optimization.reduce_scatter": "DeepSpeed requires it for experts",
    "zero_optimization.contiguous_gradients": "DeepSpeed requires it for experts",
    "zero_optimization.offload_optimizer.device": "use parallel.offload_optimizer",
    "zero_optimization.offload_param.device": "use parallel.offload_parameters",
    "zero_force_ds_cpu_optimizer": "it is always off, because megamoe builds the optimizer",
    "zero_allow_untested_optimizer": "it is always on, because megamoe builds the optimizer",
    "optimizer": "use training.optimizer",
    "scheduler": "use training.schedule",
    "tensorboard": "use training.monitor.tensorboard",
    "wandb": "use training.monitor.wandb",
    "expert_parallel": "use parallel.ep",
    "tensor_parallel": "use parallel.tp",
    "use_data_before_expert_parallelism": "megamoe lays out the ranks",
    "sequence_parallel_size": "use parallel.cp",
    "pipeline": "use parallel.pp and training.recompute",
    "elasticity": "it would change the batch sizes that training.* fixes",
    "prescale_gradients": "it changes the scale of expert gradients",
    "gradient_predivide_factor": "it changes the scale of expert gradients",
    "gradient_allreduce_op": "it changes the scale of gradients",
    "curriculum_learning": "the data loader decides the samples",
    "data_efficiency": "the data loader decides the samples",
}

# What we write and a user may still change: performance and printing, never results.
ADJUSTABLE = (
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "steps_per_print",
    "wall_clock_breakdown",
)


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        config: a checked configuration; `deepspeed_extra` holds no owned key (rule `extra_leaves_our_keys`).
        world_size: ranks that the degrees fit (`rules.check_world_size`).
    """
    sections = (
        *(_batch(config, world_size), _precision(config), _zero(config), _pipeline(config)),
        *(_monitors(config), _quiet()),
    )
    ours = {key: value for section in sections for key, value in section.items()}
    return _merge(ours, config.deepspeed_extra)


def _batch(config: RunConfig, world_size: int) -> dict[str, Any]:
    training = config.training
    # Always written: DeepSpeed clips to 1.0 where the key is absent. 0.0 at stage 0, because there DeepSpeed
    # clips by a norm that knows the experts of one rank only; the adapter clips instead.
    clipping = training.gradient_clipping if config.parallel.zero_stage > 0 else 0.0
    # DeepSpeed is not told that cp ranks share their sequences (it would refuse experts at ZeRO-3): to it they are
    # data-parallel ranks like others, and it wants micro-batch x accumulation x all of those.
    return {
        "train_batch_size": training.global_batch_size * config.parallel.cp,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": clipping,
    }


def _precision(config: RunConfig) -> dict[str, Any]:
    if config.training.precision != "bf16":
        return {"bf16": {"enabled": False}}  # DeepSpeed has no word for fp64; training/engine sees to it
    # bf16 keeps 8 significant bits: a sum of micro-batches loses the later ones. DeepSpeed accumulates bf16
    # gradients in fp32 at stages 1 (its BF16_Optimizer, or that of stage 2 where it offloads), 2 and 3, not at 0 (rule
    # `zero_0_runs_in_fp32`).
    return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def _zero(config: RunConfig) -> dict[str, Any]:
    # DeepSpeed allocates whole buckets in advance: no more than the model needs.
    bucket = min(MAX_BUCKET, parameter_counts(config)["total"].total)
    bucket += bucket % 2  # it refuses an odd number at stages 1 and 2
    zero = {
        "stage": config.parallel.zero_stage,
        "reduce_scatter": True,  # asserted by DeepSpeed for experts at stages 1 and 2
        "contiguous_gradients": True,  # asserted by DeepSpeed for experts at stage 2
        "overlap_comm": False,  # DeepSpeed's default depends on the stage; a GPU recipe may turn it on
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        **_offload(config),
    }
    # megamoe builds the optimizer itself, so that parameter groups are named and split by us; DeepSpeed would refuse
    # to step any but its own on the CPU.
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _offload(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    asked = {"offload_optimizer": parallel.offload_optimizer, "offload_param": parallel.offload_parameters}
    return {section: {"device": "cpu"} for section, wanted in asked.items() if wanted}


def _pipeline(config: RunConfig) -> dict[str, Any]:
    if config.parallel.pp == 1:
        return {}
    # By default DeepSpeed sends each tp rank a part of what a stage gives and gathers it in the next one, as if all
    # tp ranks had the same; ours hold different positions of the sequence, and would train on a mixture without a word.
    # Reentrant checkpointing fails on a stage that begins with token numbers, which have no gradient.
    return {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}}


def _monitors(config: RunConfig) -> dict[str, Any]:
    monitor, logs = config.training.monitor, f"{config.training.output_dir}/logs"
    sections: dict[str, Any] = {
        "tensorboard": {"enabled": monitor.tensorboard, "output_path": logs, "job_name": "tensorboard"}
    }
    wandb = monitor.wandb.model_dump(exclude_none=True)  # DeepSpeed passes null team and group on as given
    return {**sections, "wandb": wandb}


def _quiet() -> dict[str, Any]:
    # The loop prints progress and writes metrics; null means that DeepSpeed never prints its own lines.
    return {"steps_per_print": None, "wall_clock_breakdown": False}


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path


def extra_problems(config: RunConfig) -> Iterator[Problem]:
    """Keys of `deepspeed_extra` that would overrule megamoe, each with what to use instead."""
    for path in _leaves(config.deepspeed_extra):
        for key, instead in OWNED.items():
            # Inside an owned section, or a plain value where an owned key's section belongs.
            if path == key or path.startswith(f"{key}.") or key.startswith(f"{path}."):
                yield Problem(f"deepspeed_extra.{path}", f"megamoe writes this itself: {instead}")
                break
