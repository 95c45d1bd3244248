"""The whole tiny recipe in fp64 on one rank and on two: every loss and every routing decision compared.

`python layouts.py OUT` writes layouts.json and layouts.md. In fp32 the two layouts part at the first token whose two
best experts are nearer than rounding; in fp64 rounding is 1e-16, so they should part much later or never.

The control shows what is the layout's and what is the model's: one rank again, with every weight of the embedding moved
by one unit in its last place. What parts two layouts no sooner than this parts one layout from itself.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from megamoe.config.load import load_config
from megamoe.model.decoder import Decoder
from megamoe.testing import parity
from megamoe.testing.ranks import run_ranks

RECIPE = "configs/tiny.yaml"
ROUTERS = ("topk", "resonance")
FP64 = ("training.precision=fp64", "parallel.zero_stage=0")
LIMIT = 3600.0  # seconds for one run


def train(router: str, ep: int, disturbed: bool = False) -> parity.ParityRun:
    """All steps of the recipe on its own samples."""
    config = load_config([RECIPE, f"configs/moe/{router}.yaml"], [*FP64, f"parallel.ep={ep}"])
    before = disturb if disturbed else leave
    return parity.train_steps(config, config.training.steps, parity.prepared_samples(config), before)


def leave(model: Decoder) -> None:
    """Nothing."""


@torch.no_grad()
def disturb(model: Decoder) -> None:
    """Every weight of the embedding to the next larger number."""
    weight = model.embedding.weight
    weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))


def compare(one: parity.ParityRun, two: parity.ParityRun) -> dict[str, Any]:
    return {
        "loss_one_rank": one.losses,
        "loss_other": two.losses,
        "loss_difference": relative(two.losses, one.losses),
        "norm_difference": relative(two.norms, one.norms),
        "largest_weight_difference": parity.compare_weights(two, one),
        "routed_tokens": sum(len(choices) for choices in one.choices.values()),
        "routing_flips": len(parity.routing_flips(two, one)),
        "smallest_margin": min(float(margins.min()) for margins in one.margins.values()),
    }


def first_above(differences: list[float], bound: float) -> str:
    """The first step (from 1) whose difference is above the bound."""
    return next((f"step {i}" for i, value in enumerate(differences, 1) if value > bound), "never")


def relative(actual: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True)]


def table(results: dict[str, dict[str, Any]]) -> str:
    head = ("runs", "largest difference of a loss", "of a gradient norm", "of a weight at the end", "loss off by 1e-6")
    rows = [f"| {' | '.join(head)} | token and layer decisions | that differ | smallest margin |", "|---" * 8 + "|"]
    for router, result in results.items():
        differences = (
            max(result["loss_difference"]),
            max(result["norm_difference"]),
            result["largest_weight_difference"],
        )
        rows.append(
            f"| {router} | {' | '.join(f'{value:.1e}' for value in differences)} "
            f"| {first_above(result['loss_difference'], 1e-6)} | {result['routed_tokens']:,} "
            f"| {result['routing_flips']:,} | {result['smallest_margin']:.1e} |"
        )
    return "\n".join(rows)


def main() -> None:
    results = {}
    for router in ROUTERS:
        one, two, control = (run_ranks(train, *words, timeout=LIMIT)[0] for words in runs(router))
        results[f"{router}: one rank and two"] = compare(one, two)
        results[f"{router}: one rank and the same, disturbed"] = compare(one, control)
    write(results, Path(sys.argv[1]))


def runs(router: str) -> list[tuple[int, str, int, bool]]:
    """Ranks, and what `train` is called with."""
    return [(1, router, 1, False), (2, router, 2, False), (1, router, 1, True)]


def write(results: dict[str, dict[str, Any]], out: Path) -> None:
    conditions = {
        "command": "python configs/reproduce/tiny/layouts.py configs/reproduce/tiny",
        "steps": load_config([RECIPE]).training.steps,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": "fp64, ZeRO 0; one rank against two (EP 2), each with one thread",
        "differences": "relative; a weight's to the largest magnitude of its tensor",
    }
    text = "\n".join(f"- {name}: {value}" for name, value in conditions.items())
    (out / "layouts.json").write_text(json.dumps({"conditions": conditions, "runs": results}, indent=1) + "\n")
    title = "# The tiny recipe in fp64: one rank against two, and against itself"
    (out / "layouts.md").write_text(f"{title}\n\n{text}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
