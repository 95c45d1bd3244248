"""Ctrl-C and SIGTERM as a request to save and leave after the current step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """Whether this rank was asked to stop. Ranks agree on it at the end of a step, so that all leave after the same."""

    def __init__(self) -> None:
        self.requested = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        # Repeated signals change nothing: a launcher that is interrupted passes on SIGTERM besides the terminal's
        # SIGINT. Launchers kill what does not leave in time.
        self.requested = True


@contextlib.contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Turn SIGINT and SIGTERM into a request for the duration."""
    interrupt = Interrupt()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interrupt._request) for number in numbers]
    try:
        yield interrupt
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
