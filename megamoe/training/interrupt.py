"""Ctrl-C and SIGTERM as a request to save and leave after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
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
    with _handling(interrupt._request):
        yield interrupt


@contextlib.contextmanager
def leave_at_once() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process for the duration, with exit code 128 + signal; for the set-up.

    There is nothing to save yet. Python's own KeyboardInterrupt will not do: it is raised wherever the program is,
    and libraries that are being set up swallow it in places, after which the run goes on as if nothing was asked.
    """
    with _handling(_leave):
        yield


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, previous in zip(numbers, before, strict=True):
            signal.signal(number, previous)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.stderr.flush()
    os._exit(128 + number)
