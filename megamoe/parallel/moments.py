"""Moments of a process or of its device, on one axis of time."""

from __future__ import annotations

import time

import torch

Moment = float | torch.cuda.Event
"""`time.perf_counter` of this process, or when a stream gets there."""


def now(on_gpu: bool) -> Moment:
    """This moment, on a GPU of the current stream."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Clock:
    """Turns moments into seconds of this process's `time.perf_counter`. Made when the device has nothing to do.

    Attributes:
        on_gpu: whose moments are events.
        host, wall: this moment by `time.perf_counter` and by `time.time`.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu, self._origin = on_gpu, now(on_gpu)
        self.host, self.wall = time.perf_counter(), time.time()

    def seconds(self, moment: Moment | None) -> float | None:
        """None: not yet come, or not known, as of a device that failed."""
        if moment is None or isinstance(moment, float):
            return moment
        if isinstance(self._origin, float):
            return None
        try:
            return self.host + self._origin.elapsed_time(moment) / 1e3  # asks both events whether they are over
        except RuntimeError:
            return None
