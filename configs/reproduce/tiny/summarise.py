"""Table and plot of the runs that run.sh made: `python summarise.py RUNS OUT` writes results.json, .md and .svg."""

from __future__ import annotations

import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from megamoe.config.load import load_config

COLOURS = {"topk_2": "#1f5fa8", "topk_1": "#8fb8e0", "resonance_2": "#b5471b", "resonance_1": "#eaa585"}


def read(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "cross_entropy" in line]
    return {
        "loss": [line["cross_entropy"] for line in steps],
        "validation": [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line],
        "tokens_per_second": sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2],
    }


def first_difference(one: list[float], other: list[float], bound: float) -> int | None:
    """First step (from 1) at which the losses differ by more than the bound."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True), 1) if abs(a - b) > bound), None)


def table(runs: dict[str, dict[str, Any]], uniform: float) -> str:
    rows = ["| run | first loss | validation loss | share of ln V |", "|---|---|---|---|"]
    for name, run in runs.items():
        final = run["validation"][-1][1]
        rows.append(f"| {name} | {run['loss'][0]:.4f} | {final:.4f} | {final / uniform:.1%} |")
    rows += ["", "| router | largest difference between 1 and 2 ranks, steps 1-20 | whole run | first above 1e-4 |"]
    rows += ["|---|---|---|---|"]
    for router in ("topk", "resonance"):
        one, two = runs[f"{router}_1"]["loss"], runs[f"{router}_2"]["loss"]
        gaps = [abs(a - b) for a, b in zip(one, two, strict=True)]
        step = first_difference(one, two, 1e-4)
        rows.append(f"| {router} | {max(gaps[:20]):.1e} | {max(gaps):.1e} | {f'step {step}' if step else 'never'} |")
    return "\n".join(rows)


def plot(runs: dict[str, dict[str, Any]], uniform: float) -> str:
    """Validation loss over steps as an SVG."""
    width, height, left, bottom = 640, 360, 60, 40
    last = max(step for run in runs.values() for step, _ in run["validation"])

    def x(step: float) -> float:
        return left + (width - left - 140) * step / last

    def y(loss: float) -> float:
        return height - bottom - (height - bottom - 20) * loss / 9.0

    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for loss in range(0, 10, 1):
        parts.append(f'<line x1="{left}" x2="{x(last)}" y1="{y(loss)}" y2="{y(loss)}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 8}" y="{y(loss) + 4}" text-anchor="end">{loss}</text>')
    for loss, text in ((uniform, "ln V"), (0.6 * uniform, "60 % of it")):
        parts.append(
            f'<line x1="{left}" x2="{x(last)}" y1="{y(loss)}" y2="{y(loss)}" stroke="#555" stroke-dasharray="4 4"/>'
        )
        parts.append(f'<text x="{x(last) + 6}" y="{y(loss) + 4}">{text}</text>')
    for index, (name, run) in enumerate(runs.items()):
        points = [(1, run["loss"][0]), *run["validation"]]
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
        dash = ' stroke-dasharray="6 4"' if name.endswith("_1") else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"{dash}/>')
        parts.append(f'<text x="{x(last) + 6}" y="{y(1.6) + 16 * index}" fill="{COLOURS[name]}">{name}</text>')
    parts += [f'<text x="{x(s)}" y="{height - 18}" text-anchor="middle">{s}</text>' for s in range(0, last + 1, 30)]
    parts.append(f'<text x="{x(last / 2)}" y="{height - 3}" text-anchor="middle">step</text>')
    parts.append(f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})">validation loss</text>')
    style = 'font-family="sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    runs = {name: read(folder / name) for name in COLOURS}
    config = load_config([folder / "topk_2" / "config.json"])
    uniform = math.log(config.data.tokenizer.vocab_size)
    conditions = {
        "command": "bash configs/reproduce/tiny/run.sh",
        "steps": config.training.steps,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, 2 cores, fp32, shared with other work: timings are not comparable",
        "ln_vocabulary": uniform,
    }
    text = "\n".join(f"- {name}: {value}" for name, value in conditions.items())
    (out / "results.json").write_text(json.dumps({"conditions": conditions, "runs": runs}, indent=1) + "\n")
    (out / "results.md").write_text(
        f"# The tiny recipe, both routers, on one and two ranks\n\n{text}\n\n{table(runs, uniform)}\n"
    )
    (out / "results.svg").write_text(plot(runs, uniform))


if __name__ == "__main__":
    main()
