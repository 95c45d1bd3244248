"""A run folder has one owner: who is there first, whatever machine it is on, and until it is gone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megamoe.common import processes
from megamoe.common.errors import ConfigError, FolderInUseError
from megamoe.training import one_run
from megamoe.training.one_run import OWNER, claimed

SOON, NEVER = 0.05, 3600.0


@pytest.fixture
def gone() -> int:
    """Number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.fixture
def alive() -> Iterator[int]:
    """Number of another process of this machine."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n")


def leave_behind(folder: Path, every: float = NEVER, **values: Any) -> None:
    """The file of a run that was killed."""
    with claimed(folder):
        content = json.loads((folder / OWNER).read_text())
    (folder / OWNER).write_text(json.dumps(content | {"run": "before", "every_seconds": every} | values))


def owner(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / OWNER).read_text())
    return content


def test_it_is_owned_as_long_as_the_run_lasts(tmp_path: Path) -> None:
    with claimed(tmp_path):
        assert owner(tmp_path)["started"] == processes.started(owner(tmp_path)["pid"]) is not None
        with pytest.raises(FolderInUseError, match=f"process {owner(tmp_path)['pid']} on "), claimed(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), claimed(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """On a folder whose owner is gone, which is where they could get into each other's way."""
    for _ in range(20):
        leave_behind(tmp_path, system=processes.system(), pid=2**22 + 1)
        start, done, got, refused = threading.Barrier(6), threading.Barrier(6), [], []

        def attempt(start: threading.Barrier, done: threading.Barrier, got: list[str], refused: list[str]) -> None:
            with ExitStack() as stack:
                start.wait(60)
                try:
                    stack.enter_context(claimed(tmp_path))
                    got.append(owner(tmp_path)["run"])
                except FolderInUseError as error:
                    refused.append(str(error))
                done.wait(60)

        threads = [threading.Thread(target=attempt, args=(start, done, got, refused)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert (len(got), len(refused)) == (1, 5), (got, refused)
        assert not list(tmp_path.iterdir())


def test_a_process_that_is_gone_is_not_waited_for(tmp_path: Path, gone: int) -> None:
    leave_behind(tmp_path, pid=gone)
    with claimed(tmp_path):
        assert owner(tmp_path)["run"] != "before"


def test_nor_is_one_whose_number_another_has_now(tmp_path: Path, alive: int) -> None:
    """As after the restart of a container, where numbers come again."""
    leave_behind(tmp_path, pid=alive, started="1")
    with claimed(tmp_path):
        assert owner(tmp_path)["run"] != "before"


def test_a_process_of_this_system_is_believed_however_long_it_says_nothing(tmp_path: Path, alive: int) -> None:
    leave_behind(tmp_path, pid=alive, started=processes.started(alive))
    with pytest.raises(FolderInUseError, match=f"process {alive} on "), claimed(tmp_path):
        pass
    assert owner(tmp_path)["run"] == "before"


@pytest.mark.parametrize("system", ["another machine", None])
def test_one_that_cannot_be_looked_at_is_waited_for(tmp_path: Path, gone: int, system: str | None) -> None:
    leave_behind(tmp_path, SOON, pid=gone, system=system)
    with claimed(tmp_path):
        assert owner(tmp_path)["run"] != "before"


def test_and_it_is_left_alone_where_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(tmp_path, SOON):
        monkeypatch.setattr(processes, "system", lambda: "another machine")  # of whoever comes now
        with pytest.raises(FolderInUseError), claimed(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "[1]", '{"run": '])
def test_a_file_that_says_nothing_is_waited_for(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_run, "BEAT_SECONDS", SOON)
    (tmp_path / OWNER).write_text(content)
    with claimed(tmp_path):
        assert owner(tmp_path)["run"]


def test_a_run_whose_file_was_taken_leaves_that_of_the_other(tmp_path: Path) -> None:
    with claimed(tmp_path):
        (tmp_path / OWNER).write_text(json.dumps({"run": "another"}))
    assert owner(tmp_path)["run"] == "another"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"), claimed(tmp_path / "nowhere"):
        pass
