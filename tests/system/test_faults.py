"""Real ranks that are killed, stopped, stuck or asked to leave: the others end in time, with the right code and name.

Every rank is a process of its own, without a launcher that would end it because of another one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamoe.common import env
from megamoe.common.errors import EXIT_CODE
from megamoe.common.main import REQUEUE
from megamoe.data.loader import BatchLoader
from megamoe.testing.launches import Outcome, run_script, script_in_this_process
from megamoe.testing.ranks import run_ranks
from megamoe.testing.runs import TIMING, Run
from megamoe.training.checkpoint import folder as folders

PRETRAIN = "launch/pretrain.py"
RANKS = 2
VICTIM = 1
SECONDS = 120.0
"""Limit of everything here."""
LIMIT = 8.0
"""What the ranks are given as the limit of standing still."""
ENDLESS = ("training.steps=100000", "training.checkpoint.every=0", "training.validation.every=0")
QUICK = (f"training.faults.hang_minutes={LIMIT / 60}", "training.faults.heartbeat_seconds=0.3")


@pytest.fixture
def endless(prepared: Run, tmp_path: Path) -> Run:
    """A run that goes on until something happens to it."""
    return prepared.elsewhere(tmp_path / "run", *ENDLESS, *QUICK)


# --- One rank in a child of a rank's process, which sees it end


def in_a_child(run: Run, fault: str) -> Outcome:
    """Train; once three steps are done, do to the victim what `fault` says."""
    name = f"{run.folder}-rank{env.rank()}"
    child = os.fork()
    if child == 0:
        os._exit(_train(run, fault, name))
    if env.rank() == VICTIM:
        FAULTS[fault](run, child)
    code = _code_of(child)
    return Outcome(code, Path(f"{name}.out").read_text(), Path(f"{name}.err").read_text())


def _train(run: Run, fault: str, name: str) -> int:
    if fault == "stuck" and env.rank() == VICTIM:
        _get_stuck_after(3)
    return script_in_this_process(PRETRAIN, run.words, name)


def _get_stuck_after(steps: int) -> None:
    original, calls = BatchLoader.rank_batch, itertools.count()

    def rank_batch(self: BatchLoader, *args: Any) -> Any:
        while next(calls) >= 2 * steps:  # two micro-batches a step
            pass
        return original(self, *args)

    BatchLoader.rank_batch = rank_batch  # type: ignore[method-assign]


def _when_it_trains(number: signal.Signals) -> Callable[[Run, int], None]:
    def act(run: Run, child: int) -> None:
        _wait(lambda: len(run.metrics()) >= 3)
        os.kill(child, number)

    return act


def _stop(run: Run, child: int) -> None:
    _when_it_trains(signal.SIGSTOP)(run, child)
    _wait(lambda: status(run)["state"] == "failed")  # the other one has seen it
    os.kill(child, signal.SIGKILL)


FAULTS: dict[str, Callable[[Run, int], None]] = {
    "none": lambda run, child: None,
    "kill": _when_it_trains(signal.SIGKILL),
    "stop": _stop,
    "stuck": lambda run, child: None,
    "usr1": _when_it_trains(signal.SIGUSR1),
    "term": _when_it_trains(signal.SIGTERM),
}


def _code_of(child: int) -> int:
    ended: list[int] = []

    def over() -> bool:
        pid, state = os.waitpid(child, os.WNOHANG)
        if pid:
            ended.append(os.waitstatus_to_exitcode(state))
        return bool(pid)

    try:
        _wait(over)
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
    return ended[0]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited for {SECONDS} s"
        time.sleep(0.02)


def status(run: Run) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        return dict(json.loads((run.folder / "status.json").read_text()))
    return {"state": ""}


def started(run: Run, fault: str) -> list[Outcome]:
    return run_ranks(in_a_child, RANKS, run, fault, init=False, timeout=2 * SECONDS)


# --- Asked to leave


@pytest.mark.parametrize("fault", ["usr1", pytest.param("term", marks=pytest.mark.thorough)])
def test_a_signal_to_one_rank_makes_all_save_and_leave_to_be_requeued(endless: Run, fault: str) -> None:
    outcomes = started(endless, fault)
    assert [outcome.returncode for outcome in outcomes] == [REQUEUE] * RANKS, outcomes
    step = endless.metrics()[-1]["step"]
    assert f"asked to stop: saved step {step}, start again to go on" in outcomes[0].stderr
    assert [path.name for path in folders.complete(endless.folder)] == [folders.final_name(step)]
    now = status(endless)
    assert (now["state"], now["step"], now["reason"]) == ("requeue", step, "requeue")
    again = run_script(PRETRAIN, [*endless.words, f"training.stop_after_step={step + 2}"], RANKS)
    assert [outcome.returncode for outcome in again] == [0] * RANKS, again
    assert [line["step"] for line in endless.metrics() if "loss" in line] == list(range(1, step + 3))
    assert status(endless)["state"] == "stopped"
    assert "slowest: rank " in again[0].stderr
    assert {"slowest_rank", "slowest_over_median", "busy_seconds_max", "busy_seconds_mean"} <= TIMING
    assert all(1.0 <= line["slowest_over_median"] < 2.0 for line in endless.metrics() if "loss" in line)


# --- Gone, or not answering


def assert_named(run: Run, outcome: Outcome, *words: str) -> None:
    """The one error of a rank that waited in vain."""
    assert outcome.returncode == EXIT_CODE, outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.stderr.count("LostPeerError: The run stands still: ") == 1, outcome.stderr
    text = outcome.stderr[outcome.stderr.index("LostPeerError") :]
    assert f"rank {VICTIM} on {os.uname().nodename} " in text, text
    assert all(word in text for word in words), text
    assert "rank 0 on" not in text, "the rank that waits is not the cause"
    assert status(run)["state"] == "failed"
    assert f"rank {VICTIM}" in status(run)["reason"]


def test_a_killed_rank_is_named_by_the_other(endless: Run) -> None:
    survivor, victim = started(endless, "kill")
    assert victim.returncode == -signal.SIGKILL
    assert_named(endless, survivor, "is dead: its process is gone", "forward-backward")


@pytest.mark.thorough
def test_a_stopped_rank_is_named_by_the_other(endless: Run) -> None:
    survivor, victim = started(endless, "stop")
    assert victim.returncode == -signal.SIGKILL
    assert_named(endless, survivor, "is dead or stopped: no heartbeat for")


def test_a_rank_that_is_stuck_is_named_by_the_other_and_ends_itself(endless: Run) -> None:
    survivor, victim = started(endless, "stuck")
    assert_named(endless, survivor, "last in data of step 4")
    assert victim.returncode == EXIT_CODE
    assert "this rank has stood in data of step 4 for" in victim.stderr
    stacks = endless.folder / "logs" / f"stacks_rank_{VICTIM}.txt"
    assert "in rank_batch" in stacks.read_text()


# --- Steps that cannot be used


def test_a_run_that_diverges_ends_and_its_step_can_be_seen_again(prepared: Run, tmp_path: Path) -> None:
    """From the command that the dump gives, to the last bit of the norm."""
    words = ("training.optimizer.lr=0.5", "training.schedule.warmup_steps=1", "training.schedule.type=constant")
    spikes = ("training.faults.spike_factor=1.5", "training.faults.spike_window=16", "training.faults.max_skips=3")
    run = prepared.elsewhere(
        tmp_path / "run", "training.steps=200", "training.checkpoint.every=10", *words, *spikes, "training.log_every=1"
    )
    outcomes = run_script(PRETRAIN, run.words, RANKS)
    assert [outcome.returncode for outcome in outcomes] == [EXIT_CODE] * RANKS, outcomes
    assert all("TrainingError: The gradients of " in outcome.stderr for outcome in outcomes)
    assert status(run)["state"] == "failed"
    dumps = sorted((run.folder / "faults").iterdir())
    seen = json.loads((dumps[-1] / "step.json").read_text())
    assert {f"rank_{rank:05d}.{kind}" for rank in range(RANKS) for kind in ("json", "safetensors")} <= {
        path.name for path in dumps[-1].iterdir()
    }
    assert seen["gradient_norm_again"] == seen["gradient_norm"], "the same step gives the same bits"
    last = run.metrics()[-1]
    assert (last["step"], last["gradient_norm"]) == (seen["step"], seen["gradient_norm"])
    assert last["skipped_steps"] >= 3
    assert seen["samples"][1] == last["consumed_samples"]
    words = shlex.split(seen["replay"])
    start, replay = words[:4], words[4:]
    assert start == ["torchrun", "--nproc-per-node", str(RANKS), PRETRAIN]
    again = run_script(PRETRAIN, replay, RANKS)
    assert [outcome.returncode for outcome in again] == [EXIT_CODE] * RANKS, again
    lines = Run((), dumps[-1] / "replay").metrics()
    assert {k: v for k, v in lines[-1].items() if k not in TIMING} == {k: v for k, v in last.items() if k not in TIMING}
