"""What a rank says whose collective fails: from its own record and the others' heartbeats."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.common.errors import LostPeerError
from megamoe.parallel.exchanges import Exchanges
from megamoe.training import supervision
from megamoe.training.heartbeat import Heartbeat, Pulse
from megamoe.training.supervision import STATUS, _failed, _naming_lost_peers

RARELY = 60.0
"""Seconds between heartbeats: what others know is what was written for them."""


@pytest.fixture
def gone() -> int:
    """Number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_a_failed_exchange_is_told_with_its_place(tmp_path: Path, gone: int) -> None:
    pulses = [Pulse(Exchanges()), Pulse(Exchanges())]
    beats = [Heartbeat(pulse, tmp_path, rank, RARELY) for rank, pulse in enumerate(pulses)]
    beats[1]._who["pid"] = gone
    for beat in beats:
        beat.pulse.enter("forward-backward", step=7)
        beat.beat()
    exchange = pulses[0].record.begin((3, "ep", (0, 1)), "combine backward", (0, 0), on_gpu=False)
    with pytest.raises(LostPeerError) as caught, _naming_lost_peers(tmp_path, 0, 2, beats[0]), exchange:
        raise RuntimeError("[pair.cc:1] Connection closed by peer\nmore")
    place = "block 3, combine backward (ep ranks 0, 1)"
    assert caught.value.got == f"in forward-backward of step 7: {place}: [pair.cc:1] Connection closed by peer"
    assert caught.value.what.endswith(f"last in forward-backward of step 7; rank 0 waits for it in {place}.")


def test_a_defect_is_left_alone(tmp_path: Path) -> None:
    beats = Heartbeat(Pulse(Exchanges()), tmp_path, 0, RARELY)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"), _naming_lost_peers(tmp_path, 0, 1, beats):
        raise RuntimeError("shapes do not fit")


def test_a_run_that_failed_says_so_whatever_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dump(folder: Path, rank: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(supervision, "dump_recent", dump)
    _failed(tmp_path, 0, Pulse(Exchanges()), ValueError("no such luck"))
    status = json.loads((tmp_path / STATUS).read_text())
    assert (status["state"], status["reason"]) == ("failed", "ValueError: no such luck")
