"""Killing ranks of a run at random moments, again and again, and seeing that nothing is lost.

A run that saves after every step is started, one of its ranks dies by SIGKILL at a random moment, it is started again,
and so on to its end. Every checkpoint that is visible after a kill must be sound, none that was complete may be gone
unless newer ones replaced it, and at the end all files and all metrics must have the bits of a run that nobody killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamoe.common import env
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import RankError, run_ranks
from megamoe.testing.runs import TIMING, prepared_run
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.index import Index
from megamoe.training.pretrain import pretrain

STEPS = 12
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ep2-zero1": (2, ("parallel.ep=2", "parallel.zero_stage=1", "moe.router.type=resonance")),
    "tp2-ep2-zero2": (2, ("parallel.tp=2", "parallel.ep=2", "parallel.zero_stage=2")),
    "ep2-zero3": (2, ("parallel.ep=2", "parallel.zero_stage=3", "moe.router.type=resonance")),
    "pp2-zero1-bf16": (2, ("parallel.pp=2", "parallel.zero_stage=1", "training.precision=bf16")),
    "pp2-ep2-zero0": (4, ("parallel.pp=2", "parallel.ep=2", "parallel.zero_stage=0")),
}
"""Ranks and settings, by name."""
_PROCESS_SECONDS = 300.0


@dataclass
class Campaign:
    """Runs in a folder, killed until there were enough kills.

    Attributes:
        folder: for the runs.
        seed: of victims and moments.
        report: told of every kill.
    """

    folder: Path
    seed: int = 0
    report: Callable[[str], None] = lambda line: None
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By layout and moment."""
    runs: int = 0
    """That were killed, went on to their end, and had the bits of the straight run there."""

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)

    def carry_out(self, kills: int, layouts: dict[str, tuple[int, tuple[str, ...]]] = LAYOUTS) -> None:
        """Kill so many times, at least one whole run of each layout.

        Raises:
            AssertionError: something was lost, or differs.
        """
        straight = {name: self._straight(name, *layout) for name, layout in layouts.items()}
        while self.kills.total() < kills or self.runs < len(layouts):
            for name, (ranks, overrides) in layouts.items():
                if self.kills.total() < kills or self.runs < len(layouts):
                    self._killed_run(name, ranks, overrides, *straight[name])

    def _straight(self, name: str, ranks: int, overrides: tuple[str, ...]) -> tuple[Path, float]:
        """The run that nobody kills, and how long it takes."""
        folder = self.folder / f"straight-{name}"
        words = _prepared(folder, overrides)
        began = time.perf_counter()
        run_ranks(_job, ranks, words, None, init=False, timeout=_PROCESS_SECONDS)
        return folder / "run", time.perf_counter() - began

    def _killed_run(self, name: str, ranks: int, overrides: tuple[str, ...], straight: Path, seconds: float) -> None:
        folder = self.folder / f"killed-{self.runs}-{name}"
        words = _prepared(folder, overrides)
        known: set[str] = set()
        while True:
            # Up to one and a half times the whole run, so that the later steps are reached as well.
            bomb = Bomb(self._draw.randrange(ranks), self._draw.uniform(0.0, 1.5 * seconds))
            try:
                run_ranks(_job, ranks, words, bomb, init=False, timeout=_PROCESS_SECONDS)
            except RankError:
                moment = _moment(folder / "run")
                self.kills[name, moment] += 1
                self.report(f"kill {self.kills.total()}: {name}, rank {bomb.victim}, {moment}")
                known = _assert_sound(folder / "run", known)
            else:
                break
        _assert_same(folder / "run", straight)
        self.runs += 1


@dataclass(frozen=True)
class Bomb:
    """A rank that dies after some seconds."""

    victim: int
    seconds: float


def _prepared(folder: Path, overrides: tuple[str, ...]) -> tuple[str, ...]:
    every = ("training.checkpoint.every=1", "training.checkpoint.keep=2", "training.validation.every=0")
    return prepared_run(folder, f"training.steps={STEPS}", *every, *overrides)


def _job(words: tuple[str, ...], bomb: Bomb | None) -> int:
    if bomb is not None and env.rank() == bomb.victim:
        timer = threading.Timer(bomb.seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    return pretrain(tiny_config(*words), env.world_size()).step


def _moment(run: Path) -> str:
    """What a kill interrupted, by what it left behind."""
    left = list(folders.root(run).glob(".*"))
    if not left:
        return "between saves" if folders.complete(run) else "before the first save"
    if any(path.name.startswith((".deleted", ".replaced")) for path in left):
        return "while old checkpoints were replaced or deleted"
    return "during a save"


def _assert_sound(run: Path, known: set[str]) -> set[str]:
    """Whether all that is visible is whole, and what was there is there or gone for newer ones; what is there now."""
    complete = folders.complete(run)
    for path in complete:
        folders.verify(path, folders.read_manifest(path))
        Index.read(path).check()
    now = {path.name for path in complete}
    assert not known or max(now, default="") >= max(known), f"of {sorted(known)} only {sorted(now)} is left"
    assert not list(folders.root(run).glob("damaged_*")), "a checkpoint was found damaged"
    return now


def _assert_same(run: Path, straight: Path) -> None:
    for one, other in zip(_lines(run), _lines(straight), strict=True):
        assert one == other, f"step {one.get('step')}: {one} instead of {other}"
    for path in folders.complete(straight):
        expected = _digests(path)
        found = _digests(folders.root(run) / path.name)
        assert found == expected, f"{path.name}: {[name for name in expected if found.get(name) != expected[name]]}"


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield {name: value for name, value in json.loads(line).items() if name not in TIMING}


def _digests(checkpoint: Path) -> dict[str, str]:
    """Of everything that is not about the folder itself."""
    files = folders.read_manifest(checkpoint).files
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith(("state/", "ranks/"))}
