"""`bench parallel` on its ranks: steps of a layout, and their messages once more, amid other work and alone.

Messages of their own are what a step's cost has to be compared with, and amid work: ranks that compute come to an
exchange at different moments, and a message that is sent while others compute takes more than one that is alone.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import torch

from megamoe.bench import allocator
from megamoe.bench.train import TrainSettings
from megamoe.common import env
from megamoe.common.log import setup_logging
from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.model.initialise import initialise
from megamoe.parallel.collectives import barrier
from megamoe.testing.parity import random_tokens
from megamoe.testing.traffic import Traffic, replay
from megamoe.training.job import build_engine
from megamoe.training.setup import Runtime, distributed
from megamoe.training.step import train_step

STEP, AMID_WORK, ALONE = "step", "amid work", "alone"
"""Kinds of turns: steps; their messages amid as much other work as all layouts do; their messages without work."""
_LAYERS = 16
"""That the work between messages goes through in turns."""

Place = tuple[str, str]
"""Axis and kind of operation."""


class Turn(NamedTuple):
    """What one rank saw in one turn; all per optimizer step."""

    seconds: float
    cpu_seconds: float
    """Of this rank's threads."""
    message_seconds: dict[Place, float]
    """Where they were timed."""


@dataclass(frozen=True)
class About:
    """What one rank knows of itself."""

    allocator: str
    loss: float
    """Of the last step."""
    sent: dict[Place, float]
    """Bytes of a step."""
    messages: dict[Place, int]
    """How many."""
    product_seconds: float
    """Of a CPU, for a piece of the work amid messages."""


@contextmanager
def contestant(config: RunConfig, settings: TrainSettings, rows: int) -> Iterator[Callable[..., Turn | About]]:
    """An engine whose messages of a step have been counted.

    Args:
        rows: of a product, a piece of the work amid messages.

    Yields:
        A function of a kind of turn and a number of pieces of work; of nothing, what there is to know.
    """
    warnings.simplefilter("ignore")
    setup_logging(level=logging.WARNING)
    state = allocator.prepare(settings.keep_freed_memory)
    _pin(env.rank(), settings.ranks)
    with distributed(config.parallel, config.training.timeout_minutes) as runtime:
        trainee, work = _Trainee(config, runtime), _Work(rows, config)
        trainee.train(settings.warmup)
        with Traffic(runtime.groups) as traffic:
            trainee.train(1)
        replay(traffic.messages)

        def about() -> About:
            sent: dict[Place, float] = defaultdict(float)
            messages: dict[Place, int] = defaultdict(int)
            for message in traffic.messages:
                if message.ranks > 1:
                    sent[message.axis, message.kind] += message.sent
                    messages[message.axis, message.kind] += 1
            return About(state, trainee.loss, dict(sent), dict(messages), work.measure())

        def turn(kind: str | None = None, pieces: int = 0) -> Turn | About:
            if kind is None:
                return about()
            if kind == STEP:
                return trainee.train(settings.steps)
            return _repeat(traffic, settings.steps, work.in_shares(pieces) if kind == AMID_WORK else None)

        yield turn


def _pin(rank: int, ranks: int) -> None:
    """Keep this rank to its share of the CPUs, as `deepspeed --bind_cores_to_rank` does: that three of four ranks
    meet on one CPU is chance, and every exchange would wait for it."""
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[rank::ranks] or [cpus[rank % len(cpus)]])


def _repeat(traffic: Traffic, steps: int, work: Callable[[float], None] | None) -> Turn:
    """The messages of so many steps."""
    seconds: dict[Place, float] = defaultdict(float)
    with _Stopwatch() as watch:
        for _ in range(steps):
            for place, elapsed in replay(traffic.messages, work).items():
                seconds[place] += elapsed / steps
    return watch.turn(steps, dict(seconds))


class _Stopwatch:
    """Context manager: how long all ranks take for what is inside, and this one's CPUs. Collective."""

    def __enter__(self) -> Self:
        barrier()
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        barrier()
        self._took = time.perf_counter() - self._began[0], time.process_time() - self._began[1]

    def turn(self, steps: int, message_seconds: dict[Place, float] | None = None) -> Turn:
        seconds, cpu_seconds = self._took
        return Turn(seconds / steps, cpu_seconds / steps, message_seconds or {})


class _Work:
    """Products of rows with weights, which go through as much memory as layers do."""

    def __init__(self, rows: int, config: RunConfig) -> None:
        hidden, ffn = config.model.hidden_size, config.model.ffn_size
        self._layers = [
            (torch.randn(rows, hidden), torch.randn(hidden, ffn), torch.empty(rows, ffn)) for _ in range(_LAYERS)
        ]
        self._done = 0

    def in_shares(self, pieces: int) -> Callable[[float], None]:
        """What does a share of so many of them; of all shares together, all of them but for rounding."""
        due = 0.0

        def work(share: float) -> None:
            nonlocal due
            due += share * pieces
            while due >= 1:
                self._product()
                due -= 1

        return work

    def measure(self) -> float:
        """CPU seconds of one of them, while all ranks do that. Collective."""
        pieces = 8 * _LAYERS
        with _Stopwatch() as watch:
            for _ in range(pieces):
                self._product()
        return watch.turn(pieces).cpu_seconds

    def _product(self) -> None:
        rows, weights, out = self._layers[self._done % len(self._layers)]
        torch.mm(rows, weights, out=out)
        self._done += 1


class _Trainee:
    """A model in its engine, and the random tokens it is fed."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self.config, self.runtime, self.loss, self.done = config, runtime, float("nan"), 0
        fill = partial(initialise, config=config.model, seed=config.training.seed)
        self.engine = build_engine(config, runtime, derive.vocab_size(config), fill)

    def train(self, steps: int) -> Turn:
        """Optimizer steps as the training loop makes them, metrics included."""
        dp, micro_steps = self.runtime.groups.dp, derive.accumulation_steps(self.config, self.runtime.world_size)
        numbers = [micro_step * dp.size + dp.place for micro_step in range(micro_steps)]
        batches = [[random_tokens(self.config, self.done + s, n) for n in numbers] for s in range(steps)]
        with _Stopwatch() as watch:
            for own in batches:
                result, _ = train_step(self.engine, own, 1.0)
                self.loss = float(result.values["cross_entropy"])
        self.done += steps
        return watch.turn(steps)
