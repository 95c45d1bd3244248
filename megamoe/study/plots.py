"""Pictures of a study, as SVG files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.common.errors import ConfigError
from megamoe.study.table import PLOTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#b5471b", "#2f8f5b", "#8a4fa3", "#c9920e", "#4b9fb5", "#a8324e", "#6b6b6b")
"""One per arm, in the order of the study; the baseline is the first that is black."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Equal results give equal files.
    "svg.hashsalt": "megamoe",
}


def require_matplotlib() -> None:
    """Refuse at the start what would fail at the end.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "A study draws pictures with matplotlib, which is not installed.",
            got=str(error),
            todo='pip install -c docker/constraints.txt ".[study]" (the extra megamoe[study])',
        ) from error


def draw(results: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw all pictures; returns (file name, what it shows) of each."""
    import matplotlib

    arms = {name: arm for name, arm in results["arms"].items() if arm["means"]}
    colours = _colours(results)
    with matplotlib.rc_context(STYLE):
        figures = {
            "differences": _differences(results, arms, colours),
            "cost_against_loss": _cost_against_loss(results, arms, colours),
            "loss": _loss(arms, colours),
        }
        titles = dict(PLOTS)
        for name in _curve_names(arms):
            figures[f"curve_{name}"] = _curve(name, arms, colours)
            titles[f"curve_{name}"] = f"{_words(name).capitalize()} over steps, for each block; mean over seeds"
        drawn = [(name, figure) for name, figure in figures.items() if figure is not None]
        for name, figure in drawn:
            figure.savefig(
                folder / f"{name}.svg",
                metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
                bbox_inches="tight",
            )
    return [(f"{name}.svg", titles[name]) for name, _ in drawn]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=True)
    return figure, list(axes[0])


def _colours(results: dict[str, Any]) -> dict[str, str]:
    others = [name for name in results["arms"] if name != results["baseline"]]
    return {results["baseline"]: "#111111"} | {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(others)}


def _compared(results: dict[str, Any], arms: dict[str, Any]) -> list[str]:
    return [name for name, arm in arms.items() if {"validation_loss", results["judge"]} <= arm["differences"].keys()]


def _differences(results: dict[str, Any], arms: dict[str, Any], colours: dict[str, str]) -> Figure | None:
    """A dot and an interval for each arm, the first arm on top."""
    names = _compared(results, arms)
    if not names:
        return None
    figure, (axes,) = _figure(7.5, 1.3 + 0.42 * len(names))
    axes.axvline(0, color="#111111", linewidth=1)
    for row, name in enumerate(reversed(names)):
        versus = arms[name]["differences"][results["judge"]]
        if versus["low"] is not None:
            axes.plot([versus["low"], versus["high"]], [row, row], color=colours[name], linewidth=2)
        axes.plot(versus["mean"], row, "o", color=colours[name], markersize=7)
    axes.set_yticks(range(len(names)), [arms[name]["label"] for name in reversed(names)])
    axes.set_ylim(-0.6, len(names) - 0.4)
    base = results["arms"][results["baseline"]]["label"]
    lower_is_better = results["judge"] == "validation_loss"
    unit = "nats per token" if lower_is_better else "share of conversations"
    axes.set_xlabel(f"{_words(results['judge'])} minus that of: {base} [{unit}]")
    left, right = ("better", "worse") if lower_is_better else ("worse", "better")
    for text, side, shift in ((f"← {left}", "right", -6), (f"{right} →", "left", 6)):
        axes.annotate(text, (0, 1), (shift, 2), ("data", "axes fraction"), "offset points", ha=side)
    return figure


def _cost_against_loss(results: dict[str, Any], arms: dict[str, Any], colours: dict[str, str]) -> Figure | None:
    """Tokens per expert to the right, loss upwards: what is below and left of the baseline is better in both."""
    names = [name for name in _compared(results, arms) if arms[name]["ratios"].get("processed") is not None]
    if not names:
        return None
    figure, (axes,) = _figure(8.5, 4.4)
    axes.axhline(0, color="#111111", linewidth=1)
    axes.axvline(100, color="#111111", linewidth=1)
    axes.plot(100, 0, "s", color="#111111", markersize=8, label=f"{results['arms'][results['baseline']]['label']}")
    for name in names:
        versus, share = arms[name]["differences"]["validation_loss"], 100 * arms[name]["ratios"]["processed"]
        if versus["low"] is not None:
            axes.plot([share, share], [versus["low"], versus["high"]], color=colours[name], linewidth=2)
        axes.plot(share, versus["mean"], "o", color=colours[name], markersize=7, label=arms[name]["label"])
    axes.set_xlabel("tokens per expert [% of the baseline's]")
    axes.set_ylabel("validation loss minus the baseline's\n[nats per token]")
    _legend(figure, axes)
    return figure


def _loss(arms: dict[str, Any], colours: dict[str, str]) -> Figure | None:
    """Validation loss over steps; the training loss thin behind it."""
    if not arms:
        return None
    figure, (axes,) = _figure(8.5, 4.4)
    for name, arm in arms.items():
        axes.plot(*_xy(arm["training"]), color=colours[name], linewidth=0.7, alpha=0.35)
        axes.plot(*_xy(arm["validation"]), "o-", color=colours[name], linewidth=2, markersize=4, label=arm["label"])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss [nats per token]\nthick: validation, thin: training")
    values = [y for arm in arms.values() for _, y in arm["validation"] if math.isfinite(y)] or [0.0]
    low, high = min(values), max(values)
    axes.set_ylim(low - 0.15 * (high - low) - 0.05, high + 0.6 * (high - low) + 0.1)
    _legend(figure, axes)
    return figure


def _curve(name: str, arms: dict[str, Any], colours: dict[str, str]) -> Figure:
    """One panel for each block."""
    layers = sorted({int(layer) for arm in arms.values() for layer in arm["curves"].get(name, {})})
    figure, panels = _figure(3.0 * len(layers) + 2.5, 3.4, len(layers))
    for layer, axes in zip(layers, panels, strict=True):
        for arm_name, arm in arms.items():
            points = arm["curves"].get(name, {}).get(layer)
            if points:
                axes.plot(*_xy(points), color=colours[arm_name], linewidth=1.6, label=arm["label"])
        axes.set_title(f"block {layer}", fontsize=10)
        axes.set_xlabel("optimizer step")
    panels[0].set_ylim(bottom=0)  # shared, so only now: it would keep later panels from raising the top
    panels[0].set_ylabel(f"{_words(name)}")
    _legend(figure, panels[0])
    return figure


def _curve_names(arms: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for arm in arms.values() for name in arm["curves"]))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _xy(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]
