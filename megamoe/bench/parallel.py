"""`bench parallel`: tokens per second of layouts against plain data parallelism, and whether their messages explain it.

Layouts take turns of a step or a few, each in processes of its own: first each trains, then each sends what its steps
sent once more amid work that is the same for all, then without work. So of every round there are the time of a step
and two measures of what its messages take.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean, median
from typing import Any

from megamoe.bench.conditions import conditions
from megamoe.bench.parallel_ranks import ALONE, AMID_WORK, STEP, About, Turn, contestant
from megamoe.bench.quiet import wait_for_quiet
from megamoe.bench.report import target
from megamoe.bench.rounds import in_turns, interval, ratios, spread
from megamoe.bench.standby import standing_by
from megamoe.bench.train import TrainSettings
from megamoe.common.errors import TopologyError
from megamoe.config.load import dump_config, load_config
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.config.traffic import sent_by_stage, totals
from megamoe.parallel.topology import Topology
from megamoe.testing.parity_topologies import degree_words, parse

PLAIN = "data parallel"
"""What the others are compared with: every rank has the whole model, ZeRO-1."""
CONTROL = "data parallel again"
"""The same once more: what a difference that is none looks like."""
RESOLUTION = 0.05
"""Of a step: differences that this measurement is for."""
_CALIBRATIONS = 7
TIMEOUT_SECONDS = 3600.0
LOAD = ("ep", "etp")
"""Axes whose bytes depend on what the router decides; of the others the prediction is exact."""

Turns = list[list[Turn]]
"""By round and rank."""


def layout_configs(
    files: Sequence[str], overrides: Sequence[str], layouts: Sequence[str], ranks: int
) -> dict[str, RunConfig]:
    """The configuration of plain data parallelism, twice, and of every layout, on so many ranks.

    Where tp or cp ranks share micro-batches, these are as many times larger, if the global batch divides: a rank then
    has as many tokens of one, and sends as many messages per step, as without.

    Raises:
        ConfigError, TopologyError: the ranks, or the model, do not fit a layout.
    """
    degrees = {PLAIN: Topology(ranks), CONTROL: Topology(ranks)} | {name: _filled(name, ranks) for name in layouts}
    return {name: _config(files, overrides, topology) for name, topology in degrees.items()}


def _filled(name: str, ranks: int) -> Topology:
    """The layout of that name, with as much data parallelism as the ranks leave."""
    topology = parse(name).topology
    if ranks % topology.world_size:
        raise TopologyError(
            f"The layout {name} does not fit {ranks} ranks.",
            got=f"{ranks} % {topology.world_size} = {ranks % topology.world_size}",
            expected=f"a multiple of {topology.world_size} ranks",
            todo="change --ranks or --layouts",
        )
    return replace(topology, world_size=ranks)


def _config(files: Sequence[str], overrides: Sequence[str], topology: Topology) -> RunConfig:
    words = [*overrides, *degree_words(topology), "parallel.zero_stage=1"]
    config = load_config(files, words)
    larger = config.training.micro_batch_size * topology.tp * topology.cp
    if config.training.global_batch_size % (larger * topology.dp) == 0:
        config = load_config(files, [*words, f"training.micro_batch_size={larger}"])
    check_world_size(config, topology.world_size)
    return config


def bench_parallel(configs: dict[str, RunConfig], settings: TrainSettings, note: str = "") -> dict[str, Any]:
    """Train on random tokens, the layouts in turns.

    Args:
        configs: as `layout_configs` gives them.

    Returns:
        A JSON-able report: settings, conditions, tokens per second and their ratios to those of plain data parallelism
        in the same round; bytes sent per step and axis, predicted and counted; and how much longer a step takes,
        measured and by the time that those bytes take.
    """
    where, others = conditions(note), list[float]()
    rows = configs[PLAIN].training.micro_batch_size * configs[PLAIN].data.seq_length
    turns: dict[str, dict[str, Turns]] = {name: {STEP: [], AMID_WORK: [], ALONE: []} for name in configs}
    with ExitStack() as stack:
        waiting = {
            name: stack.enter_context(
                standing_by(contestant, settings.ranks, config, settings, rows, timeout=TIMEOUT_SECONDS)
            )
            for name, config in configs.items()
        }
        plain = waiting[PLAIN]
        plain.turn(STEP)
        pieces = round(median(_pieces(plain.turn(STEP), plain.turn(ALONE), plain.turn()) for _ in range(_CALIBRATIONS)))

        def take(turn: tuple[str, str]) -> None:
            kind, name = turn
            turns[name][kind].append(waiting[name].turn(kind, pieces))

        in_turns(
            {turn: partial(take, turn) for turn in [(kind, name) for kind in turns[PLAIN] for name in configs]},
            settings.rounds,
            warmup=0,
            before_round=lambda: others.append(wait_for_quiet(settings.patience)),
            title="parallel",
            rotate=True,
        )
        about = {name: ranks.turn() for name, ranks in waiting.items()}
    results = [_result(name, config, turns, about[name]) for name, config in configs.items()]
    return {
        "benchmark": "parallel",
        "settings": asdict(settings),
        "config": dump_config(configs[PLAIN]),
        "pieces": pieces,
        "conditions": where
        | {"allocator": about[PLAIN][0].allocator, "others_before_rounds": spread(others)._asdict()},
        "results": results,
        "targets": _targets(results),
    }


def _pieces(steps: list[Turn], alone: list[Turn], about: list[About]) -> float:
    """How many pieces of work are as much as a step has without its messages."""
    work = sum(step.cpu_seconds - messages.cpu_seconds for step, messages in zip(steps, alone, strict=True))
    return max(1.0, work / sum(rank.product_seconds for rank in about))


def _result(name: str, config: RunConfig, turns: dict[str, dict[str, Turns]], about: list[About]) -> dict[str, Any]:
    """What the report says of one layout. Times are rank 0's, as all begin and end together."""
    tokens = config.training.global_batch_size * config.data.seq_length
    wall = {kind: [[ranks[0].seconds for ranks in turns[each][kind]] for each in (name, PLAIN)] for kind in turns[name]}
    longer = {kind: _minus(*pair) for kind, pair in wall.items()}
    unexplained = _minus(longer[STEP], longer[AMID_WORK])
    axes, small = _axes(config, turns[name][ALONE], about)
    return {
        "layout": name,
        "micro_batch_size": config.training.micro_batch_size,
        "tokens_per_second": spread(tokens / seconds for seconds in wall[STEP][0])._asdict(),
        "over_plain": ratios(wall[STEP][1], wall[STEP][0])._asdict(),
        "times": {
            kind: {
                "seconds": spread(wall[kind][0])._asdict(),
                "cpu_seconds": spread(sum(rank.cpu_seconds for rank in ranks) for ranks in of)._asdict(),
                "longer": spread(longer[kind])._asdict(),
            }
            for kind, of in turns[name].items()
        },
        "unexplained_seconds": {**spread(unexplained)._asdict(), "interval": interval(unexplained)},
        "rounds": {kind: own for kind, (own, _) in wall.items()},
        "axes": axes,
        "small_message_seconds": small,
        "operations": _operations(turns[name][ALONE], about[0]),
        "last_loss": about[0].loss,
    }


def _minus(values: list[float], others: list[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def _axes(config: RunConfig, alone: Turns, about: list[About]) -> tuple[dict[str, dict[str, float]], float]:
    """Of every axis the bytes that a rank sends per step, predicted and counted (means over ranks), their bandwidth,
    and the seconds that the predicted ones take at it; and the seconds of messages that are too small to predict."""
    stages = [totals(sent) for sent in sent_by_stage(config, len(about))]
    predicted = {axis: fmean(sent.get(axis, 0.0) for sent in stages) for axis in {a for sent in stages for a in sent}}
    axes = {}
    for axis in sorted(predicted):
        counted = fmean(_of_axis(rank.sent, axis) for rank in about)
        seconds = median(fmean(_of_axis(rank.message_seconds, axis) for rank in ranks) for ranks in alone)
        per_second = counted / seconds if seconds else 0.0
        axes[axis] = {
            "predicted": predicted[axis],
            "counted": counted,
            "bytes_per_second": per_second,
            "seconds": predicted[axis] / per_second if per_second else 0.0,
        }
    others = {place[0] for ranks in alone for rank in ranks for place in rank.message_seconds} - predicted.keys()
    small = (
        median(fmean(_of_axis(rank.message_seconds, axis) for rank in ranks) for ranks in alone) for axis in others
    )
    return axes, sum(small)


def _of_axis(values: dict[tuple[str, str], float], axis: str) -> float:
    return sum(value for place, value in values.items() if place[0] == axis)


def _operations(alone: Turns, about: About) -> list[dict[str, Any]]:
    """What rank 0 sends per step by axis and kind of operation: how often, bytes, and bytes per second."""
    rows = []
    for (axis, kind), messages in sorted(about.messages.items()):
        seconds = median(ranks[0].message_seconds[axis, kind] for ranks in alone)
        sent = about.sent[axis, kind]
        rows.append(
            {
                "axis": axis,
                "operation": kind,
                "messages": messages,
                "bytes": sent,
                "seconds": seconds,
                "bytes_per_second": sent / seconds if seconds else 0.0,
            }
        )
    return rows


def _targets(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    step = results[0]["times"][STEP]["seconds"]["median"]
    targets = []
    for result in results[1:]:
        name, (_, high) = result["layout"], result["unexplained_seconds"]["interval"]
        what = f"ms per step that {name} takes longer than its messages explain, upper end; {RESOLUTION:.0%} of a step"
        targets.append(target(what, 1e3 * RESOLUTION * step, 1e3 * high))
        off = [abs(v["counted"] - v["predicted"]) for axis, v in result["axes"].items() if axis not in LOAD]
        targets.append(target(f"bytes that {name} sends off the prediction, but for ep and etp", 0.0, max(off)))
    return targets
