"""A rank's file says where the rank is, whole at any moment, and never stops the run."""

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from megamoe.parallel.exchanges import Exchanges
from megamoe.training import heartbeat
from megamoe.training.heartbeat import Heartbeat, Pulse, beating

NEVER = 3600.0


def test_the_file_follows_the_pulse(tmp_path: Path) -> None:
    pulse = Pulse()
    beats = Heartbeat(pulse, tmp_path, 3, NEVER)
    beats.beat()
    first = heartbeat.read(tmp_path, 3)
    assert first is not None
    assert (first["rank"], first["host"], first["pid"]) == (3, socket.gethostname(), os.getpid())
    assert (first["step"], first["phase"], first["begun"], first["count"]) == (0, "set-up", 0, 1)
    assert first["step_seconds"] is None
    assert first["resident_bytes"] > 1e6
    pulse.enter("data", step=1)
    for seconds in (3.0, 1.0, 2.0):
        pulse.took(seconds)
    beats.beat()
    second = heartbeat.read(tmp_path, 3)
    assert second is not None
    assert (second["step"], second["phase"], second["begun"], second["count"]) == (1, "data", 1, 2)
    assert second["since"] >= first["since"]
    assert second["step_seconds"] == {"last": 2.0, "median": 2.0}
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["rank_00003.json"], "nothing half-written"


def test_it_names_the_exchange_that_the_rank_stands_in(tmp_path: Path) -> None:
    pulse = Pulse(Exchanges())
    beats = Heartbeat(pulse, tmp_path, 0, NEVER)
    pulse.enter("forward-backward", step=7)
    with pulse.record.begin((3, "ep", (0, 2)), "combine 1/4", (0, 0), on_gpu=False):
        beats.beat()
        assert pulse.where() == "forward-backward of step 7, in block 3, combine 1/4 (ep ranks 0, 2)"
    inside = heartbeat.read(tmp_path, 0)
    beats.beat()
    after = heartbeat.read(tmp_path, 0)
    assert inside is not None
    assert after is not None
    assert inside["exchange"] == {"number": 1, "layer": 3, "axis": "ep", "phase": "combine 1/4", "ranks": [0, 2]}
    assert after["exchange"] is None
    assert pulse.where() == "forward-backward of step 7"


class Broken:
    """An event of a device that has failed."""

    def query(self) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_it_goes_on_where_the_device_has_failed(tmp_path: Path) -> None:
    pulse = Pulse(Exchanges())
    beats = Heartbeat(pulse, tmp_path, 0, NEVER)
    pulse.enter("forward-backward", step=7)
    exchange: Any = pulse.record.begin((3, "ep", (0, 2)), "combine", (0, 0), on_gpu=False)
    exchange.resumed = Broken()
    beats.start()
    assert pulse.where() == "forward-backward of step 7"
    beats.stop("RuntimeError: CUDA error")
    content = heartbeat.read(tmp_path, 0)
    assert content is not None
    assert (content["exchange"], content["ended"], content["count"]) == (None, "RuntimeError: CUDA error", 2)


def test_it_is_written_again_and_again_without_the_main_thread(tmp_path: Path) -> None:
    with beating(tmp_path, 0, 0.001):
        while heartbeat.read(tmp_path, 0)["count"] < 5:  # type: ignore[index]
            pass


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_one_says_why_the_rank_left(tmp_path: Path, fails: bool) -> None:
    def lives() -> None:
        with beating(tmp_path, 0, NEVER):
            if fails:
                raise ValueError("no such luck\nat all")

    if fails:
        with pytest.raises(ValueError, match="luck"):
            lives()
    else:
        lives()
    content = heartbeat.read(tmp_path, 0)
    assert content is not None
    assert content["ended"] == ("ValueError: no such luck" if fails else "finished")


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").write_text("a file is in the way")
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megamoe.heartbeat")
    logger.addHandler(listener)
    try:
        beats = Heartbeat(Pulse(), tmp_path, 0, NEVER)
        beats.start()
        beats.beat()
        beats.stop("finished")
    finally:
        logger.removeHandler(listener)
    assert len(said) == 1
    assert said[0].startswith("heartbeats cannot be written: ")


def test_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    assert heartbeat.read(tmp_path, 0) is None
    path = heartbeat.path_of(tmp_path, 0)
    path.parent.mkdir()
    for text in ('{"rank": 0, "ho', json.dumps([1, 2])):
        path.write_text(text)
        assert heartbeat.read(tmp_path, 0) is None
