"""The one-sided exchange's ops with all ranks in one process: their memory is tensors of the same device, and each step
is done by all of them before the next one, so that nothing waits for what comes later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.ops import push
from megamoe.ops.plan import plan_rows
from megamoe.testing import assert_equal_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
SIZES = [  # ranks, L, C, K, D, tokens of each rank
    (2, 2, 70, 2, 64, (50, 33)),
    (4, 1, 40, 2, 37, (40, 0, 7, 19)),
    (3, 3, 9, 3, 4104, (9, 4, 1)),
    (1, 4, 20, 2, 72, (20,)),
    (2, 1, 5, 40, 16, (5, 3)),
]
ALL_SIZES = pytest.mark.parametrize("size", SIZES, ids=str)


@dataclass
class Rank:
    """One of the ranks that this process plays."""

    box: Tensor
    report: Tensor
    seen: Tensor
    memory: Tensor
    limit: float = 10.0

    def about(self, number: int) -> tuple[Any, ...]:
        return self.box, number, self.limit, self.report


def ranks_of(num_ranks: int, num_local: int, capacity: int, row_bytes: int, device: torch.device) -> list[Rank]:
    row_bytes = -(-row_bytes // 16) * 16
    ops = torch.ops.megamoe
    num_bytes = ops.window_bytes(push.box(0, num_local, capacity, row_bytes, [0] * num_ranks))
    memories = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_ranks)]
    for memory in memories:  # rows, which come last, are NaN until somebody writes them
        memory[-2 * num_ranks * num_local * capacity * row_bytes :] = 255
    flags = push.num_flags(num_ranks, num_local, capacity)
    return [
        Rank(
            push.box(rank, num_local, capacity, row_bytes, [memory.data_ptr() for memory in memories]),
            torch.zeros(push.REPORT, dtype=torch.int32, pin_memory=device.type == "cuda"),
            torch.zeros(2, flags, dtype=torch.int32, device=device),
            memories[rank],
        )
        for rank in range(num_ranks)
    ]


@dataclass
class Routed:
    experts_TK: Tensor
    place_TK: Tensor
    source_A: Tensor
    counts_E: Tensor


def routed(tokens: int, num_experts: int, capacity: int, choices: int, seed: int, device: torch.device) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    experts_TK = torch.randint(num_experts + 1, (tokens, choices), generator=generator)  # the last: nobody's
    planned = plan_rows(experts_TK, num_experts, None, torch.full((num_experts,), capacity), implementation="reference")
    experts_TK = experts_TK.masked_fill(planned.place_TK < 0, num_experts)
    return Routed(*(each.to(device) for each in (experts_TK, *planned)))


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def apart(rows: Tensor) -> Tensor:
    """The same rows inside of wider ones, not at multiples of 16 bytes."""
    wide = rows.new_full((rows.shape[0], rows.shape[1] + 3), torch.nan)
    wide[:, 1:-2] = rows
    return wide[:, 1:-2]


@pytest.fixture(autouse=True)
def _quiet(backend: torch.device) -> None:
    if backend.type == "cuda":
        torch.cuda.synchronize()


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_rows_go_there_and_home(
    backend: torch.device, dtype: torch.dtype, size: tuple[Any, ...], misaligned: bool
) -> None:
    num_ranks, num_local, capacity, choices, width, tokens = size
    ops, num_experts, num_rows = torch.ops.megamoe, num_ranks * num_local, num_ranks * num_local * capacity
    ranks = ranks_of(num_ranks, num_local, capacity, width * dtype.itemsize, backend)
    number = 0
    for turn in range(3):  # both buffers again
        plans = [routed(t, num_experts, capacity, choices, 10 * turn + r, backend) for r, t in enumerate(tokens)]
        x = [numbers(t, width, dtype=dtype, device=backend, seed=r) for r, t in enumerate(tokens)]
        w = [numbers(t, choices, dtype=torch.float32, device=backend, seed=r) for r, t in enumerate(tokens)]
        if misaligned:
            x = [apart(each) for each in x]
        number += 1
        for rank, plan in zip(ranks, plans, strict=True):
            ops.exchange_counts(plan.counts_E, *rank.about(number))
        all_counts = [ops.wait_counts(p.counts_E, *r.about(number)) for r, p in zip(ranks, plans, strict=True)]
        for counts_PE in all_counts:
            assert_equal_bits(counts_PE, torch.stack([plan.counts_E.int() for plan in plans]))
        counts_PE, first_PE = all_counts[0], push.first_rows(all_counts[0])
        found = [
            push.places_at_owners(p.experts_TK, p.place_TK, counts_PE, first_PE, r, num_rows)
            for r, p in enumerate(plans)
        ]
        places = [place for place, _ in found]
        for r, rank in enumerate(ranks):
            tables = plans[r].source_A, found[r][1], counts_PE, first_PE, choices
            ops.dispatch_push(x[r], w[r].flatten(), *tables, *rank.about(number))
        wanted_rows = push_all(x, places, num_rows)
        wanted_values = push.push_reference(w, places, num_rows)
        for r, rank in enumerate(ranks):
            rows, values = ops.wait_flags(x[r], True, num_rows, counts_PE, first_PE, rank.seen, *rank.about(number))
            assert_equal_bits(rows, wanted_rows[r])
            assert_equal_bits(values, wanted_values[r])
        number += 1
        y = [numbers(num_rows, width, dtype=dtype, device=backend, seed=50 + r) for r in range(num_ranks)]
        d_values = [numbers(num_rows, dtype=torch.float32, device=backend, seed=70 + r) for r in range(num_ranks)]
        for r, rank in enumerate(ranks):
            ops.publish_rows(apart(y[r]) if misaligned else y[r], d_values[r], counts_PE, first_PE, *rank.about(number))
        wanted_sums = push.pull_reference(y, places, num_rows)
        for r, rank in enumerate(ranks):
            sums, values = ops.combine_pull(y[r], True, places[r], counts_PE, first_PE, rank.seen, *rank.about(number))
            assert_equal_bits(sums, wanted_sums[r])
            of_choices = torch.cat(d_values)[places[r].clamp_min(0).long()].masked_fill(places[r] < 0, 0.0)
            assert_equal_bits(values, of_choices)
            assert not rank.report.any()


def push_all(x: list[Tensor], places: list[Tensor], num_rows: int) -> list[Tensor]:
    copies = [rows[:, None].expand(*place.shape, -1) for rows, place in zip(x, places, strict=True)]
    return push.push_reference(copies, places, num_rows)


def first_push(backend: torch.device, limit: float = 10.0) -> tuple[list[Rank], tuple[Any, ...], Tensor]:
    """Two ranks, rank 1's first expert with 40 rows of each."""
    ranks = ranks_of(2, 2, 40, 64, backend)
    for rank in ranks:
        rank.limit = limit
    counts_PE = torch.tensor([[0, 0, 40, 0]] * 2, dtype=torch.int32, device=backend)
    first_PE = push.first_rows(counts_PE)
    source = torch.arange(40, dtype=torch.int32, device=backend)
    start = torch.tensor([0, 0, 0, 40], dtype=torch.int32, device=backend)
    x = numbers(40, 16, dtype=torch.float32, device=backend, seed=1)
    return ranks, (x, None, source, start, counts_PE, first_PE, 1), x


def report_of(rank: Rank) -> list[int]:
    if rank.seen.is_cuda:
        torch.cuda.synchronize()
    return rank.report.tolist()


@pytest.mark.parametrize("before", [0, 2], ids=["first", "buffer used before"])
def test_a_wait_ends_at_its_limit_and_says_what_for(backend: torch.device, before: int) -> None:
    ranks, arguments, x = first_push(backend, limit=0.2)
    counts_PE, first_PE = tables = arguments[4:6]
    ops = torch.ops.megamoe
    for number in range(1, before + 1):
        for rank in ranks:
            ops.dispatch_push(*arguments, *rank.about(number))
        for rank in ranks:
            ops.wait_flags(x, False, 160, *tables, rank.seen, *rank.about(number))
    late = before + 1
    ops.dispatch_push(*arguments, *ranks[1].about(late))  # and rank 0 does not
    rows, _ = ops.wait_flags(x, False, 160, *tables, ranks[1].seen, *ranks[1].about(late))
    state, awaited, peer, expert, row, number, counted, wanted = report_of(ranks[1])
    assert (state, push.AWAITED[awaited], peer, expert, number) == (1, "rows", 0, 2, late)
    assert (row, counted) in {(0, 32 * (before // 2)), (32, 8 * (before // 2))}
    assert wanted - counted == (32 if row == 0 else 8)
    assert bool(rows[:40].isnan().all()), "nobody shall take it for rows"
    # What follows does not wait again, and nothing more leaves this rank.
    ops.publish_rows(x.new_ones(160, 16), None, counts_PE, first_PE, *ranks[1].about(late + 2))
    assert report_of(ranks[1])[1] == awaited
    assert not report_of(ranks[0])[0]


def test_nobody_writes_before_all_have_read(backend: torch.device) -> None:
    ranks, arguments, x = first_push(backend, limit=0.2)
    for number in (1, 2):
        torch.ops.megamoe.dispatch_push(*arguments, *ranks[0].about(number))
        torch.ops.megamoe.wait_flags(x, False, 160, *arguments[4:6], ranks[0].seen, *ranks[0].about(number))
    before = ranks[1].memory.clone()
    torch.ops.megamoe.dispatch_push(x + 1, *arguments[1:], *ranks[0].about(3))
    state, awaited, peer, *_ = report_of(ranks[0])
    assert (state, push.AWAITED[awaited], peer) == (1, "done", 1)
    assert torch.equal(ranks[1].memory, before)


def test_places_by_hand() -> None:
    """Two ranks of two experts: rows lie by expert, inside by rank."""
    counts_PE = torch.tensor([[1, 2, 0, 3], [4, 0, 5, 1]], dtype=torch.int32)
    first_PE = push.first_rows(counts_PE)
    assert first_PE.tolist() == [[0, 5, 0, 5], [1, 7, 0, 8]]
    experts_TK = torch.tensor([[1, 3], [0, 4], [1, 3], [3, 4]])
    place_TK = torch.tensor([[1, 3], [0, -1], [2, 4], [5, -1]], dtype=torch.int32)
    places, start_E = push.places_at_owners(experts_TK, place_TK, counts_PE, first_PE, 0, 100)
    assert start_E.tolist() == [0, 1, 3, 3]
    assert places.tolist() == [[5, 105], [0, -1], [6, 106], [107, -1]]


WRONG = {
    "a capacity too small": ("counts", lambda a: (*a[:4], a[4] + 1, *a[5:])),
    "a row too wide": ("x", lambda a: (a[0].repeat(1, 2), *a[1:])),
    "another dtype": ("source", lambda a: (*a[:2], a[2].long(), *a[3:])),
    "a choice beyond the end": ("source", lambda a: (*a[:2], a[2] + 1, *a[3:])),
    "too few assignments": ("start", lambda a: (*a[:2], a[2][:30], *a[3:])),
    "values of another dtype": ("values", lambda a: (a[0], a[0][:, 0].double(), *a[2:])),
    "no choices": ("choices", lambda a: (*a[:6], 0)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_refused_before_anything_is_written(kernels: Any, wrong: str) -> None:
    cpu = torch.device("cpu")
    ranks, arguments, _ = first_push(cpu)
    argument, change = WRONG[wrong]
    before = [rank.memory.clone() for rank in ranks]
    with pytest.raises(RuntimeError, match=f"megamoe::dispatch_push: argument {argument} cannot be used"):
        torch.ops.megamoe.dispatch_push(*change(arguments), *ranks[0].about(1))
    flags = [memory[: 2 * 2 * 4 * 4 + 1024] for memory in before]
    assert all(torch.equal(rank.memory[: len(f)], f) for rank, f in zip(ranks, flags, strict=True)), "no flag is raised"


def test_counts_beyond_the_capacity_are_refused(kernels: Any) -> None:
    ranks, *_ = first_push(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"exchange_counts: argument counts cannot be used(?s:.*)41 rows"):
        torch.ops.megamoe.exchange_counts(torch.tensor([0, 41, 0, 0]), *ranks[0].about(1))


@pytest.mark.parametrize("ranks", [0, push.MAX_RANKS + 1])
def test_a_box_says_how_many_ranks_are_possible(kernels: Any, ranks: int) -> None:
    with pytest.raises(RuntimeError, match=f"1 to {push.MAX_RANKS}"):
        torch.ops.megamoe.window_bytes(push.box(0, 1, 8, 16, [0] * ranks))


def test_shapes_without_data(backend: torch.device) -> None:
    from torch._subclasses import FakeTensorMode

    ranks, arguments, x = first_push(backend)
    torch.ops.megamoe.dispatch_push(*arguments, *ranks[0].about(1))
    torch.ops.megamoe.dispatch_push(*arguments, *ranks[1].about(1))
    rank, tables = ranks[1], arguments[4:6]
    real = torch.ops.megamoe.wait_flags(x, True, 160, *tables, rank.seen, *rank.about(1))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(each) for each in (x, *tables, rank.seen)]
        found = torch.ops.megamoe.wait_flags(fake[0], True, 160, *fake[1:], *rank.about(1))
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in real]
