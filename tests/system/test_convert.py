"""`python -m megamoe convert` on a run that was trained, and what takes its copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megamoe.cli import main
from megamoe.testing.launches import run_script
from megamoe.testing.runs import TIMING, Run
from megamoe.training.checkpoint import folder as folders

PRETRAIN, EVALUATE = "launch/pretrain.py", "launch/evaluate.py"


def convert(*words: object) -> None:
    """Here, without another process's start."""
    assert main(["convert", *map(str, words)]) == 0


def numbers(run: Run, after: int) -> list[dict[str, object]]:
    """What was measured after a step, without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in run.metrics()
        if line["step"] > after
    ]


def test_a_copy_in_other_files_goes_on_as_the_original(trained: Run, tmp_path: Path) -> None:
    """Also with another number of files than there are ranks, and every number after it is the same."""
    original = folders.complete(trained.folder)[0]
    step = folders.read_manifest(original).step
    convert("verify", original)
    convert("reshard", original, tmp_path / "copy", "--files", 3)
    resumed = trained.elsewhere(tmp_path / "resumed", f"training.checkpoint.resume={folders.locate(tmp_path / 'copy')}")
    outcomes = run_script(PRETRAIN, resumed.words, ranks=2)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    assert len(numbers(trained, step)) >= 5
    assert numbers(resumed, step) == numbers(trained, step)


def test_weights_alone_are_enough_to_evaluate(trained: Run, tmp_path: Path) -> None:
    convert("reshard", trained.folder, tmp_path / "copy", "--files", 1, "--weights-only")
    scores = []
    for number, folder in enumerate((trained.folder, tmp_path / "copy")):
        out = tmp_path / f"{number}.json"
        (outcome,) = run_script(EVALUATE, ["--checkpoint", str(folder), "--out", str(out)])
        assert outcome.returncode == 0, outcome
        scores.append(json.loads(out.read_text()))
    assert scores[0] == scores[1]


def test_damage_ends_with_code_2_and_one_error(trained: Run) -> None:
    newest = folders.locate(trained.folder)
    path = max((newest / "state").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    command = [sys.executable, "-m", "megamoe", "convert", "verify", str(trained.folder)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert found.stderr.startswith(f"DamagedCheckpointError: checkpoint {newest} is damaged\n")
    assert f"the content of state/{path.name} does not match its digest" in found.stderr
    assert str(folders.complete(trained.folder)[0]) in found.stderr, "it says what to go on from"
