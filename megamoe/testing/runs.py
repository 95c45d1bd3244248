"""Whole runs for tests: a small prepared corpus, and the pretraining job inside `run_ranks`."""

from __future__ import annotations

from pathlib import Path

from megamoe.data.prepare import prepare
from megamoe.testing.configs import tiny_config

TEXT = "the router sends every token to the experts that know it best and each expert keeps what it can hold"
WORDS = TEXT.split()


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
