"""How long exchanges took and how long the computation stood for them, as every rank records it, on real ranks.

The clock of the record is one for all processes of a machine, so moments of different ranks can be compared.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from megamoe.config import derive
from megamoe.model.initialise import initialise
from megamoe.parallel.exchanges import RECORD, LayerSeconds
from megamoe.parallel.groups import build_groups
from megamoe.parallel.link import Link
from megamoe.testing import assert_close, parity, run_ranks
from megamoe.testing.configs import tiny_config
from megamoe.training.job import build_engine
from megamoe.training.metrics import StepMetrics
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.step import train_step

RANKS = 2
LATE = 0.5
"""Seconds; what is compared with it are parts of it."""
LIMIT = timedelta(seconds=60)
NAMES = ("exchange_seconds", "exposed_seconds", "exposed_backward_seconds")


def compute(seconds: float) -> None:
    """Work on the main thread for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.ones(64, 64).sum()


def stands_in(phase: str) -> None:
    """Tell the other rank as soon as the main thread stands in an exchange of that phase."""

    def look() -> None:
        while (exchange := RECORD.waiting) is None or exchange.phase != phase:
            time.sleep(0.001)
        dist.distributed_c10d._get_default_store().set(f"stands in {phase}", "")

    threading.Thread(target=look, daemon=True).start()


def late_peer() -> tuple[dict[int, LayerSeconds], list[tuple[float, ...]]]:
    """Rank 0 stands in block 5's exchange already when rank 1 begins to compute for it; block 2's are prompt."""
    group, rows = dist.group.WORLD, torch.zeros(8, 4)
    assert group is not None
    prompt, late = Link(group, 2), Link(group, 5)
    prompt.exchange(rows, None, None, "dispatch")  # connections are made
    RECORD.begin_step(on_gpu=False)
    prompt.exchange(rows, None, None, "dispatch")
    if dist.get_rank() == 0:
        stands_in("combine backward")
    else:
        dist.distributed_c10d._get_default_store().wait(["stands in combine backward"], LIMIT)
        compute(LATE)
    late.exchange(rows, None, None, "combine backward")
    found = RECORD.end_step()
    assert found is not None
    assert RECORD.last is not None
    moments = [(e.began, e.arrived, e.waited, e.resumed) for e in RECORD.last.exchanges]
    return found, moments  # type: ignore[return-value]


def test_who_waits_for_a_late_peer_shows_it() -> None:
    (waits, mine), (late, others) = run_ranks(late_peer, RANKS)
    assert waits[5].exposed > 0.99 * LATE
    assert waits[5].exposed == waits[5].backward
    assert waits[2].backward == 0.0
    assert mine[1][3] > others[1][0], "rows cannot arrive before they leave"
    assert max(late[5].exposed, waits[2].exposed, late[2].exposed) < 0.5 * LATE, "nobody waited there"
    for seconds in (*waits.values(), *late.values()):
        assert 0.0 < seconds.exposed <= seconds.exchange, "an exchange without work beside it hides nothing"
        assert_close(torch.tensor(seconds.exposed), torch.tensor(seconds.exchange), rel=0.05, abs=0.1 * LATE)


def hidden() -> tuple[LayerSeconds, float, float]:
    """Work begins only once the rows are there, and goes on for long after."""
    group, rows = dist.group.WORLD, torch.zeros(8, 4)
    assert group is not None
    link = Link(group)
    link.exchange(rows, None, None, "dispatch")
    RECORD.begin_step(on_gpu=False)
    transfer = link.start(rows, None, None, "dispatch")
    (exchange,) = RECORD._step.exchanges  # type: ignore[union-attr]
    while exchange.arrived is None:
        time.sleep(0.001)
    seen = time.perf_counter()
    compute(LATE)
    transfer.wait()
    seconds = RECORD.end_step()
    assert seconds is not None
    assert isinstance(exchange.began, float)
    return seconds[0], seen - exchange.began, time.perf_counter() - exchange.began


def test_what_arrives_behind_the_computation_is_not_exposed() -> None:
    for seconds, until_seen, whole in run_ranks(hidden, RANKS):
        assert seconds.exchange <= until_seen, "until the arrival, not until the wait"
        assert seconds.exposed < 0.5 * LATE < 0.5 * whole


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
