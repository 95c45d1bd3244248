"""Exchanges over an artificially slow link: the rows of gloo, at the times of the model."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamoe.parallel.link import Link
from megamoe.testing import run_ranks
from megamoe.testing.slow_link import SlowLink, slow_group

LINK = SlowLink(bytes_per_second=10e6, latency=1e-3)
ROWS, WIDTH = 100, 250
"""Of fp32: 100 kB, of which 50 kB go to the other of two ranks; 5 ms, and 1 ms of latency."""
SKEW = 0.05
"""By which one rank is late in one exchange."""


def test_what_an_exchange_takes() -> None:
    assert LINK.seconds(50e3, 20e3) == pytest.approx(6e-3)
    assert LINK.seconds(20e3, 50e3) == pytest.approx(6e-3)
    assert LINK.seconds(0, 0) == 1e-3


def begun(rows: torch.Tensor, splits: list[int] | None, group: Any) -> Any:
    return dist.all_to_all_single(torch.empty_like(rows), rows, splits, splits, group=group, async_op=True)


def queue() -> dict[str, Any]:
    group, rank = slow_group([0, 1], LINK), dist.get_rank()
    rows = torch.full((ROWS, WIDTH), float(rank))
    dist.barrier()
    start = time.monotonic()
    works = [begun(rows, None, group) for _ in range(3)]
    works.append(begun(rows, [90, 10] if rank == 0 else [10, 90], group))
    for work in reversed(works):
        work.wait()
    asked_for = [max(float(start[0]) for start in work.all_starts) for work in works]
    ends = [work.ends for work in works]
    after = time.monotonic()
    if rank == 1:
        time.sleep(SKEW)
    asked = time.monotonic()
    late = begun(rows, None, group)
    late.get_future().wait()
    arrived = Link(group).exchange(rows, None, None, "dispatch")
    return {
        "asked for": asked_for,
        "ends": ends,
        "start": start,
        "after": after,
        "asked": asked,
        "late": late.ends,
        "done": all(work.is_completed() for work in [*works, late]),
        "arrived": arrived[:, 0].tolist(),
    }


@cache
def queues() -> list[dict[str, Any]]:
    return run_ranks(queue, 2)


def test_exchanges_are_carried_one_after_the_other() -> None:
    first, second = queues()
    assert first["ends"] == second["ends"]
    free = 0.0
    for asked, end, seconds in zip(first["asked for"], first["ends"], (6e-3, 6e-3, 6e-3, 2e-3), strict=True):
        free = max(free, asked) + seconds  # of the last one, a tenth of the rows leaves
        assert end == pytest.approx(free, abs=1e-9)
    for rank in (first, second):
        assert first["asked for"][0] >= rank["start"]
        assert rank["after"] >= first["ends"][-1]
        assert rank["done"]


def test_an_exchange_begins_when_the_last_rank_asks_for_it() -> None:
    first, second = queues()
    assert first["late"] == second["late"] >= max(first["asked"], second["asked"]) + 6e-3
    assert second["asked"] >= first["ends"][-1] + SKEW


def test_the_rows_are_those_of_gloo() -> None:
    for rank in queues():
        assert rank["arrived"] == [0.0] * 50 + [1.0] * 50


def a_rank_dies() -> None:
    group = slow_group([0, 1], LINK)
    dist.barrier()
    if dist.get_rank() == 1:
        raise SystemExit(3)
    begun(torch.zeros(ROWS, WIDTH), None, group).wait()


def test_nobody_waits_for_a_rank_that_is_gone() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed \(SystemExit\)"):
        run_ranks(a_rank_dies, 2, timeout=60)
