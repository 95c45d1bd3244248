"""Runs of run.sh with training.rank_invariant, bit by bit: `python invariance.py RUNS OUT` writes invariance.md.

Exit code 1 where any loss, gradient norm or final weight of the runs on two ranks and four differs from that on one.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.reader import Reader

ROUTERS, RANKS = ("topk", "resonance"), (1, 2, 4)
SERIES = ("loss", "cross_entropy", "gradient_norm")


def series(run: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "cross_entropy" in line]
    found = {name: [line[name] for line in steps] for name in SERIES}
    return found | {"validation": [line["validation_loss"] for line in lines if "validation_loss" in line]}


def weights(run: Path) -> dict[str, torch.Tensor]:
    reader = Reader(folders.complete(run)[-1])
    return {name: reader.read(name) for name in reader.index.tensors}


def main() -> None:
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    rows, same = [], True
    for router in ROUTERS:
        one, one_weights = series(runs / f"invariant_{router}_1"), weights(runs / f"invariant_{router}_1")
        for ranks in RANKS[1:]:
            run = runs / f"invariant_{router}_{ranks}"
            row, equal = compare(one, series(run), one_weights, weights(run))
            rows.append(f"| {router} | {ranks} | {row} |")
            same = same and equal
    (out / "invariance.md").write_text(report(rows))
    sys.exit(0 if same else 1)


def compare(
    one: dict[str, Any], other: dict[str, Any], one_weights: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> tuple[str, bool]:
    numbers = {name: sum(a == b for a, b in zip(one[name], other[name], strict=True)) for name in one}
    tensors = sum(torch.equal(one_weights[name], value) for name, value in weights.items())
    cells = [f"{numbers[name]} of {len(one[name])}" for name in one] + [f"{tensors} of {len(one_weights)}"]
    equal = tensors == len(one_weights) == len(weights) and all(numbers[n] == len(one[n]) for n in one)
    return " | ".join(cells), equal


def report(rows: list[str]) -> str:
    names = ("loss", "cross entropy", "gradient norm", "validation loss", "tensors of the last checkpoint")
    return "\n".join(
        [
            "# The tiny recipe on one rank, two and four, to the bit",
            "",
            "Numbers that have the bits of the run on one rank; the tensors are weights, both moments of Adam and",
            "running statistics.",
            "",
            "- command: bash configs/reproduce/tiny/run.sh (`training.rank_invariant`, fp32, OMP_NUM_THREADS=1)",
            f"- torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
            "",
            f"| router | ranks (ep) | {' | '.join(names)} |",
            "|---" * (2 + len(names)) + "|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
