"""One prepared corpus of two sources and one trained run for all end-to-end tests; they work on copies of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megamoe.testing.configs import TINY
from megamoe.testing.launches import run_script
from megamoe.testing.runs import Run, prepared_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are given as in the README, and processes of their own find the package as the tests do."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The corpus is prepared, nothing is trained."""
    folder = tmp_path_factory.mktemp("system")
    notes = folder / "notes"
    notes.mkdir()
    for number in range(30):
        (notes / f"{number}.txt").write_text("".join(f"note {number} part {part}\n" for part in range(20 + number)))
    sources = f"[{{name: small, path: {folder / 'corpus'}}}, {{name: notes, path: {notes}, weight: 0.5}}]"
    words = prepared_run(folder, f"data.sources={sources}", "parallel.ep=2")
    return Run((*TINY, *words), folder / "run")


@pytest.fixture(scope="session")
def _trained(prepared: Run) -> Run:
    outcomes = run_script(ROOT / "launch/pretrain.py", prepared.words, ranks=2)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    return prepared


@pytest.fixture
def trained(_trained: Run, tmp_path: Path) -> Run:
    """A trained run of the test's own."""
    run = _trained.elsewhere(tmp_path / "run")
    shutil.copytree(_trained.folder, run.folder)
    return run
