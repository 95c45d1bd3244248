"""Waiting for a quiet moment on a shared machine: decided before a round, so that it cannot favour anyone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

QUIET_SHARE = 0.10
"""Share of all CPUs that others may use in a moment that counts as quiet."""
SAMPLE_SECONDS = 0.25


class Ticks(NamedTuple):
    """CPU seconds since the start of the machine: all there were, those that were used, those this process used."""

    total: float
    used: float
    own: float


def now() -> Ticks:
    """Read the counters; all zero where there is no /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return Ticks(0.0, 0.0, 0.0)
    # user nice system idle iowait irq softirq steal; what the host took (steal) is use by others.
    fields = [int(text) for text in stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    own = os.times()
    idle = fields[3] + fields[4]
    tick = os.sysconf("SC_CLK_TCK")
    return Ticks(sum(fields) / tick, (sum(fields) - idle) / tick, own.user + own.system)


def others_share(before: Ticks, after: Ticks) -> float:
    """Share of all CPUs, 0 to 1, that other processes used between two readings."""
    total = after.total - before.total
    used = (after.used - before.used) - (after.own - before.own)
    return min(1.0, max(0.0, used / total)) if total > 0 else 0.0


def wait_for_quiet(patience_seconds: float) -> float:
    """Wait until others use at most `QUIET_SHARE`, or until patience ends; returns the share last seen."""
    deadline = time.monotonic() + patience_seconds
    while True:
        before = now()
        time.sleep(SAMPLE_SECONDS)
        share = others_share(before, now())
        if share <= QUIET_SHARE or time.monotonic() >= deadline:
            return share
