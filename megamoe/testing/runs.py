"""Whole runs for tests: a small prepared corpus, and the pretraining job inside `run_ranks`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.data.prepare import prepare
from megamoe.testing.configs import tiny_config

TEXT = "the router sends every token to the experts that know it best and each expert keeps what it can hold"
WORDS = TEXT.split()
TIMING = frozenset(
    {
        "tokens_per_second",
        "step_seconds",
        "busy_seconds_max",
        "busy_seconds_mean",
        "slowest_rank",
        "slowest_over_median",
        "exchange.exposed_share",
        "exchange.exposed_share_least",
        *(
            f"layers.{block}.{name}"
            for block in range(16)
            for name in ("exchange_seconds", "exposed_seconds", "exposed_backward_seconds")
        ),
    }
)
"""What differs in metrics.jsonl between two runs of the same numbers."""
_OF_A_START = ("logs", "heartbeats", "status.json", "owner.json")


def small_corpus(folder: Path, documents: int = 60) -> Path:
    """A folder of short texts in which some words follow others, made from a fixed rule."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = (WORDS[(number * 7 + i * i + i // 3) % len(WORDS)] for i in range(120 + number))
        (folder / f"text_{number:03d}.txt").write_text(" ".join(words) + f"\nend of text {number}\n")
    return folder


def prepared_run(folder: Path, *overrides: str) -> tuple[str, ...]:
    """Overrides of a tiny run over a small prepared corpus, all inside `folder`."""
    values = (
        f"data.sources=[{{name: small, path: {small_corpus(folder / 'corpus')}}}]",
        f"data.prepared_dir={folder / 'data'}",
        "data.validation_fraction=0.1",
        "data.num_workers=1",
        f"training.output_dir={folder / 'run'}",
        "training.steps=10",
        "training.schedule.warmup_steps=2",
        "training.validation.every=5",
        "training.validation.batches=1",
        "training.checkpoint.every=5",
        "training.timeout_minutes=1",
        *overrides,
    )
    prepare(tiny_config(*values).data)
    return values


@dataclass(frozen=True)
class Run:
    """A run as a test starts it: the words after `launch/pretrain.py`, and the run folder that they name."""

    words: tuple[str, ...]
    folder: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    def elsewhere(self, folder: Path, *more: str) -> Run:
        """The same run with another output folder, and more words."""
        return Run((*self.words, f"training.output_dir={folder}", *more), folder)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none before the first one was written."""
        path = self.folder / "metrics.jsonl"
        # The last line may be on its way to the file.
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def content(self) -> dict[str, str]:
        """Digest of every file that a user would miss: all but what tells how a start went."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        names = {path: path.relative_to(self.folder) for path in files}
        return {
            str(name): hashlib.sha256(path.read_bytes()).hexdigest()
            for path, name in names.items()
            if name.parts[0] not in _OF_A_START
        }
