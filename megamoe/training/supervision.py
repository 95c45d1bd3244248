"""What looks after one rank of a run: its heartbeat, its watchdog, and the run's status for whoever started it.

`<output_dir>/status.json` says how the run stands: {"state", "step", "time", "reason"}. States: running (and the step
at which it began), finished, stopped (before its last step, by a person or by `training.stop_after_step`), requeue
(saved, to be started again) and failed. A run that was killed leaves "running". Where a rank is lost in an exchange of
rows, the reason names the block and phase that others wait in for it; and every rank that fails leaves its last
exchanges (`trace.dump_recent`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megamoe.common.errors import LostPeerError, MegamoeError
from megamoe.common.log import get_logger
from megamoe.config.training import TrainingConfig
from megamoe.training.heartbeat import Heartbeat, Pulse, beating
from megamoe.training.setup import is_lost_peer
from megamoe.training.trace import dump_recent
from megamoe.training.watchdog import READ_SECONDS, Watchdog, diagnosis, lost, within

STATUS = "status.json"
_STATES = {"finished": "finished", "interrupted": "stopped", "requeue": "requeue"}
"""By why a run ends."""

log = get_logger("megamoe.supervision")


@dataclass
class Supervised:
    """One rank that is looked after.

    Attributes:
        pulse: for the main thread to keep up.
        why: the run ends, once it does.
        steps: that it is to have in the end.
    """

    pulse: Pulse
    steps: int
    why: str = "finished"


@contextlib.contextmanager
def supervised(training: TrainingConfig, rank: int, world_size: int) -> Iterator[Supervised]:
    """Heartbeat, watchdog and status for the duration.

    Raises:
        LostPeerError: a collective failed, which another rank is the cause of; says which one.
    """
    faults, folder = training.faults, Path(training.output_dir)
    limit = 60 * (faults.hang_minutes or 0.9 * training.timeout_minutes)
    with beating(folder, rank, faults.heartbeat_seconds) as (pulse, heartbeat):
        run = Supervised(pulse, training.steps)
        naming = _naming_lost_peers(folder, rank, world_size, heartbeat)
        watchdog = Watchdog(heartbeat, folder, rank, world_size, limit, partial(_failed, folder, rank, pulse))
        with _status(folder, rank, run), naming, watchdog:
            yield run


@contextlib.contextmanager
def _status(folder: Path, rank: int, run: Supervised) -> Iterator[None]:
    if rank == 0:
        write_status(folder, rank, "running", run.pulse.step)
    try:
        yield
    except BaseException as error:
        _failed(folder, rank, run.pulse, error)
        raise
    if rank == 0:
        early = run.why == "finished" and run.pulse.step < run.steps
        reason = "training.stop_after_step" if early else run.why
        write_status(folder, rank, "stopped" if early else _STATES[run.why], run.pulse.step, reason)


def _failed(folder: Path, rank: int, pulse: Pulse, error: BaseException) -> None:
    # The rank that would write it may be the one that is lost.
    if rank == 0 or isinstance(error, LostPeerError):
        what = error.what if isinstance(error, MegamoeError) else f"{type(error).__name__}: {error}"
        write_status(folder, rank, "failed", pulse.step, what)
    try:
        dump_recent(folder, rank)
    except Exception as failure:  # of whatever else is broken by now; what the run ended of counts
        log.warning("the last exchanges cannot be written: %s", failure)


def write_status(folder: Path, rank: int, state: str, step: int, reason: str = "") -> None:
    """Write the run's status, whole or not at all; a warning where that cannot be done."""
    path = folder / STATUS
    partial_path = path.with_name(f".{STATUS}.{rank}.partial")
    content = {"state": state, "step": step, "time": time.time(), "reason": reason}
    try:
        partial_path.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial_path, path)
    except OSError as error:
        log.warning("the status %s cannot be written: %s", state, error)


@contextlib.contextmanager
def _naming_lost_peers(folder: Path, rank: int, world_size: int, heartbeat: Heartbeat) -> Iterator[None]:
    """Say who it was where a collective fails."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        within(READ_SECONDS, heartbeat.beat, None)  # others may want to know what failed this rank
        limit = 3 * heartbeat.seconds + READ_SECONDS
        found = within(limit, lambda: diagnosis(folder, rank, world_size), "the heartbeats cannot be read")
        pulse, reason = heartbeat.pulse, str(error).splitlines()[0]
        raise lost(found, f"in {pulse.phase} of step {pulse.step}: {reason}") from error
