"""The outermost frame of every entry point: errors of the user become text and an exit code."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from megamoe.common import env
from megamoe.common.errors import EXIT_CODE, LostPeerError, MegamoeError, PeerError

LINGER_SECONDS = 10.0
INTERRUPTED = 130
REQUEUE = 75
"""Saved because a batch system asked for it, start me again: EX_TEMPFAIL of sysexits.h."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave the process with its exit code.

    A MegamoeError becomes its text on stderr and exit code 2; other exceptions are defects and keep their
    traceback. Launchers end all ranks when the first one fails, so on other ranks than 0 the process waits up
    to `LINGER_SECONDS` before it leaves: rank 0 has the same error in general and is the one to print it. A
    rank that is still there afterwards has an error of its own, and prints it, marked with its rank. A rank that
    only lost another one waits as well.
    """
    ended: list[int] = []
    atexit.register(_leave_as, ended)  # first, so it runs last: what `main` loads has handlers of its own
    try:
        code = main()
        if _num_ranks() > 1:
            ended.append(code or 0)
        sys.exit(code)
    except MegamoeError as error:
        report(error)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:  # before or after training, which catches signals itself
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader left (`... | head`). What is buffered has nowhere to go, and flushing it would fail once more.
        sys.stdout = None
        sys.exit(1)


def _leave_as(code: list[int]) -> None:
    """The last exit handler: once `code` has an entry, the process ends with it here, before the interpreter's own end.

    A thread of the communication may still be dropping the tensors of a collective that is long done. Were the
    interpreter gone by then, it would be killed in a place that allows no such thing, and the whole process with it
    ("terminate called without an active exception"): a failed job after a finished training.
    """
    if not code:
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code[0])


def report(error: MegamoeError) -> None:
    """Print `error` to stderr, late and marked on ranks above 0; a PeerError has been printed elsewhere."""
    rank = _rank()
    if rank > 0 or isinstance(error, LostPeerError):
        time.sleep(LINGER_SECONDS)
    if not isinstance(error, PeerError):
        prefix = f"[rank {rank}] " if rank > 0 else ""
        sys.stderr.write(f"{prefix}{type(error).__name__}: {error}\n")
        sys.stderr.flush()


def _num_ranks() -> int:
    try:
        return env.world_size()
    except MegamoeError:
        return 1


def _rank() -> int:
    try:
        return env.rank()
    except MegamoeError:  # an incomplete launch: no other rank is known to speak for this one
        return 0
