"""`study`: train several arms over several seeds with equal tokens, and compare them."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

SUMMARY = "train several arms over several seeds and compare them"
DESCRIPTION = """Train every arm of a study with every seed, measure what a step of each costs, and write a table with
paired differences and pictures. Started again it goes on where it was, and repeats no complete run."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("study", help=SUMMARY, description=DESCRIPTION)
    parser.add_argument("plan", metavar="STUDY.yaml", help="the study's file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for all arms")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="folder of the runs (default: runs/<study>)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the report (default: that of the runs)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs side by side (default: one per CPU; 1 where there is a GPU)"
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a configuration over those of the study, for another setting of the same arms; may be repeated",
    )
    parser.add_argument("--only", default="", metavar="ARM[,ARM]", help="these arms, and the baseline")
    parser.add_argument("--seeds", type=int, metavar="N", help="the first N seeds (default: all)")
    parser.add_argument("--phase", choices=("train", "cost", "report", "all"), default="all", help="(default: all)")
    parser.add_argument("--fresh", action="store_true", help="delete runs with other settings and make them again")
    parser.add_argument(
        "--limit", type=float, default=60.0, metavar="MINUTES", help="end a run that takes longer (default: 60)"
    )
    parser.set_defaults(rest="overrides")  # words after an option belong there too


def run(args: argparse.Namespace) -> int:
    """Carry out the phases, print the page and the failures; 1 if a run failed."""
    from megamoe.common.errors import ConfigError
    from megamoe.common.log import setup_logging
    from megamoe.study.plan import load_study

    if (args.jobs is not None and args.jobs < 1) or args.limit <= 0:
        raise ConfigError("--jobs and --limit are above 0.", got=f"--jobs {args.jobs} --limit {args.limit}")
    study = load_study(args.plan, args.overrides, _names(args.only), args.seeds, args.config)
    runs = args.runs or Path("runs") / _study_name(study.path)
    setup_logging()
    # Imported only now: a wrong study is reported in a blink, without waiting for torch.
    from megamoe.study.study import Options, default_jobs, run_study

    jobs = args.jobs or default_jobs()
    options = Options(runs, args.out or runs, jobs, args.limit, args.fresh, args.phase, _command(args))
    outcome = run_study(study, options)
    if outcome.page:
        print(outcome.page)
        print("wrote", *outcome.files)
    for failure in outcome.failures:
        print(f"\nFAILED: {failure}")
    return int(bool(outcome.failures))


def _study_name(path: Path) -> str:
    """`etr` for both etr.yaml and etr/study.yaml."""
    return path.resolve().parent.name if path.stem == "study" else path.stem


def _command(args: argparse.Namespace) -> str:
    """What a reader types to get the same results; folders and the number of jobs are theirs to choose."""
    more = [word for path in args.config for word in ("--config", path)]
    only = ["--only", args.only] if args.only else []
    seeds = ["--seeds", str(args.seeds)] if args.seeds is not None else []
    return shlex.join(["python", "-m", "megamoe", "study", args.plan, *more, *only, *seeds, *args.overrides])


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
