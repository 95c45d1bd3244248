"""`bench parallel`: tokens per second of layouts against plain data parallelism, and whether their messages explain it.

Every turn is a group of processes of its own: DeepSpeed keeps process groups in globals, of which layouts would take
each other's. A turn trains, counts what one step sends, and then sends the same once more without the work between, on
the same groups; so of every round there are both a time per step and the time of the step's messages.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean, median
from typing import Any

from megamoe.bench import allocator
from megamoe.bench.conditions import conditions
from megamoe.bench.quiet import wait_for_quiet
from megamoe.bench.report import as_table, closing, in_words, target
from megamoe.bench.rounds import in_turns, ratios, spread
from megamoe.bench.train import TrainSettings
from megamoe.common.errors import TopologyError
from megamoe.common.log import setup_logging
from megamoe.config import derive
from megamoe.config.load import dump_config, load_config
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.config.traffic import sent_by_stage, totals
from megamoe.model.initialise import initialise
from megamoe.parallel.collectives import barrier
from megamoe.parallel.topology import Topology
from megamoe.testing.parity import random_tokens
from megamoe.testing.parity_topologies import degree_words, parse
from megamoe.testing.ranks import run_ranks
from megamoe.testing.traffic import Traffic, replay
from megamoe.training.job import build_engine
from megamoe.training.setup import Runtime, distributed
from megamoe.training.step import train_step

PLAIN = "data parallel"
"""What the others are compared with: every rank has the whole model, ZeRO-1."""
TIMEOUT_SECONDS = 3600.0
LOAD = ("ep", "etp")
"""Axes whose bytes depend on what the router decides; of the others the prediction is exact."""

Place = tuple[str, str]
"""Axis and kind of operation."""


@dataclass(frozen=True)
class Turn:
    """What one rank saw in one turn; all per optimizer step."""

    allocator: str
    loss: float
    seconds: float
    sent: dict[Place, float]
    """Bytes."""
    messages: dict[Place, int]
    message_seconds: dict[Place, float]
    """Of the messages alone."""


def layout_configs(
    files: Sequence[str], overrides: Sequence[str], layouts: Sequence[str], ranks: int
) -> dict[str, RunConfig]:
    """The configuration of plain data parallelism and of every layout, on so many ranks.

    Where tp or cp ranks share micro-batches, these are as many times larger, if the global batch divides: a rank then
    has as many tokens of one, and sends as many messages per step, as without.

    Raises:
        ConfigError, TopologyError: the ranks, or the model, do not fit a layout.
    """
    degrees = {PLAIN: Topology(ranks)} | {name: _filled(name, ranks) for name in layouts}
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
    turns: dict[str, list[list[Turn]]] = {name: [] for name in configs}

    def take(name: str, config: RunConfig) -> None:
        turns[name].append(run_ranks(_turn, settings.ranks, config, settings, timeout=TIMEOUT_SECONDS, init=False))

    in_turns(
        {name: partial(take, name, config) for name, config in configs.items()},
        settings.rounds,
        warmup=0,
        before_round=lambda: others.append(wait_for_quiet(settings.patience)),
        title="parallel",
    )
    results = [_result(name, config, turns, settings.ranks) for name, config in configs.items()]
    return {
        "benchmark": "parallel",
        "settings": asdict(settings),
        "config": dump_config(configs[PLAIN]),
        "conditions": where
        | {"allocator": turns[PLAIN][0][0].allocator, "others_before_rounds": spread(others)._asdict()},
        "results": results,
        "targets": _targets(results),
    }


def _turn(config: RunConfig, settings: TrainSettings) -> Turn:
    """On every rank: a new engine, untimed steps, one that is counted, those that are timed, and messages alone."""
    warnings.simplefilter("ignore")
    setup_logging(level=logging.WARNING)
    state = allocator.prepare(settings.keep_freed_memory)
    with distributed(config.parallel, config.training.timeout_minutes) as runtime:
        trainee = _Trainee(config, runtime)
        trainee.train(settings.warmup)
        with Traffic(runtime.groups) as traffic:
            trainee.train(1)
        seconds = trainee.train(settings.steps)
        replay(traffic.messages)
        barrier()
        message_seconds: dict[Place, float] = defaultdict(float)
        for _ in range(settings.steps):
            for place, elapsed in replay(traffic.messages).items():
                message_seconds[place] += elapsed / settings.steps
        barrier()
    sent: dict[Place, float] = defaultdict(float)
    messages: dict[Place, int] = defaultdict(int)
    for message in traffic.messages:
        if message.ranks > 1:
            sent[message.axis, message.kind] += message.sent
            messages[message.axis, message.kind] += 1
    return Turn(state, trainee.loss, seconds / settings.steps, dict(sent), dict(messages), dict(message_seconds))


class _Trainee:
    """A model in its engine, and the random tokens it is fed."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self.config, self.runtime, self.loss, self.done = config, runtime, float("nan"), 0
        fill = partial(initialise, config=config.model, seed=config.training.seed)
        self.engine = build_engine(config, runtime, derive.vocab_size(config), fill)

    def train(self, steps: int) -> float:
        """Optimizer steps as the training loop makes them, metrics included, until all ranks are done; seconds."""
        dp, micro_steps = self.runtime.groups.dp, derive.accumulation_steps(self.config, self.runtime.world_size)
        numbers = [micro_step * dp.size + dp.place for micro_step in range(micro_steps)]
        batches = [[random_tokens(self.config, self.done + s, n) for n in numbers] for s in range(steps)]
        barrier()
        began = time.perf_counter()
        for own in batches:
            result, _ = train_step(self.engine, own, 1.0)
            self.loss = float(result.values["cross_entropy"])
        barrier()
        self.done += steps
        return time.perf_counter() - began


def _result(name: str, config: RunConfig, turns: dict[str, list[list[Turn]]], ranks: int) -> dict[str, Any]:
    """What the report says of one layout; its messages' time is the median over rounds of the mean over ranks."""
    tokens = config.training.global_batch_size * config.data.seq_length
    seconds, plain = ([ranks_of[0].seconds for ranks_of in turns[each]] for each in (name, PLAIN))
    axes, small = _axes(config, turns[name], ranks)
    return {
        "layout": name,
        "micro_batch_size": config.training.micro_batch_size,
        "tokens_per_second": spread(tokens / each for each in seconds)._asdict(),
        "over_plain": ratios(plain, seconds)._asdict(),
        "seconds_per_step": spread(seconds)._asdict(),
        "extra_seconds": spread(a - b for a, b in zip(seconds, plain, strict=True))._asdict(),
        "axes": axes,
        "small_message_seconds": small,
        "message_seconds": sum(axis["seconds"] for axis in axes.values()) + small,
        "operations": _operations(turns[name]),
        "last_loss": turns[name][-1][0].loss,
    }


def _axes(config: RunConfig, turns: list[list[Turn]], ranks: int) -> tuple[dict[str, dict[str, float]], float]:
    """Of every axis the bytes that a rank sends per step, predicted and counted (means over ranks), their bandwidth,
    and the seconds that the predicted ones take at it; and the seconds of messages that are too small to predict."""
    stages = [totals(sent) for sent in sent_by_stage(config, ranks)]
    predicted = {axis: fmean(sent.get(axis, 0.0) for sent in stages) for axis in {a for sent in stages for a in sent}}
    axes = {}
    for axis in sorted(predicted):
        counted = median(_mean(turn, "sent", axis) for turn in turns)
        seconds = median(_mean(turn, "message_seconds", axis) for turn in turns)
        per_second = counted / seconds if seconds else 0.0
        axes[axis] = {
            "predicted": predicted[axis],
            "counted": counted,
            "bytes_per_second": per_second,
            "seconds": predicted[axis] / per_second if per_second else 0.0,
        }
    others = {place[0] for turn in turns for rank in turn for place in rank.message_seconds} - predicted.keys()
    return axes, sum(median(_mean(turn, "message_seconds", axis) for turn in turns) for axis in sorted(others))


def _mean(ranks: list[Turn], field: str, axis: str) -> float:
    """Over ranks, of what one of them has of all operations of an axis."""
    return fmean(sum(value for place, value in getattr(rank, field).items() if place[0] == axis) for rank in ranks)


def _operations(turns: list[list[Turn]]) -> list[dict[str, Any]]:
    """What rank 0 sends per step by axis and kind of operation: how often, bytes, and bytes per second."""
    first = [turn[0] for turn in turns]
    rows = []
    for place in sorted(set(first[0].messages)):
        seconds = median(rank.message_seconds.get(place, 0.0) for rank in first)
        sent = median(rank.sent.get(place, 0.0) for rank in first)
        axis, kind = place
        rows.append(
            {
                "axis": axis,
                "operation": kind,
                "messages": first[0].messages[place],
                "bytes": sent,
                "seconds": seconds,
                "bytes_per_second": sent / seconds if seconds else 0.0,
            }
        )
    return rows


def _explained(result: dict[str, Any], plain: dict[str, Any]) -> float:
    """Seconds by which a step is longer for its messages."""
    return float(result["message_seconds"] - plain["message_seconds"])


def _targets(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    plain, *others = results
    targets = []
    for result in others:
        name = result["layout"]
        limit, value = _explained(result, plain), result["extra_seconds"]["median"]
        targets.append(target(f"ms per step that {name} takes longer, by its messages", 1e3 * limit, 1e3 * value))
        off = [abs(v["counted"] - v["predicted"]) for axis, v in result["axes"].items() if axis not in LOAD]
        targets.append(target(f"bytes that {name} sends off the prediction, but for ep and etp", 0.0, max(off)))
    return targets


def markdown(report: dict[str, Any]) -> str:
    """The report as small tables."""
    settings, training, plain = report["settings"], report["config"]["training"], report["results"][0]
    heading = (
        f"Training steps on random tokens: {settings['ranks']} ranks, {training['global_batch_size']} sequences of "
        f"{report['config']['data']['seq_length']} tokens per step, {settings['rounds']} rounds of {settings['steps']} "
        f"steps in turns. Ratios are of the same round, to {PLAIN} at ZeRO-1: median (smallest to largest). Explained "
        "is the ratio if nothing but the time of the messages came on top; that is measured in the same turns, by "
        "sending a step's messages without the work between."
    )
    rows = [
        (
            r["layout"],
            r["micro_batch_size"],
            f"{r['tokens_per_second']['median']:,.0f}",
            in_words(r["over_plain"]),
            f"{plain['seconds_per_step']['median'] / (plain['seconds_per_step']['median'] + _explained(r, plain)):.2f}",
            f"{1e3 * r['extra_seconds']['median']:.0f}",
            f"{1e3 * _explained(r, plain):.0f}",
        )
        for r in report["results"]
    ]
    columns = ("layout", "micro-batch", "tokens/s", "over plain", "explained", "ms longer per step", "by messages")
    tables = [as_table(columns, rows), _bytes_table(report["results"]), _operations_table(report["results"])]
    return "\n\n".join([heading, *tables, *closing(report)]) + "\n"


def _bytes_table(results: list[dict[str, Any]]) -> str:
    """Bytes by axis; rows to experts are predicted for even load."""
    rows = [
        (r["layout"], axis, f"{v['predicted']:,.0f}", f"{v['counted']:,.0f}", f"{1e3 * v['seconds']:.1f}")
        for r in results
        for axis, v in r["axes"].items()
    ]
    rows += [(r["layout"], "small messages", "", "", f"{1e3 * r['small_message_seconds']:.1f}") for r in results]
    return as_table(("layout", "axis", "bytes per step and rank, predicted", "counted", "ms of the predicted"), rows)


def _operations_table(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            r["layout"],
            f"{o['axis']} {o['operation']}",
            o["messages"],
            f"{o['bytes'] / o['messages'] / 2**10:,.1f}",
            f"{o['bytes_per_second'] / 2**20:,.0f}",
        )
        for r in results
        for o in r["operations"]
        if o["bytes"]
    ]
    return as_table(("layout", "operation (rank 0)", "per step", "KiB sent each", "MiB/s"), rows)
