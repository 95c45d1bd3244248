"""Who is named when a run stands still, from heartbeat files as ranks leave them; and that the process ends."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamoe.common.errors import EXIT_CODE
from megamoe.parallel.exchanges import Exchanges
from megamoe.testing.ranks import CPU_ONLY
from megamoe.training.heartbeat import Heartbeat, Pulse
from megamoe.training.watchdog import diagnosis

EVERY = 0.1
"""Seconds between heartbeats here."""


class Ranks:
    """Ranks that live (their heartbeats go on) or not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.alive = folder, list[Heartbeat]()

    def add(
        self,
        rank: int,
        phases: int = 4,
        ended: str | None = None,
        alive: bool = True,
        stands_in: tuple[int, str] | None = None,
    ) -> Heartbeat:
        """`stands_in`: block and phase of an exchange between ranks 0 and 1."""
        pulse = Pulse(Exchanges())
        if stands_in is not None:
            layer, phase = stands_in
            pulse.record.waiting = pulse.record.begin((layer, "ep", (0, 1)), phase, (0, 0), on_gpu=False)
        for _ in range(phases):
            pulse.enter("data" if phases % 2 else "forward-backward", step=(phases + 1) // 2)
        pulse.ended = ended
        beats = Heartbeat(pulse, self.folder, rank, EVERY)
        if alive:
            beats.start()
            self.alive.append(beats)
        else:
            beats.beat()
        return beats


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path)
    yield ranks
    for beats in ranks.alive:
        beats.stop("finished")


def test_a_rank_whose_heartbeats_stopped(ranks: Ranks) -> None:
    ranks.add(0)
    ranks.add(1, alive=False)
    ranks.add(2, phases=3)
    found = diagnosis(ranks.folder, 0, 3)
    assert found.startswith("rank 1 on ")
    assert "no heartbeat for" in found
    assert "rank 0" not in found
    assert "rank 2" not in found, "whoever is dead explains who is behind"


def test_a_rank_whose_process_is_gone_is_known_at_once(ranks: Ranks) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for: a zombie
    ranks.add(0)
    beats = ranks.add(1, alive=False)
    beats.seconds = 4.0  # a diagnosis that waits for its next heartbeat takes long, and says something else
    beats._who.update(pid=gone.pid, every_seconds=4.0)
    beats.beat()
    try:
        assert "rank 1 on " in (found := diagnosis(ranks.folder, 0, 2))
        assert "its process is gone" in found
    finally:
        gone.wait()
    assert "its process is gone" in diagnosis(ranks.folder, 0, 2)


def test_a_rank_that_left_says_why(ranks: Ranks) -> None:
    ranks.add(0)
    ranks.add(1, ended="DataError: no such file", alive=False)
    ranks.add(2, ended="LostPeerError: The run stands still", alive=False)
    ranks.add(3, ended="stood still in data of step 2", alive=False)
    found = diagnosis(ranks.folder, 0, 4)
    assert "rank 1" in found
    assert "left (DataError: no such file)" in found
    assert "rank 2" not in found, "it left because of rank 1"
    assert "rank 3" not in found


def test_a_living_rank_that_is_behind(ranks: Ranks) -> None:
    ranks.add(0)
    ranks.add(1, phases=3)
    found = diagnosis(ranks.folder, 0, 2)
    assert found.startswith("rank 1 on ")
    assert found.endswith("is behind the others, last in data of step 2")


def test_nobody_is_blamed_where_all_are_alike(ranks: Ranks) -> None:
    ranks.add(0)
    ranks.add(1)
    assert diagnosis(ranks.folder, 0, 2) == "all 2 ranks are alive and stand in forward-backward of step 2"


def test_a_rank_without_a_file_and_more_than_fit(ranks: Ranks) -> None:
    ranks.add(0)
    found = diagnosis(ranks.folder, 0, 9)
    assert found.startswith("rank 1 has written no heartbeat; rank 2 ")
    assert found.endswith("; and 3 more ranks")


def test_the_exchange_in_which_others_wait_for_a_dead_rank(ranks: Ranks) -> None:
    """Also on a rank that is not in it, and where the rank that waits has ended meanwhile."""
    lost = "LostPeerError: The run stands still"
    ranks.add(0, ended=lost, alive=False, stands_in=(3, "combine backward"))
    ranks.add(1, alive=False, stands_in=(2, "dispatch"))
    ranks.add(2)
    found = diagnosis(ranks.folder, 2, 3)
    assert "no heartbeat for" in found
    assert found.endswith(
        "last in forward-backward of step 2, in block 2, dispatch (ep ranks 0, 1); "
        "rank 0 waits for it in block 3, combine backward (ep ranks 0, 1)"
    )


def test_a_living_rank_that_does_not_come_to_an_exchange(ranks: Ranks) -> None:
    ranks.add(0, stands_in=(3, "combine 2/4"))
    ranks.add(1)
    found = diagnosis(ranks.folder, 0, 2)
    assert found.startswith("rank 1 on ")
    assert "does not come to an exchange, last in forward-backward of step 2; rank 0 waits for it in block 3," in found
    assert "combine 2/4 (ep ranks 0, 1)" in found


def test_nobody_is_blamed_where_all_stand_in_the_exchange(ranks: Ranks) -> None:
    for rank in range(2):
        ranks.add(rank, stands_in=(3, "dispatch"))
    assert diagnosis(ranks.folder, 0, 2).startswith("all 2 ranks are alive and stand in ")


STANDS = """if True:
    import ctypes, sys, threading
    from pathlib import Path
    from megamoe.common import main
    from megamoe.training import watchdog
    from megamoe.training.heartbeat import beating
    main.LINGER_SECONDS = 0.0
    watchdog.READ_SECONDS = 1.0
    folder, how, limit = Path(sys.argv[1]), sys.argv[2], 0.2
    with beating(folder, 0, 0.05) as (pulse, heartbeat):
        ended = lambda error: (folder / "ended").write_text(error.what)
        with watchdog.Watchdog(heartbeat, folder, 0, 1, limit, ended):
            pulse.enter("data", step=7)
            if how == "moves":
                for _ in range(100):
                    threading.Event().wait(limit / 20)
                    pulse.tick()
                sys.exit(0)
            if how == "waits":
                threading.Event().wait()
            threading.Event().wait(limit / 2)  # the watchdog has looked once
            ctypes.PyDLL(None).sleep(1000)  # with Python's lock: no other thread runs any more
"""


def ends(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    (folder / "logs").mkdir()
    words = [sys.executable, "-c", STANDS, str(folder), how]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=60, env={**os.environ, **CPU_ONLY}, check=False
    )


def test_a_main_thread_that_stands_still_is_ended(tmp_path: Path) -> None:
    ended = ends(tmp_path, "waits")
    assert ended.returncode == EXIT_CODE
    assert "LostPeerError: The run stands still" in ended.stderr
    assert "this rank has stood in data of step 7 for" in ended.stderr
    assert "training.faults.hang_minutes" in ended.stderr
    assert "in wait" in (tmp_path / "logs" / "stacks_rank_0.txt").read_text()
    assert (tmp_path / "ended").read_text().startswith("The run stands still")


def test_also_one_that_never_gives_back_the_interpreter(tmp_path: Path) -> None:
    ended = ends(tmp_path, "holds")
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr


def test_one_that_moves_is_left_alone(tmp_path: Path) -> None:
    ended = ends(tmp_path, "moves")
    assert (ended.returncode, ended.stderr) == (0, "")
