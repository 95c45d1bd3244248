"""Ctrl-C and SIGTERM: all ranks save after the same step and leave, and the next start goes on at the following one.

Ctrl-C is a person who is done; SIGTERM a batch system that is to start the job again, which the exit code says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megamoe.common.main import REQUEUE
from megamoe.testing.launches import Launcher, Outcome, command, outcome, run_script, started
from megamoe.testing.runs import Run
from megamoe.training.checkpoint import folder as folders

PRETRAIN = "launch/pretrain.py"
RANKS = 2
SECONDS = 60.0


@pytest.fixture
def endless(prepared: Run, tmp_path: Path) -> Run:
    """A run that ends only when it is asked to, and saves only then."""
    return prepared.elsewhere(
        tmp_path / "run", "training.steps=100000", "training.checkpoint.every=0", "training.validation.every=0"
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Look again and again, at most for `SECONDS` and as long as the process lives."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"{what} did not happen within {SECONDS} s"
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """Rank to process id of the training processes below a launcher."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") is not None and PRETRAIN in child.cmdline():
            found[int(child.environ()["RANK"])] = child.pid
    assert sorted(found) == list(range(RANKS)), found
    return found


def interrupted(
    launcher: Launcher, run: Run, tmp_path: Path, ask: Callable[[subprocess.Popen[bytes]], None]
) -> Outcome:
    """Start the run, let it do three steps, ask it to stop, and wait for its end."""
    with started(command(launcher, PRETRAIN, run.words, RANKS), tmp_path / "out") as process:
        wait_until(lambda: len(run.metrics()) >= 3, process, "the third step")
        ask(process)
        return outcome(process, tmp_path / "out", SECONDS)


def assert_saved_and_goes_on(run: Run, ended: Outcome) -> None:
    step = run.metrics()[-1]["step"]
    assert f"asked to stop: saved step {step}, start again to go on" in ended.stderr
    assert ended.stderr.count("asked to stop") == 1
    assert "Traceback" not in ended.output
    assert [path.name for path in folders.complete(run.folder)] == [folders.final_name(step)]
    assert [line["step"] for line in run.metrics()] == list(range(1, step + 1))
    outcomes = run_script(PRETRAIN, [*run.words, f"training.stop_after_step={step + 2}"], RANKS)
    assert [o.returncode for o in outcomes] == [0] * RANKS, outcomes
    assert f"resumed from {run.checkpoints / folders.final_name(step)}" in outcomes[0].stderr
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, step + 3))


def to_all(number: signal.Signals) -> Callable[[subprocess.Popen[bytes]], None]:
    def ask(process: subprocess.Popen[bytes]) -> None:
        for pid in ranks_of(process).values():
            os.kill(pid, number)

    return ask


def test_sigterm_to_all_ranks_under_deepspeed(endless: Run, tmp_path: Path) -> None:
    ended = interrupted("deepspeed", endless, tmp_path, to_all(signal.SIGTERM))
    assert ended.returncode == REQUEUE, ended.output
    assert_saved_and_goes_on(endless, ended)


def test_sigint_to_one_rank_under_torchrun(endless: Run, tmp_path: Path) -> None:
    """The other rank was not asked, and leaves after the same step."""
    ended = interrupted("torchrun", endless, tmp_path, lambda process: os.kill(ranks_of(process)[1], signal.SIGINT))
    assert ended.returncode == 0, ended.output
    assert_saved_and_goes_on(endless, ended)


def test_a_second_signal_does_not_break_the_save(endless: Run, tmp_path: Path) -> None:
    def ask(process: subprocess.Popen[bytes]) -> None:
        pids = ranks_of(process).values()
        for number in (signal.SIGINT, signal.SIGTERM):
            for pid in pids:
                os.kill(pid, number)
        wait_until(lambda: any(endless.checkpoints.glob("*step_*")), process, "the save")
        for pid in pids:
            os.kill(pid, signal.SIGTERM)

    ended = interrupted("deepspeed", endless, tmp_path, ask)
    assert ended.returncode == 0, ended.output
    assert_saved_and_goes_on(endless, ended)


@pytest.mark.parametrize("launcher, number", [("deepspeed", signal.SIGINT), ("torchrun", signal.SIGTERM)])
def test_ctrl_c_reaches_everyone(endless: Run, tmp_path: Path, launcher: Launcher, number: signal.Signals) -> None:
    """A terminal or a batch system signals launcher and ranks alike, and the launcher passes it on once more.

    The launcher's own exit code and messages are its own; the run is saved.
    """
    ended = interrupted(launcher, endless, tmp_path, lambda process: os.killpg(process.pid, number))
    step = endless.metrics()[-1]["step"]
    assert f"asked to stop: saved step {step}, start again to go on" in ended.stderr
    assert [path.name for path in folders.complete(endless.folder)] == [folders.final_name(step)]


def test_ctrl_c_before_training_leaves_without_a_traceback(endless: Run, tmp_path: Path) -> None:
    with started(command("python", PRETRAIN, [*endless.words, "parallel.ep=1"]), tmp_path / "out") as process:
        # The folder is made right before the model is built, which takes seconds.
        wait_until(endless.checkpoints.is_dir, process, "the run folder")
        os.kill(process.pid, signal.SIGINT)
        ended = outcome(process, tmp_path / "out", SECONDS)
    assert ended.returncode == 130, ended.output
    assert "Traceback" not in ended.output
