"""How much a fine-tuned model depends on the experts of its uncertain tokens: the paper's test, for every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megamoe.data.batch import Batch
from megamoe.data.sft_loader import SFTLoader
from megamoe.data.sft_store import open_sft
from megamoe.eval.agreement import Agreement, measure_agreement
from megamoe.eval.loading import load_model, open_checkpoint
from megamoe.eval.routing import measure_entropy
from megamoe.eval.sensitivity import measure_sensitivity
from megamoe.testing.ranks import run_ranks
from megamoe.training.run_folder import write_json
from megamoe.training.setup import Runtime, distributed

FILE = "sensitivity.json"
ROWS = 32
"""Rows of held-out conversations that are measured on; the same for all runs of a study."""
BATCH = 8
DRAWS = 2
TIMEOUT_SECONDS = 7200.0


class Subject(NamedTuple):
    """A run to measure, and the model that it started from, whose entropies say which tokens are uncertain."""

    run: Path
    checkpoint: Path
    start: Path


def measure_sensitivities(subjects: Sequence[Subject]) -> list[dict[str, float]]:
    """Per run; kept in the run's folder and read from there next time.

    Returns:
        `sensitivity`: loss added by random experts for uncertain tokens, `sensitivity_random`: for as many random ones;
        `replaced_share`: how many these are, of all tokens, since an arm that trains its router has others;
        `agreement`, `agreement_certain`: of the chosen experts with those of largest gain, for uncertain tokens and for
        the others.
    """
    missing = [subject for subject in subjects if not _known(subject)]
    if missing:
        run_ranks(_measure, 1, missing, init=False, timeout=TIMEOUT_SECONDS)
    return [json.loads((subject.run / FILE).read_text(encoding="utf-8")) for subject in subjects]


def _known(subject: Subject) -> bool:
    """Whether the file is there and no older than the checkpoint."""
    path = subject.run / FILE
    return path.is_file() and path.stat().st_mtime >= (subject.checkpoint / "manifest.json").stat().st_mtime


def _measure(subjects: Sequence[Subject]) -> None:
    """In a process of its own, because it makes process groups."""
    first = open_checkpoint(subjects[0].checkpoint, (), 1).config
    thresholds: dict[Path, dict[int, float]] = {}
    with distributed(first.parallel, first.training.timeout_minutes) as runtime:
        for subject in subjects:
            batches = _batches(subject, runtime)
            if subject.start not in thresholds:
                model, _ = load_model(open_checkpoint(subject.start, (), 1), runtime)
                thresholds[subject.start] = dict(measure_entropy(model, batches, runtime).thresholds)
            write_json(subject.run / FILE, _of(subject, batches, thresholds[subject.start], runtime))


def _batches(subject: Subject, runtime: Runtime) -> list[Batch]:
    loader = SFTLoader(open_sft(subject.run / "data"), "validation", 0)
    count = -(-min(ROWS, loader.num_rows) // BATCH)
    return [loader.rank_batch(i * BATCH, 0, 0, 1, BATCH, 1).to(runtime.device) for i in range(count)]


def _of(subject: Subject, batches: Sequence[Batch], thresholds: dict[int, float], runtime: Runtime) -> dict[str, float]:
    model, _ = load_model(open_checkpoint(subject.checkpoint, (), 1), runtime)
    report = measure_sensitivity(model, batches, thresholds, runtime, DRAWS)
    blocks = measure_agreement(model, batches, runtime, thresholds).blocks
    values = {
        "sensitivity": report.arms["uncertain"].change,
        "sensitivity_random": report.arms["random"].change,
        "replaced_share": report.replaced_share,
        "agreement": _mean([block.uncertain for block in blocks]),
        "agreement_certain": _mean([block.certain for block in blocks]),
    }
    return {name: value for name, value in values.items() if value is not None}


def _mean(blocks: Sequence[Agreement]) -> float | None:
    """Over blocks, each counting by its tokens; None without any."""
    tokens = sum(block.tokens for block in blocks)
    return sum(block.tokens * (block.share or 0.0) for block in blocks) / tokens if tokens else None
