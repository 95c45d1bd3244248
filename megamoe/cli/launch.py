"""What the training scripts under launch/ share: their command line, and the start."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from megamoe.cli.check import description, split
from megamoe.common import env
from megamoe.common.errors import ConfigError
from megamoe.common.log import setup_logging
from megamoe.config.run import RunConfig

Load = Callable[[list[str], list[str]], RunConfig]
Start = Callable[[RunConfig, int], int]


def launch(about: str, load: Load, start: Start, words: Sequence[str] | None = None) -> int:
    """Parse, check, and start or (`--dry-run`) describe.

    Args:
        about: the script's docstring.
        load: the configuration of files and overrides; imports no torch, so that a wrong one is reported in a blink.
        start: trains on this rank and returns the exit code; imports what it needs.
        words: of the command line; None: those of the process.
    """
    args = _parse(about, words)
    if args.deepspeed_config:
        raise ConfigError(
            "A DeepSpeed configuration file is not read.",
            got=f"--deepspeed_config {args.deepspeed_config}",
            expected="megamoe's own configuration, which DeepSpeed's is derived from",
            todo="put settings that megamoe does not know under deepspeed_extra",
        )
    traced = [f"training.trace_steps={args.trace}"] if args.trace else []
    config = load(*split([*args.config, *args.overrides, *traced]))
    if args.dry_run:
        launched = env.launcher() != "none"
        if env.rank() == 0:
            print(description(config, env.world_size() if launched else None))
        return 0
    setup_logging(env.rank())
    return start(config, env.world_size())


def _parse(about: str, words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="YAML files, later ones over earlier ones"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="single fields, over all files")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    parser.add_argument(
        "--trace",
        type=int,
        action="append",
        metavar="STEP",
        help="write what every rank does in that step to traces/ of the run folder, for Perfetto; again for another",
    )
    # What launchers and DeepSpeed scripts pass by habit.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed_config", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(words)  # overrides also behind an option
