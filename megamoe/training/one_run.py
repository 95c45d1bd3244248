"""One run in a folder at a time: two would delete each other's unfinished checkpoints and mix their metrics.

Rank 0 of a run claims the folder before it writes anything else there, with `owner.json`, which only one can make, on
network file systems too. A thread counts up in it as long as the run lasts, and it goes when the run ends. One that was
killed leaves it behind: whoever comes next sees that the process is gone, or, from another machine, that nobody counts
any more, and takes it over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamoe.common import processes
from megamoe.common.errors import FolderInUseError
from megamoe.common.log import get_logger
from megamoe.training.run_folder import writing

OWNER = "owner.json"
BEAT_SECONDS = 4.0
"""Between two counts."""
MISSED = 3.0
"""Counts that a living run does not miss."""
_ATTEMPTS = 4
_TURN_SECONDS = 2.0
"""For a few operations on small files."""

log = get_logger("megamoe.one_run")


@contextlib.contextmanager
def claimed(folder: Path, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Own a run folder for the duration. Rank 0 does this, before it writes anything else there.

    That takes no time where nobody owns it, or the owner was on this machine; otherwise as long as a living one needs
    to be seen, twelve seconds.

    Args:
        folder: exists.

    Raises:
        FolderInUseError: another run owns it.
        ConfigError: the folder cannot be written.
    """
    owner = _Owner(folder, beat_seconds)
    with writing(folder):
        owner.claim()
    try:
        yield
    finally:
        owner.release()


class _Owner:
    """This run, as owner of a folder."""

    def __init__(self, folder: Path, beat_seconds: float) -> None:
        self._folder, self._path, self._seconds = folder, folder / OWNER, beat_seconds
        self._content: dict[str, Any] = {
            "run": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "system": processes.system(),
            "started": processes.started(os.getpid()),
            "every_seconds": beat_seconds,
            "count": 0,
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="owner", daemon=True)

    def claim(self) -> None:
        """Make the file, or take it over from a run that is gone."""
        for _ in range(_ATTEMPTS):
            try:
                with self._path.open("x", encoding="utf-8") as file:  # of all who try at once one succeeds
                    json.dump(self._content, file)
            except FileExistsError:
                dead = self._dead_owner()
                if dead is None or not self._take_over(dead):
                    continue
            self._thread.start()
            return
        raise self._in_use(_read(self._path))

    def release(self) -> None:
        """Count no more, and let the next one in."""
        self._stop.set()
        self._thread.join(self._seconds)
        content = _read(self._path)
        if content is not None and content["run"] == self._content["run"]:
            with contextlib.suppress(OSError):  # whoever comes next finds this process gone
                self._path.unlink()

    def _go_on(self) -> None:
        while not self._stop.wait(self._seconds):
            self._content["count"] += 1
            with contextlib.suppress(OSError):  # a full disk, which the run itself tells
                self._write()

    def _write(self) -> None:
        """The file, whole."""
        partial = self._folder / f".{OWNER}.{self._content['run']}"
        partial.write_text(json.dumps(self._content), encoding="utf-8")
        partial.replace(self._path)

    def _dead_owner(self) -> dict[str, Any] | None:
        """The run that left its file behind; None: the file has gone.

        Raises:
            FolderInUseError: the run is at work.
        """
        before = _read(self._path)
        if before is None:
            return None
        alive = _is_alive_here(before)
        if alive is None:
            alive = self._counts(before)
        if alive:
            raise self._in_use(before)
        return before

    def _counts(self, before: dict[str, Any]) -> bool:
        limit = MISSED * float(before["every_seconds"])
        log.warning("a run on %s has not left this run folder; waiting %.0f s for a sign of it", before["host"], limit)
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            time.sleep(float(before["every_seconds"]) / 8)
            now = _read(self._path)
            if now is not None and (now["run"], now["count"]) != (before["run"], before["count"]):
                return True
        return False

    def _take_over(self, dead: dict[str, Any]) -> bool:
        """Put this run's file in place of that of one that is gone, unless another one does."""
        turn = self._folder / f".{OWNER}.after.{re.sub(r'[^0-9a-z]', '', str(dead['run']))}"
        try:
            turn.open("x").close()  # one at a time, each of whom looks again
        except FileExistsError:
            self._stand_back(turn, dead)
            return False
        try:
            now = _read(self._path)
            if now is None or now["run"] != dead["run"]:
                return False
            self._write()
            return True
        finally:
            turn.unlink(missing_ok=True)

    def _stand_back(self, turn: Path, dead: dict[str, Any]) -> None:
        """Until the one whose turn it is has taken over; should it have died meanwhile, its turn ends."""
        deadline = time.monotonic() + _TURN_SECONDS
        while turn.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        now = _read(self._path)
        if now is not None and now["run"] == dead["run"]:
            turn.unlink(missing_ok=True)

    def _in_use(self, by: dict[str, Any] | None) -> FolderInUseError:
        who = f"process {by['pid']} on {by['host']}" if by is not None else "one that started at the same moment"
        return FolderInUseError(
            "Another run is at work in this run folder.",
            got=f"training.output_dir = {self._folder}: {who}",
            expected="one run in a folder at a time",
            todo=f"wait for it, end it, or choose another training.output_dir; if you know better, delete {self._path}",
        )


def _read(path: Path) -> dict[str, Any] | None:
    """An owner's file; None: there is none. One that is being written, or damaged, is that of an unknown machine."""
    unknown = {"run": "", "host": "an unknown machine", "pid": 0, "every_seconds": BEAT_SECONDS, "count": 0}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return unknown
    return unknown | content if isinstance(content, dict) else unknown


def _is_alive_here(owner: dict[str, Any]) -> bool | None:
    """Whether a process of this system lives; None: it was of another one."""
    system = processes.system()
    if system is None or owner.get("system") != system:
        return None
    pid = int(owner["pid"])
    return processes.is_running(pid) and processes.started(pid) == owner.get("started")
