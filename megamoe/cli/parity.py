"""`parity`: does every layout train the same model as one process, here and now?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.common import env
from megamoe.common.errors import ConfigError, TopologyError

if TYPE_CHECKING:
    from megamoe.testing.parity_cases import Plan, Wanted
    from megamoe.testing.parity_judge import Finding, Outcome
    from megamoe.testing.parity_topologies import Layout

SUMMARY = "prove that every parallel layout trains the same model as one process"
DESCRIPTION = """\
Train a small model for some steps on one process and in every layout, on the same tokens, and compare every number:
losses, gradient norms with clipping active, the gradients of the first step, and after the last step all weights, both
moments of Adam and the routers' running statistics, on all ranks.

Alone it starts the ranks itself, on this machine's CPU. Under deepspeed, torchrun or srun it uses theirs, and runs the
layouts of just so many ranks (by default a ladder of those that fill them), so that a cluster can be checked:

  python -m megamoe parity --topologies ep2,tp2-ep2
  torchrun --nproc-per-node 8 -m megamoe parity --output parity.md
  deepspeed --module megamoe parity
  srun python -m megamoe parity --full
"""
EPILOG = """\
Verdicts. equal: every error is within its bound. flip: a token that was as near to two experts as rounding goes took
the other one, and everything before that step is equal; what comes after is not compared. refused: the configuration
says that it does not go together. miss, error: neither. Exit code: 0 if nothing missed, 1 if something did, 2 for bad
input.

Bounds. fp32: 1e-6 for losses, 1e-5 for auxiliary losses, norms and gradients, 5e-5 for weights, moments and statistics,
these relative to the tensor's largest magnitude. fp64: 1e-13. bf16: twice what one process in bf16 differs from fp32
by (the largest of its runs at ZeRO 1, 2 and 3), and no less than the bounds of fp32; tokens that go elsewhere are
counted only, as they do on one process, too.
"""
CHOICES = {
    "--zero": ("0", "1", "2", "3"),
    "--routers": ("topk", "resonance", "expert_choice", "sinkhorn", "hash", "balanced"),
    "--capacity": ("dropless", "static", "locmoe", "etr_bound", "etr_success"),
    "--precision": ("fp32", "bf16", "fp64"),
}
DEFAULTS = {"--zero": "1", "--routers": "topk,resonance", "--capacity": "dropless", "--precision": "fp32"}
FULL = {"--zero": "0,1,2,3", "--routers": "topk,resonance", "--capacity": "dropless,static", "--precision": "fp32,bf16"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    from megamoe.testing.parity_topologies import LADDER, LARGE, RULES

    parser = subparsers.add_parser(
        "parity",
        help=SUMMARY,
        description=DESCRIPTION,
        epilog=f"{RULES}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topologies", metavar="NAMES", help=f"comma-separated layouts (default: {','.join(LADDER)})")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cpu, and what is there under a launcher)")
    for option, choices in CHOICES.items():
        text = f"comma-separated, of {', '.join(choices)} (default: {DEFAULTS[option]})"
        parser.add_argument(option, metavar="NAMES", help=text)
    full = "; ".join(f"{option} {words}" for option, words in FULL.items() if words != DEFAULTS[option])
    parser.add_argument(
        "--full", action="store_true", help=f"for what is not given: {full}; and the layouts {', '.join(LARGE)}"
    )
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="another model than the small one that fits every name"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the model, over all files")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, as .json and as .md")
    parser.add_argument("--note", default="", help="a remark on the conditions, kept in the report")
    parser.set_defaults(rest="overrides")  # words after an option belong there too


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, write the report; 1 if anything missed."""
    from megamoe.testing.parity_cases import make_plan

    wanted, left_out = _wanted(args)
    plan = make_plan(wanted)
    if not plan.runnable():
        reasons = "; ".join(dict.fromkeys(case.refusal for case in plan.cases))
        raise ConfigError("Nothing is left to compare: every case is refused.", got=reasons, todo="choose other ones")
    _choose_device(args.device)
    # Only now: these bring in the engine.
    from megamoe.testing.parity_ranks import quieten
    from megamoe.testing.parity_suite import run_alone, run_launched

    quieten(env.rank())
    with _Progress(len(plan.cases)) as progress:

        def publish(outcome: Outcome) -> None:
            progress.close()
            _publish(args, plan, outcome, left_out)

        if env.launcher() != "none":
            return int(run_launched(plan, progress.report, publish))
        outcome = run_alone(plan, progress.report)
        publish(outcome)
        return int(outcome.failed())


def _wanted(args: argparse.Namespace) -> tuple[Wanted, list[str]]:
    """What the words ask for, and the layouts among them that are of another number of ranks than there are."""
    from megamoe.cli.check import split
    from megamoe.testing.parity_cases import Wanted, list_settings

    if args.steps < 1:
        raise ConfigError("There is nothing to train.", got=f"--steps {args.steps}", expected="at least 1")
    zero, routers, capacities, precisions = (_choices(args, option) for option in CHOICES)
    layouts, left_out = _layouts(args)
    files, overrides = split([*args.config, *args.overrides])
    settings = list_settings(routers, capacities, precisions)
    return Wanted(layouts, [int(stage) for stage in zero], settings, args.steps, files, overrides), left_out


def _choices(args: argparse.Namespace, option: str) -> list[str]:
    given = getattr(args, option.removeprefix("--"))
    names = _names((FULL if args.full else DEFAULTS)[option] if given is None else given)
    for name in names or [""]:
        if name not in CHOICES[option]:
            expected = f"names of {', '.join(CHOICES[option])}, comma-separated"
            raise ConfigError(f"{option} does not know {name!r}.", got=repr(given), expected=expected)
    return names


def _layouts(args: argparse.Namespace) -> tuple[list[Layout], list[str]]:
    from megamoe.testing.parity_topologies import LADDER, LARGE, filling, parse

    ranks = env.world_size() if env.launcher() != "none" else None
    if args.topologies is None:
        names = [*LADDER, *(LARGE if args.full else ())]
        return ([parse(name) for name in names] if ranks is None else filling(ranks)), []
    layouts = [parse(name) for name in _names(args.topologies) or [""]]
    fitting = [layout for layout in layouts if ranks in (None, layout.ranks)]
    if not fitting:
        raise TopologyError(
            f"None of these layouts is one of the {ranks} ranks that the launcher started.",
            got=", ".join(f"{layout.name} ({layout.ranks} ranks)" for layout in layouts),
            expected=f"some of {ranks} ranks, such as {', '.join(layout.name for layout in filling(ranks or 1)[:3])}",
            todo="start another number of ranks, or give dp as well",
        )
    return fitting, [f"{layout.name} ({layout.ranks} ranks)" for layout in layouts if layout not in fitting]


def _choose_device(device: str | None) -> None:
    """Settle it before the engine looks for one."""
    if device == "cpu":
        env.export("DS_ACCELERATOR", "cpu")
    if device != "cuda":
        return
    if env.launcher() == "none":
        raise ConfigError(
            "Ranks on GPUs are started by a launcher.",
            got="--device cuda without one",
            expected="a rank per GPU",
            todo="torchrun --nproc-per-node 8 -m megamoe parity --device cuda",
        )
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("There is no GPU.", got="--device cuda", expected="a device that torch sees", todo="use cpu")


def _publish(args: argparse.Namespace, plan: Plan, outcome: Outcome, left_out: list[str]) -> None:
    from megamoe.testing.parity_report import as_data, remarks, summary, table

    found = table(plan, outcome)
    notes = list(remarks(plan, outcome))
    if left_out:
        notes.append(f"left out, because {env.world_size()} ranks are there: {', '.join(left_out)}")
    print(found.heading)
    _print_table(found.header, found.rows)
    print(*notes, summary(outcome), sep="\n")
    if args.output is not None:
        from megamoe.bench.conditions import conditions
        from megamoe.bench.report import as_table, write

        where = conditions(args.note) | {"device": _device_name()}
        data = as_data(plan, outcome, where, left_out)
        rows = ([f"**{word}**" if word in ("miss", "error") else word for word in row] for row in found.rows)
        marks = [f"- {note}" for note in [*notes, summary(outcome)]]
        closing = f"{where['date']}, {where['device']}, torch {where['packages']['torch']}, deepspeed "
        closing += ". ".join(filter(None, [str(where["packages"]["deepspeed"]), args.note]))
        markdown = "\n\n".join([found.heading, as_table(found.header, rows), "\n".join(marks), closing]) + "\n"
        print("wrote", *write(data, markdown, args.output.with_suffix(".json")))


def _device_name() -> str:
    import torch

    from megamoe.bench.conditions import cpu_model

    on_gpu = env.launcher() != "none" and torch.cuda.is_available() and env.get("DS_ACCELERATOR") != "cpu"
    return torch.cuda.get_device_name() if on_gpu else cpu_model()


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(*header, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # whoever reads it from a file has no line to break it at
    with console.capture() as printed:
        console.print(shown)
    print(*(line.rstrip() for line in printed.get().splitlines()), sep="\n")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class _Progress:
    """A live bar on a terminal, and a line for every finding."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self._total, self._done = total, 0
        self._bar = Progress(console=self._console, disable=env.rank() > 0 or not self._console.is_terminal)
        self._task = self._bar.add_task("parity", total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def report(self, finding: Finding) -> None:
        """Count a finding."""
        self._done += 1
        self._bar.advance(self._task)
        text = f"{self._done}/{self._total}  {finding.case}: {finding.verdict} ({finding.seconds:.1f} s)"
        self._console.out(text, highlight=False)

    def close(self) -> None:
        """Leave the terminal to others."""
        self._bar.stop()
