"""A rank that dies, stops or gets stuck in the middle of an exchange: every other rank ends in time, and says which
rank it was, in which block and phase.

The victim lets the other rank send its rows and stand waiting before it dies: what is tested is no race.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamoe.common import env
from megamoe.common.errors import EXIT_CODE
from megamoe.parallel.link import Link, Transfer
from megamoe.testing.launches import Outcome, script_in_this_process
from megamoe.testing.ranks import run_ranks
from megamoe.testing.runs import Run
from megamoe.training import heartbeat

PRETRAIN = "launch/pretrain.py"
VICTIM, WAITS = 1, 0
STEP, LAYER = 3, 1
SECONDS = 120.0
"""Limit of everything here."""
LIMIT = 8.0
"""What the ranks are given as the limit of standing still."""
SETTINGS = (
    *("training.steps=100000", "training.checkpoint.every=0", "training.validation.every=0"),
    *(f"training.faults.hang_minutes={LIMIT / 60}", "training.faults.heartbeat_seconds=0.3"),
)


def in_a_child(run: Run, phase: str, fault: str) -> Outcome:
    """Train in a child of this rank, so that somebody sees it end."""
    name, me = f"{run.folder}-rank{env.rank()}", env.rank()
    child = os.fork()
    if child == 0:
        os._exit(_train(run, phase, fault, name))
    ended = None
    try:
        if me == VICTIM and fault == "stop":
            _wait(lambda: _status(run)["state"] == "failed")  # the other one has seen it
            os.kill(child, signal.SIGKILL)
        _wait(lambda: _ended(child))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(ended, Path(f"{name}.out").read_text(), Path(f"{name}.err").read_text())


def _train(run: Run, phase: str, fault: str, name: str) -> int:
    if env.rank() == VICTIM:
        _fail_in(run, phase, fault)
    return script_in_this_process(PRETRAIN, run.words, name)


def _fail_in(run: Run, phase: str, fault: str) -> None:
    """In place of sending its rows in that exchange."""
    original, calls = Link._start, itertools.count()

    def start(self: Link, rows: Any, send: Any, receive: Any, name: str) -> Transfer:
        # Two micro-batches a step.
        if (self.layer, name) == (LAYER, phase) and next(calls) == 2 * (STEP - 1):
            _wait(lambda: _stands(run, phase))
            FAULTS[fault]()
        return original(self, rows, send, receive, name)

    Link._start = start  # type: ignore[method-assign]


def _get_stuck() -> None:
    while True:
        time.sleep(0.01)


FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stuck": _get_stuck,
}


def _stands(run: Run, phase: str) -> bool:
    """Whether the other rank stands in this exchange."""
    exchange = (heartbeat.read(run.folder, WAITS) or {}).get("exchange")
    return exchange is not None and (exchange["layer"], exchange["phase"]) == (LAYER, phase)


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _status(run: Run) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        return dict(json.loads((run.folder / "status.json").read_text()))
    return {"state": "", "reason": ""}


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited for {SECONDS} s"
        time.sleep(0.02)


def failed(
    prepared: Run, folder: Path, phase: str, fault: str, ranks: int = 2, *more: str
) -> tuple[Run, list[Outcome]]:
    run = prepared.elsewhere(folder / "run", *SETTINGS, *more)
    return run, run_ranks(in_a_child, ranks, run, phase, fault, init=False, timeout=2 * SECONDS)


def assert_named(run: Run, outcome: Outcome, phase: str, *words: str) -> str:
    """The one error of a rank that lost another one: rank, block, phase."""
    assert outcome.returncode == EXIT_CODE, outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.stderr.count("LostPeerError: The run stands still: ") == 1, outcome.stderr
    text = outcome.stderr[outcome.stderr.index("LostPeerError") :]
    assert f"rank {VICTIM} on {os.uname().nodename} " in text, text
    assert f"rank {WAITS} waits for it in block {LAYER}, {phase} (ep ranks {WAITS}, {VICTIM})" in text, text
    assert all(word in text for word in words), text
    status = _status(run)
    assert status["state"] == "failed"
    assert f"block {LAYER}, {phase} " in status["reason"]
    return text


def assert_dumped(run: Run, rank: int, phase: str) -> None:
    """The last exchanges of a rank; the last of all is the one that did not arrive."""
    trace = json.loads((run.folder / "logs" / f"exchanges_rank_{rank}.json").read_text())
    exchanges = [event for event in trace["traceEvents"] if event.get("cat") == "exchange"]
    last = max(exchanges, key=lambda event: int(event["args"]["number"]))
    assert (last["args"]["block"], last["name"], last["args"].get("unfinished")) == (LAYER, phase, True)
    assert len(exchanges) > 20
    assert sum("unfinished" in event["args"] for event in exchanges) == 1


@pytest.mark.parametrize(
    "phase",
    [
        "combine backward",
        *(pytest.param(phase, marks=pytest.mark.thorough) for phase in ("counts", "dispatch", "combine")),
        pytest.param("dispatch backward", marks=pytest.mark.thorough),
    ],
)
def test_a_rank_that_is_killed_in_an_exchange(prepared: Run, tmp_path: Path, phase: str) -> None:
    """At once: the connection says so."""
    run, (survivor, victim) = failed(prepared, tmp_path, phase, "kill")
    assert victim.returncode == -signal.SIGKILL
    text = assert_named(run, survivor, phase, "is dead: its process is gone")
    place = f"in forward-backward of step {STEP}: block {LAYER}, {phase} (ep ranks {WAITS}, {VICTIM}): "
    assert place in text, "the failed collective itself, and no limit that ran out"
    assert_dumped(run, WAITS, phase)


@pytest.mark.thorough
def test_a_rank_that_stops_in_an_exchange(prepared: Run, tmp_path: Path) -> None:
    """Within the limit of standing still: nothing says so but its silence."""
    run, (survivor, _) = failed(prepared, tmp_path, "dispatch", "stop")
    standing = (
        f"this rank has stood in forward-backward of step {STEP}, in block {LAYER}, dispatch (ep ranks 0, 1) for "
    )
    text = assert_named(run, survivor, "dispatch", "is dead or stopped: no heartbeat for", standing)
    seconds = float(text[text.index(standing) + len(standing) :].split()[0])
    assert LIMIT <= seconds + 1 < 3 * LIMIT
    assert_dumped(run, WAITS, "dispatch")


@pytest.mark.thorough
def test_a_rank_that_is_stuck_before_an_exchange(prepared: Run, tmp_path: Path) -> None:
    """It lives and its heartbeats go on, in the same phase as the others."""
    run, (survivor, victim) = failed(prepared, tmp_path, "combine", "stuck")
    assert_named(run, survivor, "combine", "does not come to an exchange")
    assert victim.returncode == EXIT_CODE
    assert f"this rank has stood in forward-backward of step {STEP} for" in victim.stderr


@pytest.mark.thorough
def test_ranks_that_are_not_in_the_exchange_name_it_too(prepared: Run, tmp_path: Path) -> None:
    """They stand in the gradients' collective, or in an exchange of their own."""
    run, outcomes = failed(prepared, tmp_path, "combine backward", "kill", 4)
    for rank, outcome in enumerate(outcomes):
        if rank != VICTIM:
            assert_named(run, outcome, "combine backward", "is dead: its process is gone")
