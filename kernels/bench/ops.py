"""Each op against its floor and against plain torch: `python -m kernels.bench.ops --out FOLDER [--smoke]`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.bench import cases, draw, model
from kernels.bench.op_list import MEASUREMENTS, Measurement
from kernels.bench.results import write_part
from kernels.bench.run import device_of, in_short, missing_library, parser
from kernels.bench.timing import Timed, measure, not_run

OURS, PLAIN = "megamoe", "torch"


def measure_ops(
    device: torch.device, sizes: tuple[cases.Case, ...], copy_rate: float | None
) -> Iterator[dict[str, Any]]:
    """One row per op, case and implementation; fields in `kernels/results/README.md`.

    Args:
        copy_rate: bytes per second of a copy, measured in the same run; None: not known.
    """
    for case in sizes:
        for measurement in MEASUREMENTS:
            try:
                found = _measure(measurement, case, device)
            except torch.OutOfMemoryError as full:
                found = {name: (not_run(f"not run: {in_short(full)}"), None) for name in (OURS, PLAIN)}
            cost = model.cost(measurement.name, case.shape)
            for implementation, (timed, error) in found.items():
                yield row(measurement, case, implementation, timed, error, cost, copy_rate)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _measure(measurement: Measurement, case: cases.Case, device: torch.device) -> dict[str, tuple[Timed, float | None]]:
    """Time and difference from plain torch of each implementation."""
    count = draw.number_of_sets(model.cost(measurement.name, case.shape).bytes, device)
    inputs = [measurement.build(case.shape, draw.generator(device, number)) for number in range(count)]
    reason, error = missing_library(measurement.op), None
    if not reason:
        error = difference(measurement.ours(inputs[0]), measurement.plain(inputs[0]))
        if not error <= measurement.tolerance:
            reason = f"wrong: differs from plain torch by {error:.1e}, allowed {measurement.tolerance:.1e}"
    calls = {PLAIN: [partial(measurement.plain, each) for each in inputs]}
    if not reason:
        calls[OURS] = [partial(measurement.ours, each) for each in inputs]
    timed = measure(calls, device)
    return {OURS: (timed.get(OURS) or not_run(reason), error), PLAIN: (timed[PLAIN], None)}


def difference(ours: Any, plain: Any) -> float:
    """Largest ||ours - plain|| / ||plain|| over the outputs; infinite where shapes differ, NaN where there is one."""
    pairs = list(zip(_tensors(ours), _tensors(plain), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    found = [_relative(a, b) for a, b in pairs]
    return float("nan") if any(value != value for value in found) else max(found)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _relative(ours: Tensor, plain: Tensor) -> float:
    """In fp32 or wider, a part of the rows at a time: these tensors may fill a good part of the memory."""
    wide = torch.float64 if not ours.dtype.is_floating_point or ours.dtype == torch.float32 else torch.float32
    apart = size = 0.0
    for a, b in zip(ours.split(1 << 14), plain.split(1 << 14), strict=True):
        apart += float((a.to(wide) - b.to(wide)).square().sum(dtype=torch.float64))
        size += float(b.to(wide).square().sum(dtype=torch.float64))
    return (apart / size) ** 0.5 if size else float(apart > 0)


def row(
    measurement: Measurement,
    case: cases.Case,
    implementation: str,
    timed: Timed,
    error: float | None,
    cost: model.Cost,
    copy_rate: float | None,
) -> dict[str, Any]:
    """A measurement with what follows from it."""
    seconds = timed.best / 1e6 if timed.best else None
    rate = cost.bytes / seconds if seconds else None
    return {
        "op": measurement.name,
        "case": case.name,
        "shape": vars(case.shape),
        "implementation": implementation,
        **timed.to_json(),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_per_second": rate / 1e9 if rate else None,
        "share_of_copy": rate / copy_rate if rate and copy_rate else None,
        "difference": error,
    }


def copy_rate_in(folder: Path) -> float | None:
    """Bytes per second of a copy, if the ceilings of this run have been measured."""
    path = folder / "ceilings.json"
    found = json.loads(path.read_text("utf-8"))["copy"]["bytes_per_second"] if path.exists() else None
    return float(found) if found else None


def main() -> None:
    arguments = parser("Measure every op.")
    arguments.add_argument("--only", default="", help="comma-separated names, as in kernels/bench/model.py")
    args = arguments.parse_args()
    device = device_of(args.smoke)
    rows = []
    for found in measure_ops(device, cases.SMOKE_CASES if args.smoke else cases.CASES, copy_rate_in(args.out)):
        rows.append(found)
        write_part(args.out, "ops", rows)
        _show(found)


def _show(found: dict[str, Any]) -> None:
    name = f"{found['case']:<9} {found['op']:<19} {found['implementation']:<8}"
    if not found["microseconds"]:
        checked = "" if found["difference"] is None else f" (differs from torch by {found['difference']:.0e})"
        print(f"{name} {found['status']}{checked}", flush=True)
        return
    series = " / ".join(f"{value:.1f}" for value in found["microseconds"])
    share = f"{found['share_of_copy']:.0%} of copy" if found["share_of_copy"] else ""
    print(f"{name} {series} us  {found['gb_per_second']:.0f} GB/s  {share}", flush=True)


if __name__ == "__main__":
    main()
