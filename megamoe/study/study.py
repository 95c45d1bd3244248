"""A study from its file to its report, in phases that can be repeated one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from megamoe.bench.report import write
from megamoe.common import env
from megamoe.common.log import get_logger
from megamoe.data.prepare import is_prepared, prepare
from megamoe.study import plots, table
from megamoe.study.cost import measure_cost
from megamoe.study.plan import Study, cost_config
from megamoe.study.results import collect
from megamoe.study.runs import Failure, runs_of, starts_of, train, unfinished

Phase = Literal["train", "cost", "report", "all"]

log = get_logger("megamoe.study")


@dataclass(frozen=True)
class Options:
    """How a study is carried out.

    Attributes:
        runs: folder of the runs.
        out: folder of the report.
        jobs: runs side by side.
        limit_minutes: of one run.
        fresh: delete runs with other settings.
        command: shown in the report.
    """

    runs: Path
    out: Path
    jobs: int
    limit_minutes: float
    fresh: bool
    phase: Phase
    command: str


class Outcome(NamedTuple):
    """What came of it."""

    failures: list[Failure]
    files: list[Path]
    page: str


def default_jobs() -> int:
    """Runs side by side: one per CPU, and one at a time where they would share a GPU."""
    return 1 if torch.cuda.is_available() else env.cpu_count()


def run_study(study: Study, options: Options) -> Outcome:
    """Train what is missing, measure the cost, report. Everything that can be wrong is looked for first.

    Raises:
        ConfigError: a wrong setting, or runs with other settings in the folder.
    """
    starts, runs = starts_of(study, options.runs), runs_of(study, options.runs)
    failures: list[Failure] = []
    if options.phase in ("report", "all"):
        plots.require_matplotlib()
    if study.plan.cost is not None and options.phase in ("cost", "all"):
        for arm in study.arms.values():
            cost_config(study, arm)
    if options.phase in ("train", "all"):
        first = unfinished(starts, options.fresh)
        left = unfinished(runs, options.fresh, first)
        _prepare_data(study)
        total, limit = len(starts) + len(runs), 60.0 * options.limit_minutes
        log.info("%d runs, %d of them complete already", total, total - len(first) - len(left))
        failures = train(first, options.jobs, limit)
        failed = {failure.run.seed for failure in failures}
        failures += train([run for run in left if run.seed not in failed], options.jobs, limit)
    # Without every arm there is nothing to take turns with; what is there is still worth a report.
    if study.plan.cost is not None and options.phase in ("cost", "all") and not failures:
        measure_cost(study, runs, options.runs)
    if options.phase in ("report", "all"):
        return Outcome(failures, *report(study, options))
    return Outcome(failures, [], "")


def report(study: Study, options: Options) -> tuple[list[Path], str]:
    """Write results.json, results.md and the pictures; returns the files and the page."""
    results = collect(study, options.runs, options.command)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(results, options.out)
    page = table.markdown(results, pictures)
    files = write(results, page, options.out / "results.json")
    return [*files, *(options.out / name for name, _ in pictures)], page


def _prepare_data(study: Study) -> None:
    data = study.baseline.config.data  # the same for all arms
    if not is_prepared(data):
        log.info("preparing %s", data.prepared_dir)
        prepare(data, progress=True)
