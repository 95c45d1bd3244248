"""Where every rank is, in a file per rank, for whoever wants to know: a person, or the ranks that wait for it.

`<output_dir>/heartbeats/rank_00000.json` is written again and again by a thread that needs neither torch nor the other
ranks, so it goes on while the rank waits, and stops with the process. `exchange` is the exchange of rows that the rank
stands in at that moment, or that failed it: {"number", "layer", "axis", "phase", "ranks"}; null: none.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamoe.common.log import get_logger
from megamoe.parallel.exchanges import RECORD, Exchanges

FOLDER = "heartbeats"
_STEPS = 50
"""Of which the median time is told."""

log = get_logger("megamoe.heartbeat")


class Pulse:
    """What a rank is doing. The main thread writes it, others read it.

    All ranks go through the same phases, so the number of those that a rank has begun says who is behind.

    Attributes:
        step: the optimizer step under way, from 1 on; 0 during the set-up.
        phase: what the main thread does.
        begun: phases so far.
        since: when the phase began, by `time.time`.
        moved: when the main thread was last seen to get anywhere, by `time.monotonic`.
        ended: why the rank has left, once it has.
        record: of its exchanges.
    """

    def __init__(self, record: Exchanges = RECORD) -> None:
        self.step, self.phase, self.begun, self.record = 0, "set-up", 0, record
        self.since, self.moved = time.time(), time.monotonic()
        self.ended: str | None = None
        self._seconds: deque[float] = deque(maxlen=_STEPS)

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase begins."""
        self.phase, self.begun, self.since = phase, self.begun + 1, time.time()
        self.step = self.step if step is None else step
        self.tick()

    def tick(self) -> None:
        """The main thread got somewhere inside of its phase."""
        self.moved = time.monotonic()

    def took(self, seconds: float) -> None:
        """A step is done."""
        self._seconds.append(seconds)

    def idle_seconds(self) -> float:
        """How long the main thread has not moved."""
        return time.monotonic() - self.moved

    def where(self) -> str:
        """In words."""
        exchange = self.record.under_way()
        return f"{self.phase} of step {self.step}" + (f", in {exchange}" if exchange is not None else "")

    def content(self) -> dict[str, Any]:
        """What the file says, without who and how often."""
        seconds, exchange = list(self._seconds), self.record.under_way()
        return {
            "step": self.step,
            "phase": self.phase,
            "begun": self.begun,
            "since": self.since,
            "idle_seconds": round(self.idle_seconds(), 3),
            "step_seconds": {"last": seconds[-1], "median": statistics.median(seconds)} if seconds else None,
            "resident_bytes": _resident_bytes(),
            "exchange": exchange.summary() if exchange is not None else None,
            "ended": self.ended,
        }


class Heartbeat:
    """Writes the file of one rank.

    Args:
        folder: the run's.
        seconds: between two writes.
    """

    def __init__(self, pulse: Pulse, folder: Path, rank: int, seconds: float) -> None:
        self.pulse, self.seconds, self._stop = pulse, seconds, threading.Event()
        self._path, self._count, self._warned = path_of(folder, rank), 0, False
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "every_seconds": seconds}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the file now, and from now on."""
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        """Write the file. Where that fails, say so once: the run does not depend on it."""
        with self._lock:
            self._count += 1
            content = {**self._who, "count": self._count, "time": time.time(), **self.pulse.content()}
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                partial = self._path.with_suffix(".partial")
                partial.write_text(json.dumps(content), encoding="utf-8")
                partial.replace(self._path)
            except OSError as error:
                if not self._warned:
                    log.warning("heartbeats cannot be written: %s", error)
                self._warned = True

    def stop(self, reason: str) -> None:
        """Write the file for the last time."""
        self.pulse.ended = reason
        self._stop.set()
        self._thread.join(self.seconds)
        self.beat()

    def _go_on(self) -> None:
        while not self._stop.wait(self.seconds):
            self.beat()


@contextlib.contextmanager
def beating(folder: Path, rank: int, seconds: float) -> Iterator[tuple[Pulse, Heartbeat]]:
    """A pulse that is written down for the duration."""
    pulse = Pulse()
    heartbeat = Heartbeat(pulse, folder, rank, seconds)
    heartbeat.start()
    reason = "finished"
    try:
        yield pulse, heartbeat
    except BaseException as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise
    finally:
        heartbeat.stop(reason)


def path_of(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / FOLDER / f"rank_{rank:05d}.json"


def read(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a rank last wrote; None: nothing that can be read."""
    try:
        content = json.loads(path_of(folder, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _resident_bytes() -> int:
    """Memory of this process now; where the system does not say, the most it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
