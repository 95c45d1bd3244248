"""Pretrain a Mixture-of-Experts language model.

    deepspeed launch/pretrain.py --config configs/tiny.yaml [more.yaml ...] [section.field=value ...]

Runs under deepspeed, torchrun and srun alike, and alone as one process. Started again with the same output folder it
goes on from the newest complete checkpoint.
"""

from __future__ import annotations

import argparse

from megamoe.cli.check import description, split
from megamoe.common import env
from megamoe.common.errors import ConfigError
from megamoe.common.log import setup_logging
from megamoe.common.main import run_main
from megamoe.config.load import load_config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="YAML files, later ones over earlier ones"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="single fields, over all files")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    # What launchers and DeepSpeed scripts pass by habit.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed_config", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()  # overrides also behind an option


def main() -> int:
    args = parse()
    if args.deepspeed_config:
        raise ConfigError(
            "A DeepSpeed configuration file is not read.",
            got=f"--deepspeed_config {args.deepspeed_config}",
            expected="megamoe's own configuration, which DeepSpeed's is derived from",
            todo="put settings that megamoe does not know under deepspeed_extra",
        )
    config = load_config(*split([*args.config, *args.overrides]))
    if args.dry_run:
        launched = env.launcher() != "none"
        if env.rank() == 0:
            print(description(config, env.world_size() if launched else None))
        return 0
    setup_logging(env.rank())
    # Imported only now: a wrong configuration is reported in a blink, without waiting for torch and DeepSpeed.
    from megamoe.training.pretrain import pretrain

    pretrain(config, env.world_size())
    return 0


if __name__ == "__main__":
    run_main(main)
