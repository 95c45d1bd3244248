"""What a step of each arm costs at the trained state: all arms in one group of processes, in turns."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megamoe.bench.quiet import wait_for_quiet
from megamoe.bench.rounds import in_turns, ratios, spread
from megamoe.common.errors import ConfigError
from megamoe.common.log import get_logger, setup_logging
from megamoe.config.load import dump_config
from megamoe.config.run import RunConfig
from megamoe.data.loader import BatchLoader
from megamoe.data.manifest import check_prepared
from megamoe.data.sft_loader import SFTLoader
from megamoe.data.sft_store import open_sft
from megamoe.parallel.collectives import barrier
from megamoe.study.plan import CostPlan, Study, cost_config
from megamoe.study.runs import Run
from megamoe.testing.ranks import run_ranks
from megamoe.training.checkpoint.folder import read_manifest
from megamoe.training.checkpoint.weights import load_weights
from megamoe.training.job import build_engine
from megamoe.training.metrics import StepMetrics
from megamoe.training.run_folder import write_json
from megamoe.training.setup import Runtime, distributed
from megamoe.training.step import Loader, rank_batches, train_step

FILE = "cost.json"
WARMUP_ROUNDS = 2
TIMEOUT_SECONDS = 7200.0
SUMMED = ("sent_bytes",)
"""Metrics that are added up over layers; of others the mean counts."""

log = get_logger("megamoe.study")


@dataclass(frozen=True)
class Task:
    """One arm's part."""

    config: RunConfig
    checkpoint: str
    folder: str
    """Of the run."""


def measure_cost(study: Study, runs: list[Run], folder: Path) -> Path:
    """Measure, and write `cost.json` into the study's folder.

    The weights are those of each arm's run with the first seed. The learning rate is 0, so that they stay.

    Raises:
        ConfigError: an arm is not trained yet, or the arms differ in layout.
    """
    plan = study.plan.cost
    assert plan is not None
    tasks = {run.arm: _task(study, run) for run in runs if run.seed == study.seeds[0]}
    layouts = {task.config.parallel for task in tasks.values()}
    if len(layouts) > 1:
        raise ConfigError(
            "The arms cannot share one group of processes.",
            got="different sections `parallel`",
            todo="set parallel.* in cost.set",
        )
    log.info("cost: %d arms on %d ranks, %d rounds of %d steps", len(tasks), plan.ranks, plan.rounds, plan.steps)
    seconds, metrics, others = run_ranks(_measure, plan.ranks, tasks, plan, init=False, timeout=TIMEOUT_SECONDS)[0]
    baseline = seconds[study.plan.baseline]
    arms = {
        name: {
            "config": dump_config(study.arms[name].config),
            "seconds_per_step": spread(second / plan.steps for second in own)._asdict(),
            "step_time": ratios(own, baseline)._asdict(),
            "metrics": metrics[name],
        }
        for name, own in seconds.items()
    }
    write_json(folder / FILE, {"settings": plan.model_dump(mode="json"), "others_cpu_share": others, "arms": arms})
    return folder / FILE


def read_cost(study: Study, folder: Path) -> dict[str, dict[str, Any]]:
    """Per arm what was measured last, where its configuration is still the same; {} if the settings are others."""
    path = folder / FILE
    if study.plan.cost is None or not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    arms = stored["arms"]
    same = stored["settings"] == study.plan.cost.model_dump(mode="json")
    current = {n for n, arm in study.arms.items() if same and arms.get(n, {}).get("config") == dump_config(arm.config)}
    if study.plan.baseline not in current:
        current = set()
    if left_out := sorted(study.arms.keys() - current):
        log.warning("no cost for %s: %s is of other settings; run --phase cost", ", ".join(left_out), path)
    if not current:
        return {}
    base = arms[study.plan.baseline]["metrics"].get("sent_bytes")
    return {
        name: {
            "seconds_per_step": arms[name]["seconds_per_step"],
            "step_time": arms[name]["step_time"],
            "sent_ratio": arms[name]["metrics"].get("sent_bytes", 0.0) / base if base else None,
            "metrics": arms[name]["metrics"],
        }
        for name in study.arms
        if name in current
    }


def _task(study: Study, run: Run) -> Task:
    checkpoint = run.checkpoint()
    if checkpoint is None:
        raise ConfigError(
            "The cost is measured at the trained state, which is missing.",
            got=f"no complete checkpoint in {run.folder}",
            todo="run the phase train first",
        )
    return Task(cost_config(study, study.arms[run.arm]), str(checkpoint), str(run.folder))


def _measure(
    tasks: Mapping[str, Task], plan: CostPlan
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], dict[str, float]]:
    """On every rank: seconds per turn and metrics of each arm, and what others used of the CPUs."""
    warnings.simplefilter("ignore")
    setup_logging(1)  # the terminal belongs to the study
    config = next(iter(tasks.values())).config
    others: list[float] = []
    with distributed(config.parallel, config.training.timeout_minutes) as runtime:
        trainees = {name: Trainee(task, runtime) for name, task in tasks.items()}

        def turn(trainee: Trainee) -> Callable[[], None]:
            return lambda: trainee.train(plan.steps)

        def wait() -> None:
            if runtime.rank == 0:
                others.append(wait_for_quiet(plan.patience))
            barrier()

        turns = {name: turn(trainee) for name, trainee in trainees.items()}
        seconds = in_turns(turns, plan.rounds, WARMUP_ROUNDS, wait, title="cost" if runtime.rank == 0 else "")
        metrics = {name: trainee.metrics() for name, trainee in trainees.items()}
    return seconds, metrics, spread(others or [0.0])._asdict()


def _training_data(task: Task) -> Loader:
    config = task.config
    if config.finetune is not None:
        return SFTLoader(open_sft(Path(task.folder) / "data"), "train", config.training.seed)
    return BatchLoader(config.data, check_prepared(config.data), "train", config.training.seed)


@dataclass
class Trainee:
    """One arm at its trained state, going on with the training samples that follow its last step."""

    task: Task
    runtime: Runtime
    results: list[StepMetrics] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, checkpoint = self.task.config, Path(self.task.checkpoint)
        self.data = _training_data(self.task)
        self.consumed = config.training.steps * config.training.global_batch_size
        vocab_size = read_manifest(checkpoint).architecture["model.vocab_size"]
        self.engine = build_engine(config, self.runtime, vocab_size, partial(load_weights, checkpoint))

    def train(self, steps: int) -> None:
        """Optimizer steps as the training loop makes them, until all ranks are done."""
        training = self.task.config.training
        for _ in range(steps):
            batches = rank_batches(self.data, self.task.config, self.runtime, self.consumed)
            result, _ = train_step(self.engine, batches, 0.0)
            self.consumed += training.global_batch_size
            self.results.append(result)
        barrier()

    def metrics(self) -> dict[str, float]:
        """Means over all steps: of the layers' metrics, summed or averaged over layers and experts."""
        found: dict[str, list[float]] = {}
        for result in self.results:
            per_layer: dict[str, list[float]] = {}
            for name, value in result.values.items():
                if name.startswith("layers."):
                    per_layer.setdefault(name.split(".", 2)[2], []).append(float(value.float().mean()))
            for name, values in per_layer.items():
                combined = sum(values) if name in SUMMED else statistics.fmean(values)
                found.setdefault(name, []).append(combined)
        return {name: statistics.fmean(values) for name, values in found.items()}
