"""One run in a folder: who is there first stays, however close together two of them start."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megamoe.common.errors import FolderInUseError
from megamoe.training import heartbeat
from megamoe.training.heartbeat import Heartbeat, Pulse, beating
from megamoe.training.one_run import refuse_second_run
from megamoe.training.supervision import STATUS, _failed

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


def left_behind(folder: Path, every: float = SOON, **values: Any) -> None:
    """A heartbeat that nobody writes any more."""
    Heartbeat(Pulse(), folder, 0, every).beat()
    path = heartbeat.path_of(folder, 0)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_new_folder_is_free(tmp_path: Path) -> None:
    refuse_second_run(tmp_path / "run")


def test_a_run_that_ended_is_believed(tmp_path: Path) -> None:
    left_behind(tmp_path, NEVER, host="elsewhere", ended="finished")
    refuse_second_run(tmp_path)


def test_a_process_that_is_gone_is_not_waited_for(tmp_path: Path, gone: int) -> None:
    left_behind(tmp_path, NEVER, pid=gone)
    refuse_second_run(tmp_path)


def test_a_restarted_container_is_not_its_own_second_run(tmp_path: Path) -> None:
    left_behind(tmp_path, NEVER, host=socket.gethostname(), pid=os.getpid())
    refuse_second_run(tmp_path)


@pytest.mark.parametrize("where", ["elsewhere", "here"])
def test_one_that_is_silent_is_waited_for_and_then_counts_as_gone(tmp_path: Path, alive: int, where: str) -> None:
    left_behind(tmp_path, host=socket.gethostname() if where == "here" else where, pid=alive)
    refuse_second_run(tmp_path)


def test_one_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    with beating(tmp_path, 0, SOON) as (pulse, beats):
        beats._who |= {"host": "elsewhere", "pid": 77}
        pulse.enter("forward-backward", step=7)
        beats.beat()
        with pytest.raises(FolderInUseError) as caught:
            refuse_second_run(tmp_path)
    assert caught.value.got == (
        f"training.output_dir = {tmp_path}: process 77 on elsewhere, in forward-backward of step 7"
    )


def test_of_two_that_begin_together_the_later_one_sees_it_and_writes_no_more(tmp_path: Path) -> None:
    pulses = [Pulse(), Pulse()]
    first, second = (Heartbeat(pulse, tmp_path, 0, NEVER) for pulse in pulses)
    first.beat()
    second.beat()  # finds a file, which may be years old
    assert [pulse.intruding for pulse in pulses] == [None, None]
    first.beat()
    assert pulses[0].intruding is None
    second.beat()
    assert pulses[1].intruding is not None
    assert pulses[1].intruding["run"] == first._who["run"]
    before = heartbeat.read(tmp_path, 0)
    second.beat()
    assert heartbeat.read(tmp_path, 0) == before


def test_both_agree_on_who_was_first_whatever_their_clocks_say(tmp_path: Path) -> None:
    pulses = [Pulse(), Pulse()]
    late, early = (Heartbeat(pulse, tmp_path, 0, NEVER) for pulse in pulses)
    early._who["began"] = late._who["began"] - 3600.0
    for beats in (late, early, late, early):
        beats.beat()
    assert pulses[0].intruding is not None
    assert pulses[1].intruding is None


def test_the_other_runs_status_stays(tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text("of the other")
    _failed(tmp_path, 0, Pulse(), FolderInUseError("Another run is at work."))
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]
    assert (tmp_path / STATUS).read_text() == "of the other"
