"""Several starts into one run folder: one of them goes on as if it were alone, the others say why they do not."""

from __future__ import annotations

import json
import time
from pathlib import Path

from megamoe.common.errors import EXIT_CODE
from megamoe.testing.launches import command, one_error, outcome, run_script, started
from megamoe.testing.runs import Run
from megamoe.training.checkpoint import folder as folders
from megamoe.training.supervision import STATUS

PRETRAIN = "launch/pretrain.py"
SECONDS = 120.0
REFUSED = "FolderInUseError: Another run is at work in this run folder."


def test_one_run_has_a_folder_to_itself(prepared: Run, tmp_path: Path) -> None:
    run = prepared.elsewhere(
        tmp_path / "run",
        *("parallel.ep=1", "training.steps=100000", "training.checkpoint.every=20", "training.validation.every=0"),
    )
    start = command("python", PRETRAIN, run.words)
    with started(start, tmp_path / "a") as a, started(start, tmp_path / "b") as b:
        deadline = time.monotonic() + SECONDS
        while a.poll() is None and b.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        (loser, out), (winner, other) = sorted(((a, "a"), (b, "b")), key=lambda each: each[0].poll() is None)
        ended = outcome(loser, tmp_path / out, SECONDS)
        assert ended.returncode == EXIT_CODE, ended
        assert REFUSED in ended.stderr
        assert f"process {winner.pid} on " in ended.stderr

        assert REFUSED in one_error(*run_script(PRETRAIN, [*run.words, "training.seed=99", "training.steps=3"], 2))

        seen = len(run.metrics())
        while len(run.metrics()) < seen + 3 and time.monotonic() < deadline:
            assert winner.poll() is None, "the run that was there first ended"
            time.sleep(0.01)
        assert json.loads((run.folder / STATUS).read_text())["state"] == "running"
        winner.terminate()
        assert "asked to stop" in outcome(winner, tmp_path / other, SECONDS).stderr
    steps = [line["step"] for line in run.metrics()]
    assert steps == list(range(1, steps[-1] + 1))
    assert folders.complete(run.folder)[-1].name == folders.final_name(steps[-1])

    # It has left the folder, and who goes on with other settings hears of it.
    again = run_script(PRETRAIN, [*run.words, "training.seed=99", f"training.steps={steps[-1] + 1}"], 1)[0]
    assert again.returncode == 0, again
    assert "goes on with other settings than those of the checkpoint: training.seed: " in again.stderr
