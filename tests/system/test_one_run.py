"""Several starts into one run folder: one of them goes on as if it were alone, the others say why they do not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from megamoe.common.errors import EXIT_CODE
from megamoe.testing.launches import Outcome, command, one_error, outcome, run_script, script_on_this_rank, started
from megamoe.testing.ranks import run_ranks
from megamoe.testing.runs import Run
from megamoe.training import job, one_run
from megamoe.training.checkpoint import folder as folders
from megamoe.training.supervision import STATUS

PRETRAIN = "launch/pretrain.py"
SECONDS = 120.0
REFUSED = "FolderInUseError: Another run is at work in this run folder."


def test_one_run_has_a_folder_to_itself(prepared: Run, tmp_path: Path) -> None:
    run = prepared.elsewhere(
        tmp_path / "run",
        *("parallel.ep=1", "training.steps=100000", "training.checkpoint.every=0", "training.validation.every=0"),
        "training.faults.heartbeat_seconds=0.3",
    )
    start = command("python", PRETRAIN, run.words)
    with started(start, tmp_path / "a") as a, started(start, tmp_path / "b") as b:
        deadline = time.monotonic() + SECONDS
        while a.poll() is None and b.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        (loser, out), (winner, _) = sorted(((a, "a"), (b, "b")), key=lambda each: each[0].poll() is None)
        ended = outcome(loser, tmp_path / out, SECONDS)
        assert ended.returncode == EXIT_CODE, ended
        assert REFUSED in ended.stderr
        assert f"process {winner.pid} on " in ended.stderr

        late = run_script(PRETRAIN, run.words, 1)[0]
        assert late.returncode == EXIT_CODE, late
        assert REFUSED in late.stderr

        seen = len(run.metrics())
        while len(run.metrics()) < seen + 3 and time.monotonic() < deadline:
            assert winner.poll() is None, "the run that was there first ended"
            time.sleep(0.01)
        steps = [line["step"] for line in run.metrics()]
        assert steps == list(range(1, steps[-1] + 1))

        for unseen in ((one_run.refuse_second_run,), (one_run.refuse_second_run, one_run.leave_to_earlier_run)):
            both = run_ranks(_start_without, 2, unseen, list(run.words), init=False)
            assert REFUSED in one_error(*both)
            assert winner.poll() is None
        assert json.loads((run.folder / STATUS).read_text())["state"] == "running"
        winner.terminate()
        assert "asked to stop" in outcome(winner, tmp_path / ("b" if out == "a" else "a"), SECONDS).stderr
    last = run.metrics()[-1]["step"]
    assert [path.name for path in folders.complete(run.folder)] == [folders.final_name(last)]


def _start_without(checks: tuple[Callable[..., None], ...], words: list[str]) -> Outcome:
    """As a run that was not yet to be seen when these looked."""
    for check in checks:
        setattr(job, check.__name__, lambda *_: None)
    return script_on_this_rank(PRETRAIN, words)
