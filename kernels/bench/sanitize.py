"""Every op once, at small and awkward sizes, for a memory or race checker to watch.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m kernels.bench.sanitize
python -m kernels.bench.sanitize --smoke       on the CPU

Inputs are made on the host, so that the checker sees few kernels but ours. Results are compared with those of the CPU
library, so that a kernel that does nothing does not pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.bench.model import Shape
from kernels.bench.op_list import MEASUREMENTS, Inputs, Measurement
from kernels.bench.ops import difference
from kernels.bench.run import device_of, missing_library, parser

SHAPES = (
    Shape(1, 64, 32, 8, 1),
    Shape(65, 128, 64, 8, 2),
    Shape(130, 72, 40, 64, 8),  # widths that end in the middle of a tile
)
SHIFTED = ("x", "y", "dout")
"""Inputs that may begin anywhere."""


def check(measurement: Measurement, shape: Shape, device: torch.device, shift: bool) -> str:
    """What came of it: "ok", or what is wrong."""
    reason = missing_library(measurement.op)
    if reason:
        return reason
    inputs = measurement.build(shape, torch.Generator().manual_seed(shape.tokens))
    wanted = measurement.ours(inputs)
    found = measurement.ours(odd(_moved(inputs, device)) if shift else _moved(inputs, device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    apart = difference(_on_host(found), wanted)
    return "ok" if apart <= measurement.tolerance else f"wrong: differs from the CPU by {apart:.1e}"


def odd(inputs: Inputs) -> Inputs:
    """The same with rows that do not begin at multiples of 16 bytes: views of wider rows, one element in."""
    return {name: _shifted(value) if name in SHIFTED else value for name, value in inputs.items()}


def _shifted(rows: Tensor) -> Tensor:
    wide = torch.empty(rows.shape[0], rows.shape[1] + 3, dtype=rows.dtype, device=rows.device)
    wide[:, 1:-2] = rows
    return wide[:, 1:-2]


def _moved(value: Any, device: torch.device) -> Any:
    """Inputs on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    return type(value)(*(_moved(entry, device) for entry in value)) if isinstance(value, tuple) else value


def _on_host(result: Any) -> list[Tensor]:
    return [result.cpu()] if isinstance(result, Tensor) else [part.cpu() for part in result]


def run(device: torch.device) -> Iterator[tuple[str, str]]:
    """(what, outcome) of every op and size."""
    for shape in SHAPES:
        for measurement in MEASUREMENTS:
            size = f"T {shape.tokens}, D {shape.hidden}, E {shape.experts}, K {shape.top_k}"
            for shift in (False, True):
                what = f"{measurement.name:<19} {size}{', misaligned' * shift}"
                yield what, check(measurement, shape, device, shift)


def main() -> None:
    args = parser("Run every op for a checker.").parse_args()
    outcomes = list(run(device_of(args.smoke)))
    for what, outcome in outcomes:
        print(f"{what:<58} {outcome}")
    wrong = [what for what, outcome in outcomes if outcome != "ok"]
    print(f"{len(outcomes)} runs, {len(wrong)} not ok")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
