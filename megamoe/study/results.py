"""Everything that a study found, as one JSON-able mapping."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megamoe.bench.conditions import cpu_model
from megamoe.common import env
from megamoe.config.load import dump_config
from megamoe.config.run import RunConfig
from megamoe.study import paired
from megamoe.study.clusters import measure_clusters
from megamoe.study.cost import read_cost
from megamoe.study.measures import Measures, read_measures
from megamoe.study.plan import Study
from megamoe.study.runs import Run, runs_of, starts_of
from megamoe.study.sensitivity import Subject, measure_sensitivities

CLUSTERS = "calinski_harabasz"


def collect(study: Study, folder: Path, command: str) -> dict[str, Any]:
    """Read all complete runs and the last measurement of cost, and compare.

    Args:
        folder: of the runs.
        command: what a reader types to repeat the study.
    """
    runs = runs_of(study, folder)
    done = [(run, checkpoint) for run in runs if run.complete() and (checkpoint := run.checkpoint())]
    measures = [read_measures(run.folder, study.plan.curves) for run, _ in done]
    if CLUSTERS in study.plan.measures:
        clusters = measure_clusters([(run.folder, checkpoint) for run, checkpoint in done])
        for measure, per_layer in zip(measures, clusters, strict=True):
            if per_layer:
                measure.scalars[CLUSTERS] = statistics.fmean(per_layer.values())
                measure.layers[CLUSTERS] = per_layer
    if study.start is not None and "sensitivity" in study.plan.measures:
        starts = {run.seed: run.checkpoint() for run in starts_of(study, folder)}
        subjects = [Subject(run.folder, checkpoint, starts[run.seed] or checkpoint) for run, checkpoint in done]
        for measure, values in zip(measures, measure_sensitivities(subjects), strict=True):
            measure.scalars.update(values)
    found = {run: measure for (run, _), measure in zip(done, measures, strict=True)}
    cost = read_cost(study, folder)
    return {
        "title": study.plan.title,
        "question": study.plan.question,
        "conditions": _conditions(study, command),
        "baseline": study.plan.baseline,
        "judge": study.plan.judge,
        "measures": list(study.plan.measures),
        "arms": {name: _arm(study, name, found) | {"cost": cost.get(name)} for name in study.arms},
        "missing": [run.name for run in runs if run not in found],
        "runs": [_run(run, measure) for run, measure in found.items()],
    }


def config_digest(config: RunConfig) -> str:
    """Names a configuration, without its seed and folder."""
    values = dump_config(config)
    del values["training"]["seed"], values["training"]["output_dir"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _conditions(study: Study, command: str) -> dict[str, Any]:
    training, data = study.baseline.config.training, study.baseline.config.data
    cuda = torch.cuda.is_available()
    return {
        "command": command,
        "seeds": list(study.seeds),
        "steps": training.steps,
        "tokens per run": training.steps * training.global_batch_size * data.seq_length,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{torch.cuda.get_device_name()}" if cuda else f"{cpu_model()}, {env.cpu_count()} CPUs",
        "precision": training.precision,
    }


def _arm(study: Study, name: str, found: dict[Run, Measures]) -> dict[str, Any]:
    arm, own, base = study.arms[name], _by_seed(found, name), _by_seed(found, study.plan.baseline)
    differences = {
        key: difference._asdict()
        for key, values in own.items()
        if name != study.plan.baseline and (difference := paired.difference(values, base.get(key, {})))
    }
    judge = study.plan.judge
    judged = own.get(judge, {}), base.get(judge, {})
    versus = paired.difference(*judged) if name != study.plan.baseline else None
    return {
        "label": arm.plan.label,
        "why": arm.plan.why,
        "settings": list(arm.plan.set),
        "config_digest": config_digest(arm.config),
        "means": {key: paired.summary(list(values.values()))._asdict() for key, values in own.items()},
        "differences": differences,
        "ratios": {key: paired.ratio(values, base.get(key, {})) for key, values in own.items()},
        "verdict": versus.verdict(lower_is_better=judge == "validation_loss") if versus is not None else None,
        "layers": _mean_layers([m for run, m in found.items() if run.arm == name]),
        "validation": _mean_points([m.validation for run, m in found.items() if run.arm == name]),
        "training": _mean_points([m.training for run, m in found.items() if run.arm == name]),
        "curves": _mean_curves([m for run, m in found.items() if run.arm == name]),
    }


def _run(run: Run, measures: Measures) -> dict[str, Any]:
    kept = {key: value for key, value in asdict(measures).items() if key in ("scalars", "layers", "validation")}
    return {"arm": run.arm, "seed": run.seed, **kept}


def _by_seed(found: dict[Run, Measures], arm: str) -> dict[str, dict[int, float]]:
    """Per scalar the value by seed."""
    values: dict[str, dict[int, float]] = {}
    for run, measures in found.items():
        if run.arm == arm:
            for key, value in measures.scalars.items():
                values.setdefault(key, {})[run.seed] = value
    return values


def _mean_layers(measures: Sequence[Measures]) -> dict[str, dict[int, float]]:
    if not measures:
        return {}
    shared = [key for key in measures[0].layers if all(key in m.layers for m in measures)]
    return {
        key: {i: statistics.fmean(m.layers[key][i] for m in measures) for i in measures[0].layers[key]}
        for key in shared
    }


def _mean_curves(measures: Sequence[Measures]) -> dict[str, dict[int, list[list[float]]]]:
    return {
        name: {i: _mean_points([m.curves[name][i] for m in measures]) for i in layers}
        for name, layers in (measures[0].curves.items() if measures else ())
    }


def _mean_points(series: Sequence[Sequence[tuple[float, float]]]) -> list[list[float]]:
    """Mean over seeds of curves that have the same steps."""
    return [
        [points[0][0], statistics.fmean(y for _, y in points)]
        for points in (zip(*series, strict=True) if series else ())
    ]
