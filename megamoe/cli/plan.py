"""`plan`: predict the time of a layer and of a step on a cluster, without one. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megamoe.cli.check import split
from megamoe.common.errors import ConfigError

if TYPE_CHECKING:
    from megamoe.plan.report import Plan
    from megamoe.plan.timeline import Panel

SUMMARY = "predict step time and hidden exchange on a cluster, and draw the timeline"
DESCRIPTION = """Predict, from the rates of a cluster, how long one MoE layer and one optimizer step take, which share
of the expert exchange is hidden, what limits it, and how many chunks are best; and draw the timeline."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("plan", help=SUMMARY, description=DESCRIPTION)
    parser.add_argument("config", nargs="*", metavar="CONFIG | key=value", help="YAML or JSON file or override")
    parser.add_argument(
        "--cluster", required=True, metavar="HARDWARE.yaml", help="rates of the cluster, as in configs/hardware"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of it (default: %(default)s)")
    parser.add_argument(
        "--chunks",
        default="",
        metavar="N|auto",
        help="chunks of the exchange; auto: as many as make the layer shortest (default: as a run has)",
    )
    parser.add_argument(
        "--timeline", type=Path, metavar="OUT.html|.png|.svg", help="draw the schedule of a layer and of a step there"
    )
    parser.set_defaults(rest="config")  # words after an option belong there too


def run(args: argparse.Namespace) -> int:
    """Print the plan, draw the picture."""
    from megamoe.config.hardware import load_hardware
    from megamoe.config.load import load_config
    from megamoe.plan.report import Plan
    from megamoe.plan.timeline import draw, require

    if args.timeline is not None:
        require(args.timeline)
    config = load_config(*split(args.config))
    hardware = load_hardware(args.cluster)
    plan = Plan(config, hardware, args.nodes, _chunks(args.chunks))
    text = plan.text()
    print(text)
    if args.timeline is not None:
        draw(panels(plan), f"{hardware.name}: {plan.summary()}", text, args.timeline)
        print(f"\nwrote {args.timeline}")
    return 0


def panels(plan: Plan) -> list[Panel]:
    """A layer in chunks below the same without, and a step."""
    from megamoe.plan.limits import judge
    from megamoe.plan.step import coarse
    from megamoe.plan.timeline import Panel

    found = []
    layers = [plan.chosen.layer] if plan.chosen.layer.way.chunks == 1 else [plan.whole.layer, plan.chosen.layer]
    for name in ("forward", "backward"):
        for layer in layers:
            verdict, chunks = judge(getattr(layer, name)), layer.way.chunks
            how = "not chunked" if chunks == 1 else f"{chunks} chunks"
            hidden = f", {verdict.hidden_share:.0%} of the exchange hidden" if verdict.exchanging else ""
            title = f"MoE layer, {name}, {how}: {1e3 * verdict.total:.3g} ms{hidden}"
            found.append(Panel(title, getattr(layer, name)))
    step = plan.chosen.step
    title = f"Optimizer step: {1e3 * step.verdict.total:,.4g} ms, its parts added up, each with what is exposed in it"
    return [*found, Panel(title, coarse(step), coarse=True)]


def _chunks(given: str) -> int | Literal["auto"] | None:
    if given in ("", "auto"):
        return "auto" if given else None
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError("A number of chunks makes no sense.", got=given, expected="auto, or 1 and more")
    return int(given)
