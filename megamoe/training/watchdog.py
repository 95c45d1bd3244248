"""A rank that gets nowhere ends, and says who it waited for.

A collective whose peer is gone or stuck does not return on its own: gloo's only after its time limit, with no word
about who it was, NCCL's perhaps never. So a thread looks at the main thread's pulse, and at the heartbeats of all ranks
once it has stood still for too long.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megamoe.common.errors import EXIT_CODE, LostPeerError, PeerError
from megamoe.common.log import get_logger
from megamoe.common.main import report
from megamoe.common.processes import is_running
from megamoe.parallel.exchanges import place_text
from megamoe.training import heartbeat
from megamoe.training.heartbeat import Heartbeat

Result = TypeVar("Result")

MISSED = 2.5
"""Heartbeats that a living rank does not miss."""
_LOOKS = 20
"""How often the pulse is looked at during the limit."""
READ_SECONDS = 30.0
"""A shared folder may hang too."""
_STOOD = "stood still"
_VICTIMS = (_STOOD, LostPeerError.__name__, PeerError.__name__)
"""How the reasons of ranks begin that left because of another one."""
_NAMED = 5

log = get_logger("megamoe.watchdog")


class Watchdog:
    """Ends the process where its main thread gets nowhere, with exit code 2. A context manager.

    Args:
        heartbeat: of this rank.
        folder: the run's.
        limit: seconds that the main thread may stand still.
        on_end: gets the error, before the process ends.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        folder: Path,
        rank: int,
        world_size: int,
        limit: float,
        on_end: Callable[[LostPeerError], None],
    ) -> None:
        self._heartbeat, self._pulse, self._limit, self._on_end = heartbeat, heartbeat.pulse, limit, on_end
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(self._limit)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(self._limit / _LOOKS):
            # Should no thread of Python get to run any more, this timer goes off, which needs none. The real stderr: a
            # progress bar puts something else in its place.
            last = 2 * self._limit + self._reading_seconds()
            faulthandler.dump_traceback_later(last, exit=True, file=sys.__stderr__ or sys.stderr)
            if self._pulse.idle_seconds() > self._limit:
                self._judge()

    def _judge(self) -> None:
        moved, idle = self._pulse.moved, self._pulse.idle_seconds()
        within(READ_SECONDS, self._heartbeat.beat, None)  # others may want to know what this rank waits for
        read = partial(diagnosis, self._folder, self._rank, self._world_size)
        found = within(self._reading_seconds(), read, "the heartbeats cannot be read")
        if self._pulse.moved != moved or self._stop.is_set():
            return  # it went on meanwhile
        where = self._pulse.where()
        error = lost(found, f"this rank has stood in {where} for {idle:.0f} s", _dump_stacks(self._folder, self._rank))
        log.debug("%s", error)
        self._pulse.ended = f"{_STOOD} in {where}"
        within(READ_SECONDS, self._heartbeat.beat, None)
        within(READ_SECONDS, partial(self._on_end, error), None)
        report(error)
        os._exit(EXIT_CODE)

    def _reading_seconds(self) -> float:
        return (MISSED + 1) * self._heartbeat.seconds + READ_SECONDS


def lost(found: str, own: str, stacks: Path | None = None) -> LostPeerError:
    """The error that names the ranks that others wait for."""
    where = f"; the stacks of this rank are in {stacks}" if stacks is not None else ""
    return LostPeerError(
        f"The run stands still: {found}.",
        got=own,
        expected="every rank to get on within training.faults.hang_minutes",
        todo=f"look at the machine and the first error of these ranks (memory, network, disk){where}; "
        "then start again: the run resumes from its newest complete checkpoint",
    )


def _dump_stacks(folder: Path, rank: int) -> Path | None:
    path = folder / "logs" / f"stacks_rank_{rank}.txt"
    try:
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError:
        return None
    return path


def diagnosis(folder: Path, own_rank: int, world_size: int) -> str:
    """Who the others wait for, by all heartbeats: who left, who is dead, or else who is behind.

    Takes as long as a living rank needs to write a heartbeat, or less where it is sure before that.
    """
    first = _read_all(folder, world_size)
    every = max((content["every_seconds"] for content in first.values()), default=0.0)
    deadline = time.monotonic() + MISSED * every
    now = first
    while not (names := _left(now)) and time.monotonic() < deadline:
        time.sleep(min(every / 4, 1.0))
        now = _read_all(folder, world_size)
    if names:
        # A rank that waited for them in an exchange writes so as soon as it fails.
        time.sleep(min(every / 4, 1.0))
        return _left(_read_all(folder, world_size)) or names
    return _silent(first, now, world_size) or _behind(now) or _missing(now) or _all_alike(now, own_rank)


def _left(now: dict[int, dict[str, Any]]) -> str:
    here = socket.gethostname()
    gone = {}
    for rank, content in now.items():
        ended = content["ended"]
        if ended is not None and not ended.startswith(_VICTIMS):
            gone[rank] = f"left ({ended})"
        elif ended is None and content["host"] == here and not is_running(content["pid"]):
            gone[rank] = "is dead: its process is gone"
    return _sentence(gone, now)


def _silent(first: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]], world_size: int) -> str:
    silent = {}
    for rank in range(world_size):
        if rank not in now:
            silent[rank] = "has written no heartbeat"
        elif rank in first and now[rank]["count"] == first[rank]["count"] and now[rank]["ended"] is None:
            age = max(0.0, time.time() - now[rank]["time"])
            silent[rank] = f"is dead or stopped: no heartbeat for {age:.0f} s"
    return _sentence(silent, now)


def _behind(now: dict[int, dict[str, Any]]) -> str:
    begun = [content["begun"] for content in now.values()]
    if min(begun) == max(begun):
        return ""
    late = {rank: "is behind the others" for rank, content in now.items() if content["begun"] == min(begun)}
    return _sentence(late, now)


def _missing(now: dict[int, dict[str, Any]]) -> str:
    """Who does not come to an exchange that others wait in, and waits in none itself."""
    waiting = [content["exchange"] for content in now.values() if content.get("exchange")]
    missing = {rank for exchange in waiting for rank in exchange["ranks"] if not now.get(rank, {}).get("exchange")}
    return _sentence(dict.fromkeys(sorted(missing), "does not come to an exchange"), now)


def _all_alike(now: dict[int, dict[str, Any]], own_rank: int) -> str:
    where = now[own_rank] if own_rank in now else next(iter(now.values()))
    return f"all {len(now)} ranks are alive and stand in {where['phase']} of step {where['step']}"


def _sentence(verdicts: dict[int, str], contents: dict[int, dict[str, Any]]) -> str:
    named = [
        _one(rank, verdict, contents.get(rank)) + _awaited(rank, verdicts, contents)
        for rank, verdict in list(verdicts.items())[:_NAMED]
    ]
    more = [f"and {len(verdicts) - _NAMED} more ranks"] if len(verdicts) > _NAMED else []
    return "; ".join([*named, *more])


def _one(rank: int, verdict: str, content: dict[str, Any] | None) -> str:
    if content is None:
        return f"rank {rank} {verdict}"
    where = f"last in {content['phase']} of step {content['step']}"
    exchange = content.get("exchange")
    where += f", in {_exchange(exchange)}" if exchange else ""
    return f"rank {rank} on {content['host']} {verdict}, {where}"


def _awaited(rank: int, verdicts: dict[int, str], contents: dict[int, dict[str, Any]]) -> str:
    """In which exchange another rank waits for this one."""
    for other, content in contents.items():
        exchange = content.get("exchange")
        if exchange and other not in verdicts and rank in exchange["ranks"]:
            return f"; rank {other} waits for it in {_exchange(exchange)}"
    return ""


def _exchange(summary: dict[str, Any]) -> str:
    return place_text(summary["layer"], summary["phase"], summary["axis"], summary["ranks"])


def _read_all(folder: Path, world_size: int) -> dict[int, dict[str, Any]]:
    contents = ((rank, heartbeat.read(folder, rank)) for rank in range(world_size))
    return {rank: content for rank, content in contents if content is not None}


def within(seconds: float, function: Callable[[], Result], otherwise: Result) -> Result:
    """The result of a function, or something else where it takes too long."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise
