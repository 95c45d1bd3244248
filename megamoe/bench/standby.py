"""Groups of ranks that stand by between their turns, so that turns of a second can be compared.

A machine that others share is faster in one minute than in the next by more than what is compared. Groups that were
started for every turn could not follow each other closely enough; one process for all cannot be, because DeepSpeed
keeps process groups in globals. So each contestant has its own processes, and those whose turn it is not use no CPU.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megamoe.common import env
from megamoe.testing.ranks import run_ranks

Make = Callable[..., AbstractContextManager[Callable[..., Any]]]
_POLL_SECONDS = 0.1
_END_SECONDS = 60.0
"""How long ranks may take to leave, or to say why they broke."""
_SET_UP_SECONDS = 600.0
_LIFE_SECONDS = 24 * 3600.0
"""Of ranks that nobody ends."""


class Standby:
    """Ranks that have set themselves up and wait.

    Made by `standing_by`.
    """

    def __init__(self, pipes: list[Connection], ended: Callable[[], None], timeout: float) -> None:
        self._pipes, self._ended, self._timeout = pipes, ended, timeout

    def turn(self, *request: Any) -> list[Any]:
        """Have all ranks do one turn, with these arguments, at once.

        Returns:
            What each rank returned, rank 0 first.

        Raises:
            RankError: a rank raised or died.
            TimeoutError: it took longer than the limit.
        """
        with contextlib.suppress(ConnectionError):
            for pipe in self._pipes:
                pipe.send(request)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout
        while len(results) < len(self._pipes):
            missing = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"Ranks {sorted(missing.values())} did not end their turn in {self._timeout:g} s.")
            try:
                results |= {missing[pipe]: pipe.recv() for pipe in missing if pipe in ready}
            except (EOFError, ConnectionError):
                self._ended()
                raise
        return [results[rank] for rank in range(len(self._pipes))]


@contextlib.contextmanager
def standing_by(make: Make, ranks: int, *args: Any, timeout: float) -> Iterator[Standby]:
    """Start ranks that set themselves up by `make(*args)`, and end them afterwards.

    Args:
        make: a module-level function, called on every rank, whose context gives what a turn calls.
        ranks: how many.
        args: for `make`; picklable.
        timeout: seconds for a turn; for setting up there are ten minutes.

    Raises:
        RankError: a rank raised or died.
    """
    failures: list[BaseException] = []

    def run(path: str) -> None:
        try:
            run_ranks(_serve, ranks, path, make, args, timeout=_LIFE_SECONDS, init=False)
        except BaseException as error:
            failures.append(error)

    with tempfile.TemporaryDirectory(prefix="megamoe-standby-") as folder:
        path = str(Path(folder) / "turns")
        thread = threading.Thread(target=run, args=(path,), daemon=True)

        def ended() -> None:
            """Raise what ended the ranks."""
            thread.join(_END_SECONDS)
            if failures:
                raise failures[0]
            if thread.is_alive():
                raise TimeoutError(f"The ranks did not end within {_END_SECONDS:g} s.")

        with socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
            server.bind(path)
            server.listen(ranks)
            server.settimeout(_POLL_SECONDS)
            thread.start()
            pipes = _accept(server, ranks, thread, ended, time.monotonic() + _SET_UP_SECONDS)
            for pipe in pipes:
                stack.enter_context(pipe)
            yield Standby(pipes, ended, timeout)
            with contextlib.suppress(ConnectionError):
                for pipe in pipes:
                    pipe.send(None)
            ended()


def _accept(
    server: socket.socket, ranks: int, thread: threading.Thread, ended: Callable[[], None], deadline: float
) -> list[Connection]:
    """The pipe to each rank, once all are ready."""
    pipes: dict[int, Connection] = {}
    while len(pipes) < ranks:
        try:
            connected, _ = server.accept()
        except TimeoutError:
            if not thread.is_alive():
                ended()
            if time.monotonic() > deadline:
                missing = sorted(set(range(ranks)) - set(pipes))
                raise TimeoutError(f"Ranks {missing} were not set up within their limit.") from None
            continue
        connected.setblocking(True)
        pipe = Connection(connected.detach())
        try:
            pipes[pipe.recv()] = pipe
        except (EOFError, ConnectionError):
            ended()
            raise
    return [pipes[rank] for rank in range(ranks)]


def _serve(path: str, make: Make, args: tuple[Any, ...]) -> None:
    """On every rank: set up, then turn by turn until there are no more."""
    with make(*args) as turn, socket.socket(socket.AF_UNIX) as joined:
        joined.connect(path)
        with Connection(joined.detach()) as pipe:
            pipe.send(env.rank())
            while (request := pipe.recv()) is not None:
                pipe.send(turn(*request))
