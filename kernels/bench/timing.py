"""Timing on a GPU: events around each call, rotating inputs, medians, every series twice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")
Call = Callable[[], object]

REPEATS = 50
SERIES = 2
WARMUP = 3
"""Calls before each series, of every input set at least one."""
CYCLES_PER_MICROSECOND = 2000
LONGEST_PAUSE = 2000.0
"""Microseconds."""
NO_GPU = "not run: no GPU"


@dataclass(frozen=True)
class Timed:
    """How long a call took.

    Attributes:
        status: "measured", or why it was not.
        microseconds: median of each series, on the device; empty where not measured.
        smallest, largest: over all series.
        host_microseconds: median time until the host had issued one call.
        repeats: calls per series.
    """

    status: str = "measured"
    microseconds: tuple[float, ...] = ()
    smallest: float | None = None
    largest: float | None = None
    host_microseconds: float | None = None
    repeats: int = 0

    @property
    def best(self) -> float | None:
        """The smaller of the medians: what else ran on the machine only ever adds."""
        return min(self.microseconds, default=None)

    def to_json(self) -> dict[str, Any]:
        """Fields by name, rounded to nanoseconds."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def not_run(reason: str) -> Timed:
    """A cell without a number."""
    return Timed(status=reason)


def measure(
    contestants: Mapping[Key, Sequence[Call]], device: torch.device, repeats: int = REPEATS
) -> dict[Key, Timed]:
    """Time every contestant, in turns of one series.

    Args:
        contestants: for each, the same call on different inputs. Together these should be well beyond the L2 cache.

    Without a GPU every call runs once, so that mistakes show, and nothing is timed.
    """
    if device.type != "cuda":
        for calls in contestants.values():
            calls[0]()
        return {key: not_run(NO_GPU) for key in contestants}
    series: dict[Key, list[list[float]]] = {key: [] for key in contestants}
    host: dict[Key, list[float]] = {key: [] for key in contestants}
    for _ in range(SERIES):
        for key, calls in contestants.items():
            host[key] += _warm_up(calls)
            series[key].append(_series(calls, repeats, statistics.median(host[key])))
    return {key: _timed(series[key], host[key], repeats) for key in contestants}


def _warm_up(calls: Sequence[Call]) -> list[float]:
    """Run every input set; microseconds that the host took for each call but the first."""
    taken = []
    for index in range(max(WARMUP, len(calls)) + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        calls[index % len(calls)]()
        taken.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    return taken[1:]


def _series(calls: Sequence[Call], repeats: int, host: float) -> list[float]:
    """Microseconds of each repeat.

    Before each, the device is kept busy for a little longer than the host needs to issue the call, so that gaps between
    its kernels do not count. A call that waits for the device gives that head start away and shows its gaps.
    """
    pause = int(min(1.5 * host + 20, LONGEST_PAUSE) * CYCLES_PER_MICROSECOND)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for index in range(repeats):
        torch.cuda._sleep(pause)
        starts[index].record()
        calls[index % len(calls)]()
        ends[index].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True)]


def _timed(series: list[list[float]], host: list[float], repeats: int) -> Timed:
    values = [value for one in series for value in one]
    medians = tuple(statistics.median(one) for one in series)
    return Timed("measured", medians, min(values), max(values), statistics.median(host), repeats)


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(entry) for entry in value]
    return round(value, 3) if isinstance(value, float) else value
