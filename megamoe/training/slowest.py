"""Which rank the others wait for.

Ranks that work together take equally long for a step, so its time says nothing about who was slow. What is compared is
the time of a rank's own work: reading data, by the clock, and

- without a GPU the processor time of the main thread, which does not run on while it waits for a collective;
- on a GPU the time that the device takes for the attention of this rank's first block. It is the same work everywhere,
  and (unless tp or cp are on) waits for nobody; one step late, as nothing waits for the device to measure it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Stopwatch:
    """Measures this rank's own work.

    Args:
        attention: of this rank's first block.
        device: that this rank computes on.
    """

    def __init__(self, attention: nn.Module, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._data = self._processor = 0.0
        self._now: list[torch.cuda.Event] = []
        self._before: list[torch.cuda.Event] = []
        if self._on_device:
            attention.register_forward_pre_hook(self._mark)
            attention.register_forward_hook(self._mark)

    def begin(self) -> None:
        """A step begins."""
        self._data, self._processor = 0.0, time.thread_time()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Data is read for the duration."""
        clock, processor = time.perf_counter(), time.thread_time()
        yield
        self._data += time.perf_counter() - clock
        self._processor += time.thread_time() - processor  # counted already

    def seconds(self) -> float:
        """This rank's own work in the step, once it is done."""
        if not self._on_device:
            return self._data + time.thread_time() - self._processor
        self._before, self._now, events = self._now, [], self._before
        pairs = zip(events[::2], events[1::2], strict=False)
        return self._data + sum(start.elapsed_time(end) for start, end in pairs) / 1e3

    def _mark(self, module: nn.Module, *_: Any) -> None:
        if module.training:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._now.append(event)


@dataclass
class Slowest:
    """Who was slowest, by step and over the run.

    Attributes:
        hosts: machine of every rank.
        watch: of this one.
    """

    hosts: Sequence[str]
    watch: Stopwatch
    total_P: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, busy_P: Tensor) -> None:
        """Take in the seconds of every rank in one step."""
        self.total_P = busy_P.double() if not len(self.total_P) else self.total_P + busy_P

    def summary(self) -> str:
        """One line about the run; empty where there is nothing to compare."""
        if len(self.total_P) < 2:
            return ""
        values = of_step(self.total_P)
        rank = int(values["slowest_rank"])
        over = values["slowest_over_median"]
        return f"slowest: rank {rank} on {self.hosts[rank]}, {over:.2f} x the median of {len(self.total_P)} ranks"


def of_step(busy_P: Tensor) -> dict[str, float]:
    """What metrics.jsonl says about the seconds of all ranks; nothing about a single one."""
    if len(busy_P) < 2:
        return {}
    middle = float(busy_P.double().quantile(0.5))
    return {
        "slowest_rank": int(busy_P.argmax()),
        "slowest_over_median": float(busy_P.max()) / middle if middle else 1.0,
        "busy_seconds_max": float(busy_P.max()),
        "busy_seconds_mean": float(busy_P.mean()),
    }
