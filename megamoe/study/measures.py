"""What is read from one run's metrics.jsonl."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]

_LAYER = re.compile(r"layers\.(\d+)\.(\w+)")
CURVE_POINTS = 60
"""Points kept of a curve: each is the mean of as many steps as needed."""


@dataclass(frozen=True)
class Measures:
    """Of one run.

    Attributes:
        scalars: one number each. `validation_loss` and what else is measured with it after the last step; `processed`,
            rows an expert works on relative to K T / E; every scalar that layers report, as the mean over layers and
            steps; `<name>_last`: the same over the last quarter of the steps; `step_seconds`, the median.
        layers: per metric of the layers, its mean over the last quarter for each layer.
        validation: (step, loss).
        training: (step, cross entropy), thinned.
        curves: per metric asked for and layer, (step, value), thinned.
    """

    scalars: dict[str, float]
    layers: dict[str, dict[int, float]]
    validation: list[tuple[float, float]]
    training: list[tuple[float, float]]
    curves: dict[str, dict[int, list[tuple[float, float]]]]


def read_measures(folder: Path, curves: Sequence[str] = ()) -> Measures:
    """Read a complete run.

    Args:
        curves: metrics of the layers that are wanted over steps; a list metric (one value per expert) counts as its
            mean.
    """
    lines = read_lines(folder)
    steps = [line for line in lines if "cross_entropy" in line]
    last = steps[-max(1, len(steps) // 4) :]
    validation = [(float(line["step"]), float(line["validation_loss"])) for line in lines if "validation_loss" in line]
    names = layer_metrics(steps)
    whole, end = layer_means(steps, names), layer_means(last, names)
    scalars = {"step_seconds": _median(line["step_seconds"] for line in steps), **_last_validation(lines)}
    scalars |= {name: _mean(per_layer.values()) for name, per_layer in whole.items()}
    scalars |= {f"{name}_last": _mean(per_layer.values()) for name, per_layer in end.items()}
    scalars |= _processed(scalars)
    return Measures(
        scalars,
        end,
        validation,
        _thinned([(float(line["step"]), float(line["cross_entropy"])) for line in steps]),
        {name: _curves(steps, name, indices) for name, indices in names.items() if name in curves},
    )


def _last_validation(lines: Lines) -> dict[str, float]:
    """Everything that was measured after the last step."""
    last = next(line for line in reversed(lines) if "validation_loss" in line)
    where = ("step", "consumed_samples", "consumed_tokens")
    return {name: float(value) for name, value in last.items() if name not in where}


def read_lines(folder: Path) -> Lines:
    """The lines of a run's metrics.jsonl; what was not finite, which is null there, as NaN."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


def layer_metrics(steps: Lines) -> dict[str, list[int]]:
    """Names of the layers' metrics, each with the layers that report it."""
    found = [match for match in map(_LAYER.fullmatch, steps[0]) if match] if steps else []
    names: dict[str, list[int]] = {}
    for match in found:
        names.setdefault(match[2], []).append(int(match[1]))
    return names


def layer_means(steps: Lines, names: Mapping[str, Sequence[int]]) -> dict[str, dict[int, float]]:
    """Per metric and layer the mean over steps."""
    return {
        name: {index: _mean(_value(line[f"layers.{index}.{name}"]) for line in steps) for index in indices}
        for name, indices in names.items()
    }


def _processed(scalars: Mapping[str, float]) -> dict[str, float]:
    # The mean of `load` over experts counts rows that an expert takes besides the tokens' own choices too.
    result = {}
    for end in ("", "_last"):
        if f"load{end}" in scalars:
            result[f"processed{end}"] = scalars[f"load{end}"]
        elif f"drop_share{end}" in scalars:
            result[f"processed{end}"] = 1.0 - scalars[f"drop_share{end}"]
    return result


def _curves(steps: Lines, name: str, indices: Sequence[int]) -> dict[int, list[tuple[float, float]]]:
    key = "layers.{}." + name
    return {i: _thinned([(float(line["step"]), _value(line[key.format(i)])) for line in steps]) for i in indices}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points, at most `CURVE_POINTS`."""
    size = -(-len(points) // CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(_mean(x for x, _ in group), _mean(y for _, y in group)) for group in groups]


def _value(value: float | list[float]) -> float:
    return _mean(value) if isinstance(value, list) else float(value)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
