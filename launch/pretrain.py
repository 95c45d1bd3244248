"""Pretrain a Mixture-of-Experts language model.

    deepspeed launch/pretrain.py --config configs/tiny.yaml [more.yaml ...] [section.field=value ...]

Runs under deepspeed, torchrun and srun alike, and alone as one process. Started again with the same output folder it
goes on from the newest complete checkpoint.
"""

from __future__ import annotations

from megamoe.cli.launch import launch
from megamoe.common.errors import ConfigError
from megamoe.common.main import run_main
from megamoe.config.load import load_config
from megamoe.config.run import RunConfig


def load(paths: list[str], overrides: list[str]) -> RunConfig:
    config = load_config(paths, overrides)
    if config.finetune is not None:
        raise ConfigError(
            "This configuration is one for fine-tuning.",
            got="a section finetune",
            expected="a configuration without it",
            todo="start it with launch/finetune.py, or leave the section out (finetune=null)",
        )
    return config


def start(config: RunConfig, world_size: int) -> int:
    from megamoe.training.pretrain import pretrain

    return pretrain(config, world_size).exit_code


if __name__ == "__main__":
    run_main(lambda: launch(__doc__ or "", load, start))
