"""Signals as requests to save and leave after the current step.

SIGINT (Ctrl-C) is a person who wants the run to end here. SIGTERM and SIGUSR1 are a batch system's: the node is taken
away, or the time limit is near, and the job is to be started again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from megamoe.common.main import REQUEUE as REQUEUE_CODE

INTERRUPTED, REQUEUE = "interrupted", "requeue"
"""Names of what can be asked for."""
_MEANING = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE}


class Interrupt:
    """What this rank was asked for. Ranks agree on it at the end of a step, so that all leave after the same."""

    def __init__(self) -> None:
        self._asked: set[str] = set()

    def flags(self) -> dict[str, bool]:
        """By name, whether this rank was asked."""
        return {name: name in self._asked for name in (INTERRUPTED, REQUEUE)}

    def _request(self, number: int, frame: FrameType | None) -> None:
        # Repeated signals change nothing: a launcher that is interrupted passes on SIGTERM besides the terminal's
        # SIGINT. Launchers kill what does not leave in time.
        self._asked.add(_MEANING[signal.Signals(number)])


@contextlib.contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Turn the signals into requests for the duration."""
    interrupt = Interrupt()
    with _handling(interrupt._request):
        yield interrupt


@contextlib.contextmanager
def leave_at_once() -> Iterator[None]:
    """Let the signals end the process for the duration; for the set-up, when there is nothing to save yet.

    SIGUSR1 is sent to jobs that are to be started again, so it ends with that exit code; the others with 128 + signal,
    for a launcher sends SIGTERM also to the ranks beside one that failed. Python's own KeyboardInterrupt will not do:
    it is raised wherever the program is, and libraries that are being set up swallow it in places, after which the run
    goes on as if nothing was asked.
    """
    with _handling(_leave):
        yield


def ignore_signals() -> None:
    """From here on the process only leaves: launchers that end all ranks once the first has left change nothing."""
    for number in _MEANING:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _MEANING}
    try:
        yield
    finally:
        for number, previous in before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # `ignore_signals` is for good
                signal.signal(number, previous)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.stderr.flush()
    os._exit(REQUEUE_CODE if number == signal.SIGUSR1 else 128 + number)
