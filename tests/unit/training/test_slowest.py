"""A rank's own work is told from its waiting, and the slowest rank is named."""

import time

import pytest
import torch
from torch import nn

from megamoe.testing.ranks import run_ranks
from megamoe.training.slowest import Slowest, Stopwatch, of_step

CPU = torch.device("cpu")


def work(seconds: float) -> None:
    """Keep the processor busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_work_counts_and_waiting_does_not() -> None:
    watch = Stopwatch(nn.Identity(), CPU)
    work(0.2)  # before the step
    watch.begin()
    work(0.05)
    time.sleep(0.2)
    assert 0.05 <= watch.seconds() < 0.1


def test_reading_counts_by_the_clock_and_once() -> None:
    watch = Stopwatch(nn.Identity(), CPU)
    watch.begin()
    with watch.reading():
        time.sleep(0.1)  # a slow disk
        work(0.05)
    work(0.05)
    assert (first := watch.seconds()) >= 0.2
    watch.begin()
    assert watch.seconds() < first / 2, "a step begins anew"


def working(seconds: float) -> float:
    """One rank works longer, and both meet."""
    watch, rank = Stopwatch(nn.Identity(), CPU), torch.distributed.get_rank()
    torch.distributed.barrier()
    watch.begin()
    work(seconds * (1 + rank))
    torch.distributed.barrier()
    return watch.seconds()


def test_waiting_for_another_rank_does_not_count() -> None:
    quick, slow = run_ranks(working, 2, 0.3)
    assert slow >= 0.6
    assert 0.3 <= quick < 0.45


def test_the_slowest_rank_is_named() -> None:
    watch = Stopwatch(nn.Identity(), CPU)
    slowest = Slowest(["a", "b", "b", "c"], watch)
    for busy in ([1.0, 1.0, 3.0, 1.0], [1.0, 1.2, 2.0, 1.0]):
        slowest.add(torch.tensor(busy))
    assert slowest.summary() == "slowest: rank 2 on b, 2.38 x the median of 4 ranks"
    values = of_step(torch.tensor([1.0, 2.0, 5.0]))
    assert values == {
        "slowest_rank": 2,
        "slowest_over_median": 2.5,
        "busy_seconds_max": 5.0,
        "busy_seconds_mean": pytest.approx(8 / 3),
    }


def test_one_rank_is_compared_with_nobody() -> None:
    slowest = Slowest(["a"], Stopwatch(nn.Identity(), CPU))
    slowest.add(torch.tensor([1.0]))
    assert (slowest.summary(), of_step(torch.tensor([1.0]))) == ("", {})
