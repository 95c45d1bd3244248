"""One run in a folder at a time: two would prune each other's checkpoints and mix their metrics.

The heartbeats tell. A run that starts looks whether those of the run before still move; two that start in the same
moment, as the tasks of a job array with one `training.output_dir` do, both find nothing, and notice in their next
heartbeats that another one writes the same file. The one that began later leaves then (`heartbeat.Heartbeat`).
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from megamoe.common.errors import FolderInUseError
from megamoe.common.log import get_logger
from megamoe.common.processes import is_running
from megamoe.training import heartbeat
from megamoe.training.heartbeat import Pulse

log = get_logger("megamoe.one_run")


def refuse_second_run(folder: Path) -> None:
    """Wait until it is sure that no other run works in this folder. Rank 0 does this, before it writes anything there.

    That takes no time where the run before has said that it ended, or was on this machine and is gone; else as long as
    a living one needs for its next heartbeat, `training.faults.heartbeat_seconds` and a half times that.

    Raises:
        FolderInUseError: one does.
    """
    before = heartbeat.read(folder, 0)
    if before is None or before.get("ended") is not None or _gone(before):
        return
    limit = heartbeat.MISSED * float(before["every_seconds"])
    log.warning("a run on %s has not said that it ended; waiting %.0f s for its heartbeat", before["host"], limit)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        time.sleep(min(float(before["every_seconds"]) / 4, 1.0))
        now = heartbeat.read(folder, 0)
        if now is not None and now["count"] != before["count"]:
            raise in_use(folder, now)


def leave_to_earlier_run(folder: Path, pulse: Pulse) -> None:
    """Whether this rank has seen another run that was here before its own.

    Raises:
        FolderInUseError: it has.
    """
    if pulse.intruding is not None:
        raise in_use(folder, pulse.intruding)


def in_use(folder: Path, seen: dict[str, Any]) -> FolderInUseError:
    """The error of a run that is not alone in its folder.

    Args:
        seen: of the other's heartbeat.
    """
    where = f"process {seen['pid']} on {seen['host']}, in {seen['phase']} of step {seen['step']}"
    return FolderInUseError(
        "Another run is at work in this run folder.",
        got=f"training.output_dir = {folder}: {where}",
        expected="one run in a folder at a time",
        todo="wait for it, end it, or choose another training.output_dir",
    )


def _gone(content: dict[str, Any]) -> bool:
    pid = content["pid"]
    return bool(content["host"] == socket.gethostname() and (pid == os.getpid() or not is_running(pid)))
