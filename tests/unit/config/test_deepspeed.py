"""The DeepSpeed configuration, and that DeepSpeed reads it the way we mean it."""

from importlib import import_module
from typing import Any

import pytest

from megamoe.config.deepspeed import ADJUSTABLE, OWNED, deepspeed_config
from megamoe.config.derive import parameter_counts
from megamoe.config.load import load_config


def build(*overrides: str, world_size: int = 1) -> dict[str, Any]:
    return deepspeed_config(load_config([], overrides), world_size)


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        found += leaves(value, f"{path}.") if isinstance(value, dict) else [path]
    return found


def test_batch_sizes_multiply_up() -> None:
    config = build("parallel.ep=2", world_size=2)
    micro, steps = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == micro * steps * 2 == 16


def test_context_parallel_ranks_count_as_data_parallel_ones() -> None:
    """As DeepSpeed counts them: micro-batch x accumulation x ranks that hold the same weights."""
    config = build("parallel.cp=2", "parallel.tp=2", world_size=8)
    assert config["gradient_accumulation_steps"] == 16 // (4 * 2)
    assert config["train_batch_size"] == 4 * 2 * (8 // 2) == 32


def test_a_pipeline_sends_what_it_has() -> None:
    assert build("parallel.pp=2", world_size=2)["pipeline"] == {
        "pipe_partitioned": False,
        "grad_partitioned": False,
        "use_reentrant": False,
    }
    assert "pipeline" not in build()


def test_offloading() -> None:
    stage_3 = "parallel.zero_stage=3"
    optimizer, parameters = "parallel.offload_optimizer=true", "parallel.offload_parameters=true"

    def offloaded(*overrides: str) -> dict[str, Any]:
        zero = build(*overrides)["zero_optimization"]
        return {key: value for key, value in zero.items() if key.startswith("offload")}

    on_cpu = {"device": "cpu"}
    assert offloaded(stage_3) == {}
    assert offloaded(optimizer) == {"offload_optimizer": on_cpu}
    assert offloaded(stage_3, optimizer, parameters) == {"offload_optimizer": on_cpu, "offload_param": on_cpu}


def test_deepspeed_offloads_with_an_optimizer_of_ours() -> None:
    runtime = import_module("deepspeed.runtime.config")
    stage_3 = ("parallel.zero_stage=3", "parallel.offload_optimizer=true", "parallel.offload_parameters=true")
    config = runtime.DeepSpeedConfig(build(*stage_3))
    assert config.zero_config.offload_optimizer.device == config.zero_config.offload_param.device == "cpu"
    assert config.zero_force_ds_cpu_optimizer is False


@pytest.mark.parametrize("stage, clipping", [(0, 0.0), (1, 0.5), (2, 0.5), (3, 0.5)])
def test_clipping_is_always_written(stage: int, clipping: float) -> None:
    config = build(f"parallel.zero_stage={stage}", "training.gradient_clipping=0.5")
    assert config["gradient_clipping"] == clipping
    assert build(f"parallel.zero_stage={stage}", "training.gradient_clipping=0.0")["gradient_clipping"] == 0.0


def test_bf16_accumulates_in_fp32() -> None:
    assert build("training.precision=bf16")["data_types"] == {"grad_accum_dtype": "fp32"}
    assert build()["bf16"] == {"enabled": False}


def test_monitors_write_below_the_run_folder() -> None:
    config = build("training.monitor.tensorboard=true", "training.monitor.wandb.enabled=true")
    assert config["tensorboard"]["output_path"] == "runs/default/logs"
    assert config["wandb"] == {"enabled": True, "project": "megamoe"}


def test_extra_keys_merge_below_ours() -> None:
    extra = "deepspeed_extra={zero_optimization: {overlap_comm: true, sub_group_size: 7}, dump_state: true}"
    config = build(extra)
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["sub_group_size"] == 7
    assert config["zero_optimization"]["stage"] == 1
    assert config["dump_state"] is True


def test_whatever_we_write_is_either_owned_or_adjustable() -> None:
    everything = ("parallel.zero_stage=3", "parallel.offload_optimizer=true", "parallel.offload_parameters=true")
    pipeline = build("training.precision=bf16", "parallel.pp=2", world_size=2)
    for path in {*leaves(pipeline), *leaves(build(*everything))}:
        owned = any(path == key or path.startswith(f"{key}.") for key in OWNED)
        assert owned != (path in ADJUSTABLE), path


@pytest.mark.parametrize(
    "stage, precision", [(0, "fp32"), (0, "fp64"), *((stage, name) for stage in (1, 2, 3) for name in ("fp32", "bf16"))]
)
def test_deepspeed_reads_what_we_mean(stage: int, precision: str) -> None:
    runtime = import_module("deepspeed.runtime.config")
    values = build(f"parallel.zero_stage={stage}", f"training.precision={precision}")
    config = runtime.DeepSpeedConfig(values)
    assert config.zero_optimization_stage == stage
    assert config.zero_config.reduce_scatter is True
    assert config.zero_config.contiguous_gradients is True
    assert config.zero_config.overlap_comm is False
    assert config.gradient_clipping == values["gradient_clipping"]
    assert config.bfloat16_config.enabled is (precision == "bf16")
    assert config.grad_accum_dtype == ("fp32" if precision == "bf16" else None)
    assert config.zero_allow_untested_optimizer is True
    assert config.steps_per_print is None
    assert not config.monitor_config.enabled


@pytest.mark.parametrize("layers", [2, 3])
def test_buckets_are_even(layers: int) -> None:
    """DeepSpeed's ZeRO-1 and -2 fail to start with an odd one, such as a model of so many parameters would give."""
    config = load_config([], ["moe.router.type=resonance", f"model.num_layers={layers}"])
    zero = deepspeed_config(config, 1)["zero_optimization"]
    assert parameter_counts(config)["total"].total % 2 == layers % 2
    assert zero["allgather_bucket_size"] % 2 == zero["reduce_bucket_size"] % 2 == 0
