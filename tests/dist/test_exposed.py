"""How long exchanges took and how long the computation stood for them, as every rank records it, on real ranks.

The clock of the record is one for all processes of a machine, so moments of different ranks can be compared. What is
compared holds however long anything takes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megamoe.config import derive
from megamoe.model.initialise import initialise
from megamoe.parallel.exchanges import RECORD, Exchange, LayerSeconds
from megamoe.parallel.groups import build_groups
from megamoe.parallel.link import Link
from megamoe.testing import assert_close, parity, run_ranks
from megamoe.testing.configs import tiny_config
from megamoe.training.job import build_engine
from megamoe.training.metrics import StepMetrics
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.step import train_step

RANKS = 2
LATE = 0.1
"""Seconds of a delay that a test makes."""
SAME = 1e-6
"""Seconds that sums of the same moments may differ by."""
LIMIT = timedelta(seconds=60)
NAMES = ("exchange_seconds", "exposed_seconds", "exposed_backward_seconds")


def compute(seconds: float) -> None:
    """Work on the main thread for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.ones(64, 64).sum()


class Told:
    """Work that tells the other rank as soon as the computation stands waiting for it."""

    def __init__(self, work: dist.Work) -> None:
        self.work = work

    def wait(self) -> None:
        dist.distributed_c10d._get_default_store().set("stands", "")
        self.work.wait()


class Seen(NamedTuple):
    """Of the late exchange on one rank. The moments are in the order of `Exchange.moments`."""

    by_block: dict[int, LayerSeconds]
    moments: tuple[float, float, float, float, float]
    told: float
    """When the late rank began to compute: it knew that the other one stands."""


def late_peer() -> Seen:
    """Rank 0 stands in block 5's exchange already when rank 1 begins to compute for it; block 2's are prompt."""
    group, rows = dist.group.WORLD, torch.zeros(8, 4)
    assert group is not None
    prompt, late, told = Link(group, 2), Link(group, 5), 0.0
    prompt.exchange(rows, None, None, "dispatch")  # connections are made
    RECORD.begin_step(on_gpu=False)
    prompt.exchange(rows, None, None, "dispatch")
    if dist.get_rank() == 1:
        dist.distributed_c10d._get_default_store().wait(["stands"], LIMIT)
        told = time.perf_counter()
        compute(LATE)
    transfer = late._start(rows, None, None, "combine backward")
    if dist.get_rank() == 0:
        transfer._work = Told(transfer._work)  # type: ignore[assignment]
    transfer.wait()
    found = RECORD.end_step()
    assert found is not None
    assert RECORD.last is not None
    moments = RECORD.last.exchanges[1].moments(RECORD.last.clock)
    assert moments is not None
    return Seen(found, moments, told)


def test_who_waits_for_a_late_peer_shows_it() -> None:
    waits, late = run_ranks(late_peer, RANKS)
    assert waits.by_block[5].exposed > 0.99 * LATE
    assert waits.by_block[5].exposed == waits.by_block[5].backward
    assert waits.by_block[2].backward == late.by_block[2].backward == 0.0
    began, _, _, _, resumed = late.moments
    assert waits.moments[3] < late.told, "it stood already"
    assert waits.moments[4] > began, "rows cannot arrive before they leave"
    assert began - late.told > 0.99 * LATE
    assert late.by_block[5].exposed <= resumed - began + SAME, "whoever is late did not wait before"
    for rank in (waits, late):
        began, launched, arrived, waited, resumed = rank.moments
        assert arrived == resumed, "nothing computes beside it"
        seconds = rank.by_block[5]
        assert seconds.exchange - seconds.exposed == pytest.approx(waited - launched, abs=SAME)
        assert all(0.0 < seconds.exposed <= seconds.exchange + SAME for seconds in rank.by_block.values())


def hidden() -> tuple[LayerSeconds, tuple[float, ...], float]:
    """Work begins only once the rows are there, and goes on for long after."""
    group, rows, there = dist.group.WORLD, torch.zeros(8, 4), threading.Event()
    assert group is not None
    link, original = Link(group), Exchange._on_arrival
    link.exchange(rows, None, None, "dispatch")
    RECORD.begin_step(on_gpu=False)

    def on_arrival(exchange: Exchange, future: Any) -> None:
        original(exchange, future)
        there.set()

    Exchange._on_arrival = on_arrival  # type: ignore[method-assign]
    transfer = link.start(rows, None, None, "dispatch")
    assert there.wait(LIMIT.total_seconds())
    seen = time.perf_counter()
    compute(LATE)
    transfer.wait()
    seconds = RECORD.end_step()
    assert seconds is not None
    assert RECORD.last is not None
    moments = RECORD.last.exchanges[0].moments(RECORD.last.clock)
    assert moments is not None
    return seconds[0], moments, seen


def test_what_arrives_behind_the_computation_is_not_exposed() -> None:
    for seconds, (began, _, arrived, waited, resumed), seen in run_ranks(hidden, RANKS):
        assert began < arrived <= seen < waited, "its wait begins long after the arrival"
        assert seconds.exchange == pytest.approx(arrived - began, abs=SAME), "until the arrival, not until the wait"
        assert seconds.exposed <= resumed - began - 0.99 * LATE, "the computation did not stand meanwhile"


def refuse(*_: Any, **__: Any) -> None:
    """As NCCL does where its communicator is broken; gloo says everything in the wait."""
    raise RuntimeError("no connection")


def cannot_begin() -> tuple[str, str]:
    group, rows = dist.group.WORLD, torch.zeros(8, 4)
    assert group is not None
    dist.all_to_all_single = refuse
    try:
        Link(group, 5).start(rows, None, None, "combine backward")
    except RuntimeError as error:
        return str(error), str(RECORD.waiting)
    return "nothing", ""


def test_an_exchange_that_cannot_begin_is_named() -> None:
    for said, waiting in run_ranks(cannot_begin, RANKS):
        assert waiting == "block 5, combine backward (ep ranks 0, 1)"
        assert said == f"{waiting}: no connection"


ROWS = ((16, 48), (8, 56))
"""From and to each rank."""


def many_at_a_time() -> tuple[LayerSeconds, float, list[tuple[int, int]]]:
    group, rows = dist.group.WORLD, torch.zeros(64, 16)
    assert group is not None
    link, me = Link(group), dist.get_rank()
    send, receive = list(ROWS[me]), [sent[me] for sent in ROWS]
    link.exchange(rows, send, receive, "dispatch")
    RECORD.begin_step(on_gpu=False)
    began = time.perf_counter()
    transfers = [link.start(rows, send, receive, f"dispatch {number}/8") for number in range(1, 9)]
    for transfer in transfers:
        transfer.wait()
    whole = time.perf_counter() - began
    seconds = RECORD.end_step()
    assert seconds is not None
    assert RECORD.last is not None
    return seconds[0], whole, [(exchange.sent_bytes, exchange.received_bytes) for exchange in RECORD.last.exchanges]


def test_exchanges_at_the_same_time_count_once() -> None:
    for me, (seconds, whole, num_bytes) in enumerate(run_ranks(many_at_a_time, RANKS)):
        assert 0.0 < seconds.exposed <= whole
        assert 0.0 < seconds.exchange <= whole
        assert num_bytes == [(ROWS[me][1 - me] * 16 * 4, ROWS[1 - me][me] * 16 * 4)] * 8, "of other ranks only"


# --- In training

EVERY_BLOCK = {"counts": 1, "dispatch": 1, "combine": 1, "combine backward": 1, "dispatch backward": 1}
AGAIN = {**EVERY_BLOCK, "counts": 2, "dispatch": 2}
"""Recomputed; up to what the gradients need, for which nothing has to come home."""


def trained(
    overrides: tuple[str, ...],
) -> tuple[StepMetrics, dict[int, LayerSeconds], Counter[tuple[int, str]], int]:
    """The second of two steps."""
    config = tiny_config(*overrides)
    groups = build_groups(topology_of(config.parallel, dist.get_world_size()))
    runtime = Runtime(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), groups)
    engine = build_engine(config, runtime, 320, partial(initialise, config=config.model, seed=1))
    micro_steps = derive.accumulation_steps(config, runtime.world_size)
    for step in range(2):
        own = range(groups.dp.place, micro_steps * groups.dp.size, groups.dp.size)
        result, _ = train_step(engine, [parity.random_tokens(config, step, number) for number in own], 1.0)
    assert RECORD.last is not None
    phases = Counter((exchange.layer, exchange.phase) for exchange in RECORD.last.exchanges)
    return result, RECORD.last.seconds(), phases, micro_steps


@pytest.mark.parametrize(
    "ranks, overrides, phases",
    [
        (2, ("parallel.ep=2", "training.recompute=full"), AGAIN),
        pytest.param(2, ("parallel.ep=2",), EVERY_BLOCK, marks=pytest.mark.thorough),
        pytest.param(2, ("parallel.ep=2", "training.recompute=moe"), AGAIN, marks=pytest.mark.thorough),
        (4, ("parallel.ep=2", "parallel.pp=2"), EVERY_BLOCK),
    ],
)
def test_the_metrics_of_a_step(ranks: int, overrides: tuple[str, ...], phases: dict[str, int]) -> None:
    """Of every block, the mean over the ranks that have it; and what every rank waited."""
    found = run_ranks(trained, ranks, (*overrides, "moe.dispatcher=all_to_all"))
    own = {rank: seconds for rank, (_, seconds, _, _) in enumerate(found)}
    values, exposed_P = found[0][0].values, found[0][0].exposed_P
    for layer in range(2):
        having = [seconds[layer] for seconds in own.values() if layer in seconds]
        assert len(having) == 2, "two ranks have each block"
        for place, name in enumerate(NAMES):
            mean = sum(seconds[place] for seconds in having) / len(having)
            assert_close(values[f"layers.{layer}.{name}"], torch.tensor(mean), rel=1e-5, name=f"{layer} {name}")
        assert all(0.0 < seconds.backward < seconds.exposed <= seconds.exchange * 1.001 for seconds in having)
    for rank, seconds in own.items():
        assert_close(exposed_P[rank], torch.tensor(sum(of.exposed for of in seconds.values())), rel=1e-5, name="rank")
    for result, seconds, seen, micro_steps in found:
        expected = {(layer, phase): micro_steps * often for layer in seconds for phase, often in phases.items()}
        assert seen == expected
        assert torch.equal(result.exposed_P, exposed_P)
        shares = result.exposed(10.0)
        assert_close(torch.tensor(shares["exchange.exposed_share"]), exposed_P.mean() / 10, rel=1e-6)
        assert_close(torch.tensor(shares["exchange.exposed_share_least"]), exposed_P.min() / 10, rel=1e-6)


def test_nothing_is_said_where_nothing_is_exchanged() -> None:
    (result, seconds, phases, _), _ = run_ranks(trained, 2, ("parallel.ep=1", "parallel.tp=1"))
    assert (seconds, phases, result.exposed(1.0)) == ({}, {}, {})
    assert not any(name.endswith(NAMES) for name in result.values)
