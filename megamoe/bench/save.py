"""`bench save`: what a checkpoint that is written while training goes on costs the step after it."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamoe.bench import allocator
from megamoe.bench.conditions import conditions
from megamoe.bench.quiet import wait_for_quiet
from megamoe.bench.report import as_table, closing, in_words, target
from megamoe.bench.rounds import ratios, spread
from megamoe.bench.train import TIMEOUT_SECONDS, Trainee, TrainSettings
from megamoe.common.log import setup_logging
from megamoe.config import derive
from megamoe.config.architecture import architecture
from megamoe.config.load import dump_config
from megamoe.config.run import RunConfig
from megamoe.parallel.collectives import barrier
from megamoe.testing.ranks import run_ranks
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.saver import Saver
from megamoe.training.setup import Runtime, distributed
from megamoe.training.state import TrainState

PLAIN, AFTER, COPY, COMPLETE = "a step", "the step after a save", "the copy", "until all had written"
LIMIT = 1.10

Seconds = dict[str, list[float]]


def bench_save(config: RunConfig, settings: TrainSettings, note: str = "") -> dict[str, Any]:
    """Train on random tokens; in each round one step without a save, then a save and the step after it.

    Returns:
        A JSON-able report: settings, conditions, seconds by part, bytes of a checkpoint, and the step after a save as a
        multiple of the one before it, the copy not counted.
    """
    where = conditions(note)
    state, others, size, seconds = run_ranks(
        _measure, settings.ranks, config, settings, timeout=TIMEOUT_SECONDS, init=False
    )[0]
    ratio = ratios(seconds[AFTER], seconds[PLAIN])
    return {
        "benchmark": "save",
        "settings": asdict(settings),
        "config": dump_config(config),
        "conditions": where | {"allocator": state, "others_before_rounds": others},
        "bytes": size,
        "results": [{"part": name, "seconds": spread(own)._asdict()} for name, own in seconds.items()],
        "after_over_plain": ratio._asdict(),
        "targets": [target("the step after a save over one without", LIMIT, ratio.median)],
    }


def _measure(config: RunConfig, settings: TrainSettings) -> tuple[str, dict[str, float], int, Seconds]:
    """On every rank: the allocator's state, others' use of the CPUs, a checkpoint's bytes, and seconds per round."""
    warnings.simplefilter("ignore")
    setup_logging()
    state = allocator.prepare(settings.keep_freed_memory)
    others: list[float] = []
    with distributed(config.parallel, config.training.timeout_minutes) as runtime:
        trainee, seconds = Trainee(config, runtime, None), Seconds()
        folder = Path(config.training.output_dir)
        saver = _saver(trainee, config, folder)
        for number in range(settings.warmup + settings.rounds):
            if runtime.rank == 0:
                others.append(wait_for_quiet(settings.patience))
            found = _round(trainee, saver, number, settings.steps, runtime)
            for name, value in found.items() if number >= settings.warmup else ():
                seconds.setdefault(name, []).append(value)
        manifest = folders.read_manifest(folders.complete(folder)[-1])
    size = sum(entry["bytes"] for entry in manifest.files.values())
    return state, spread(others or [0.0])._asdict(), size, seconds


def _saver(trainee: Trainee, config: RunConfig, folder: Path) -> Saver:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.model"
    tokenizer.touch()
    shape = architecture(config, derive.vocab_size(config))
    return Saver(trainee.engine, config, shape, tokenizer, "")


def _round(trainee: Trainee, saver: Saver, number: int, steps: int, runtime: Runtime) -> dict[str, float]:
    """One step of each kind, in alternating order over rounds; `steps` more between them, so that one does not see
    what the other left behind."""

    def plain() -> dict[str, float]:
        return {PLAIN: _timed(lambda: trainee.train(1))}

    def saving() -> dict[str, float]:
        copy = _timed(lambda: saver.save(TrainState(number + 1)))
        began = time.perf_counter()
        after = _timed(lambda: trainee.train(1))
        saver.finish()
        return {AFTER: after, COPY: copy, COMPLETE: time.perf_counter() - began}

    found: dict[str, float] = {}
    for part in (plain, saving) if number % 2 else (saving, plain):
        trainee.train(steps)
        found |= part()
    return found


def _timed(work: Callable[[], object]) -> float:
    barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def markdown(report: dict[str, Any]) -> str:
    """The report as a small table."""
    settings, training = report["settings"], report["config"]["training"]
    heading = (
        f"Training steps on random tokens: {settings['ranks']} ranks, {training['global_batch_size']} sequences of "
        f"{report['config']['data']['seq_length']} tokens per step; a checkpoint of {report['bytes'] / 1e6:,.1f} MB is "
        f"written while the next step runs, {settings['rounds']} rounds. Median (smallest to largest). The step after "
        f"a save takes {in_words(report['after_over_plain'])} times as long as one without a save in the same round; "
        "the copy, before it, is not counted."
    )
    rows = [(r["part"], in_words({k: 1e3 * v for k, v in r["seconds"].items()})) for r in report["results"]]
    return "\n\n".join([heading, as_table(("part", "ms"), rows), *closing(report)]) + "\n"


def in_temporary_folder(config: RunConfig, measure: Callable[[RunConfig], dict[str, Any]]) -> dict[str, Any]:
    """Measure with checkpoints in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="megamoe-save-") as name:
        training = config.training.model_copy(update={"output_dir": name})
        return measure(config.model_copy(update={"training": training})) | {"config": dump_config(config)}
