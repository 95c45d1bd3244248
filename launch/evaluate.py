"""Perplexity of a checkpoint on held-out documents, per source.

    deepspeed launch/evaluate.py --checkpoint runs/tiny [--documents 50] [section.field=value ...]

A run's folder stands for its newest complete checkpoint. Runs on any number of ranks, also alone with python.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megamoe.common import env
from megamoe.common.errors import ConfigError
from megamoe.common.log import setup_logging
from megamoe.common.main import run_main


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a checkpoint's or a run's folder")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="first N of each source; 0: all")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at a time on one rank")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON too")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="over the checkpoint's config")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()  # overrides also behind an option


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured with, before anything is loaded."""
    for name, value, least in (("--documents", args.documents, 0), ("--batch-size", args.batch_size, 1)):
        if value < least:
            raise ConfigError(
                f"{name} has a value that cannot be used",
                got=str(value),
                expected=f"at least {least}",
                todo="correct the command line",
            )
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ConfigError(
            "--out names a file in a folder that does not exist",
            got=args.out,
            expected="a file in an existing folder",
            todo=f"make the folder: mkdir -p {Path(args.out).parent}",
        )


def main() -> int:
    args = parse()
    check(args)
    setup_logging(env.rank())
    from megamoe.data.manifest import check_prepared
    from megamoe.eval.loading import load_model, open_checkpoint
    from megamoe.eval.perplexity import score_source
    from megamoe.training.setup import distributed

    checkpoint = open_checkpoint(args.checkpoint, args.overrides, env.world_size())
    data, manifest = checkpoint.config.data, check_prepared(checkpoint.config.data)
    with distributed(checkpoint.config.parallel, checkpoint.config.training.timeout_minutes) as runtime:
        model, tokenizer = load_model(checkpoint, runtime)
        scores = {
            source.name: score_source(
                model,
                runtime,
                data,
                manifest,
                source.name,
                tokenizer,
                max_documents=args.documents,
                batch_size=args.batch_size,
            )
            for source in data.sources
        }
        rank = runtime.rank
    if rank == 0:
        print(f"{checkpoint.folder}, held-out documents:")
        print(f"{'source':<16}{'documents':>10}{'tokens':>10}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}")
        for name, score in scores.items():
            print(
                f"{name:<16}{score.documents:>10}{score.tokens:>10}{score.loss:>9.4f}"
                f"{score.perplexity:>12.2f}{score.bits_per_byte:>11.4f}"
            )
        if args.out:
            Path(args.out).write_text(json.dumps({n: s.as_dict() for n, s in scores.items()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
