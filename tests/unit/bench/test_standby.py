"""Ranks that stand by: state between turns, and what breaks is told."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from megamoe.bench.standby import standing_by
from megamoe.common import env
from megamoe.testing.ranks import RankError

Counter = Callable[[int], tuple[int, int, int]]


@contextlib.contextmanager
def _counter(start: int) -> Iterator[Counter]:
    dist.init_process_group("gloo")
    total = torch.tensor([start])

    def turn(more: int) -> tuple[int, int, int]:
        if more < 0:
            raise ValueError(f"rank {env.rank()} cannot count down")
        total.add_(more)
        everyone = total.clone()
        dist.all_reduce(everyone)
        return env.rank(), int(everyone), os.getpid()

    yield turn
    dist.destroy_process_group()


@contextlib.contextmanager
def _broken(how: str) -> Iterator[Callable[[], None]]:
    if how == "setting up":
        raise OSError("no such model")

    def turn() -> None:
        if env.rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    yield turn


def test_groups_keep_what_they_have_between_turns_of_others() -> None:
    with standing_by(_counter, 2, 1, timeout=60.0) as ones, standing_by(_counter, 2, 100, timeout=60.0) as hundreds:
        turns = [group.turn(more) for more in (1, 2) for group in (ones, hundreds)]
    assert [[result[:2] for result in turn] for turn in turns] == [
        [(0, 4), (1, 4)],
        [(0, 202), (1, 202)],
        [(0, 8), (1, 8)],
        [(0, 206), (1, 206)],
    ]
    assert turns[0][0][2] == turns[2][0][2]
    assert len({pid for turn in turns for *_, pid in turn}) == 4


def test_an_error_in_a_turn_comes_with_the_rank_that_had_it() -> None:
    with pytest.raises(RankError, match="cannot count down"), standing_by(_counter, 2, 0, timeout=60.0) as group:
        group.turn(-1)


def test_an_error_in_setting_up_is_told_at_once() -> None:
    with pytest.raises(RankError, match="no such model"), standing_by(_broken, 2, "setting up", timeout=60.0):
        raise AssertionError("nobody is standing by")


def test_a_rank_that_dies_is_named() -> None:
    with (
        pytest.raises(RankError, match=r"rank 1 of 2 failed \(died\)"),
        standing_by(_broken, 2, "killed", timeout=60.0) as group,
    ):
        group.turn()


def test_a_turn_has_a_limit() -> None:
    with pytest.raises(TimeoutError, match=r"\[1\]"), standing_by(_broken, 2, "stuck", timeout=4.0) as group:
        group.turn()
