"""Fine-tune a trained model on conversations, optionally broadcasting uncertain tokens to all experts (GW-MoE).

    deepspeed launch/finetune.py --config configs/finetune/gw.yaml [more.yaml ...] [section.field=value ...]

Architecture, tokenizer and router come from `finetune.checkpoint`. Runs under deepspeed, torchrun and srun alike, and
alone as one process. Started again with the same output folder it goes on from the newest complete checkpoint.
"""

from __future__ import annotations

from megamoe.cli.launch import launch
from megamoe.common.main import run_main
from megamoe.config.run import RunConfig
from megamoe.training.finetune_config import load_finetune_config


def start(config: RunConfig, world_size: int) -> int:
    from megamoe.training.finetune import finetune

    return finetune(config, world_size).exit_code


if __name__ == "__main__":
    run_main(lambda: launch(__doc__ or "", load_finetune_config, start))
