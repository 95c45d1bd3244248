"""A layer in time: closed forms of the pipeline, what is hidden, and that more chunks cost nothing without latency."""

from dataclasses import replace

import pytest

from megamoe.config import chunks as rule
from megamoe.config.hardware import ExpertRates, HardwareConfig, LaunchRates, LinkRates, ProductRate
from megamoe.plan.events import Placed, makespan
from megamoe.plan.exchange import Place
from megamoe.plan.layer import Layer, LayerSize, Way
from megamoe.plan.limits import judge
from megamoe.plan.rates import COMPUTE, INSIDE, Rates

INSTANT = 1e30
ROWS, WIDTH, FFN = 1024, 64, 32
SIZE = LayerSize(
    tokens=ROWS // 2, width=WIDTH, ffn=FFN, experts=16, chosen=2, choices=ROWS, slots=ROWS, value_bytes=2, routed=False
)
TWO_RANKS = Place(ranks=2, on_node=2)
PASS = 6.0 * ROWS * WIDTH * FFN
"""FLOPs of one pass of all experts of a rank."""
SENT = ROWS / 2 * WIDTH * 2
"""Bytes of all rows one way, without gate weights."""


EDGES = "the exchange before the first and after the last expert"


def cluster(expert_seconds: float, exchange_seconds: float, **changes: object) -> HardwareConfig:
    """Where only experts and rows between ranks take time, so many seconds for all of a layer."""
    rate = (ProductRate(rows=1, flops_per_second=PASS / expert_seconds),)
    values = {
        "name": "by hand",
        "sources": ("made up",),
        "ranks_per_node": 2,
        "products": {"bf16": (ProductRate(rows=1, flops_per_second=INSTANT),)},
        "experts": {"bf16": ExpertRates(forward=rate, inputs=rate, weights=rate)},
        "memory_bytes_per_second": INSTANT,
        "launch": LaunchRates(seconds=0.0),
        "inside": LinkRates(latency_seconds=0.0, bytes_per_second=SENT / exchange_seconds),
    }
    return HardwareConfig.model_validate({**values, **changes})


def layer(chunks: int, hardware: HardwareConfig, size: LayerSize = SIZE, place: Place = TWO_RANKS) -> Layer:
    return Layer(size, place, Way("all_to_all", chunks, counted=False), Rates(hardware, "bf16"))


NEAR = 0.04
"""Gate weights travel with the rows: 4 bytes to 128."""


@pytest.mark.parametrize("chunks", [2, 4, 8])
@pytest.mark.parametrize("ahead", [True, False])
def test_where_experts_take_longest_only_the_ends_are_exposed(chunks: int, ahead: bool) -> None:
    """First dispatch, all experts, last combine."""
    found = layer(chunks, cluster(8.0, 2.0, launch=LaunchRates(seconds=0.0, ahead=ahead)))
    verdict = judge(found.forward)
    assert verdict.total == pytest.approx(8.0 + 2 * 2.0 / chunks, rel=NEAR)
    assert verdict.exposed == pytest.approx(verdict.edges) == pytest.approx(2 * 2.0 / chunks, rel=NEAR)
    assert verdict.hidden_share == pytest.approx(1 - 1 / chunks, rel=NEAR)
    # Backward, weight gradients of the last chunk run beside the last way home.
    backward = judge(found.backward)
    assert backward.total == pytest.approx(16.0 + 2.0 / chunks, rel=NEAR)


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_where_the_link_takes_longest_it_is_never_idle(chunks: int) -> None:
    """Rows there and back, one after the other."""
    verdict = judge(layer(chunks, cluster(1.0, 8.0)).forward)
    assert verdict.total == pytest.approx(16.0, rel=NEAR)
    assert verdict.exchanging == pytest.approx(verdict.total)
    assert verdict.exposed == pytest.approx(15.0, rel=NEAR)
    assert verdict.limit == ("the link inside a node" if chunks > 2 else EDGES)


def test_whole_nothing_is_hidden() -> None:
    found = layer(1, cluster(8.0, 2.0))
    for placed, passes in ((found.forward, 1), (found.backward, 2)):
        verdict = judge(placed)
        assert verdict.total == pytest.approx(passes * 8.0 + 2 * 2.0, rel=NEAR)
        assert verdict.hidden == pytest.approx(0.0, abs=1e-9)
        assert verdict.limit == EDGES


@pytest.mark.parametrize("expert, exchange", [(1.0, 1.0), (8.0, 1.0), (1.0, 8.0), (3.0, 2.0)])
def test_more_chunks_are_never_slower_without_latency(expert: float, exchange: float) -> None:
    found = [layer(chunks, cluster(expert, exchange)) for chunks in (1, 2, 4, 8)]
    totals = [makespan(each.forward) for each in found]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]
    totals = [makespan(each.backward) for each in found]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]


def test_with_latency_there_is_a_best_number() -> None:
    slow = LinkRates(latency_seconds=0.5, bytes_per_second=SENT / 2.0)
    hardware = cluster(8.0, 2.0, inside=slow)
    totals = {n: makespan(layer(n, hardware).forward) for n in (1, 2, 8)}
    assert totals[2] < totals[1]
    assert totals[2] < totals[8]


def busy(placed: list[Placed], kind: str) -> float:
    return sum(each.end - each.start for each in placed if each.task.kind == kind)


@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_chunks_do_all_of_the_work_and_send_all_of_the_rows(chunks: int) -> None:
    found = layer(chunks, cluster(8.0, 2.0))
    assert busy(found.forward, "experts") == pytest.approx(8.0)
    assert busy(found.backward, "gradients of rows") == pytest.approx(8.0)
    assert busy(found.backward, "gradients of weights") == pytest.approx(8.0)
    assert busy(found.forward, "combine") == pytest.approx(2.0)
    assert busy(found.backward, "combine backward") == pytest.approx(2.0)
    assert busy(found.forward, "dispatch") == pytest.approx(2.0 * (128 + 4) / 128)
    assert sum(found.parts) == 8


@pytest.mark.parametrize("chunks", [1, 4])
def test_rows_are_moved_before_and_after_travel_and_experts(chunks: int) -> None:
    """1 byte a second. T rows are read and R written where they leave, R read and written before and after the experts,
    R read and T written at home; in chunks, those that a chunk takes are read once more."""
    found = layer(chunks, cluster(8.0, 2.0, rows_bytes_per_second=1.0))
    leaving = SIZE.tokens * (chunks if chunks == 1 else 2) + ROWS
    rows = leaving + 4 * ROWS + SIZE.tokens + ROWS
    assert busy(found.forward, "move") == pytest.approx(rows * WIDTH * 2)
    assert busy(found.backward, "move") == pytest.approx(rows * WIDTH * 2)


def test_recomputed_nothing_comes_home() -> None:
    found = layer(4, cluster(8.0, 2.0))
    assert {each.task.kind for each in found.forward} - {each.task.kind for each in found.again} == {"combine"}
    assert makespan(found.again) < makespan(found.forward)


def test_alone_nothing_is_sent() -> None:
    found = layer(1, cluster(8.0, 2.0), place=Place(1, 1))
    assert {each.task.resource for each in [*found.forward, *found.backward] if each.end > each.start} == {COMPUTE}
    assert judge(found.forward).hidden_share == 1.0


def test_shared_experts_hide_the_first_dispatch() -> None:
    shared = replace(SIZE, shared_ffn=64)
    hardware = cluster(8.0, 2.0, products={"bf16": (ProductRate(rows=1, flops_per_second=1e7),)})
    without, beside = (judge(layer(2, hardware, size).forward) for size in (SIZE, shared))
    assert 6.0 * SIZE.tokens * WIDTH * 64 / 1e7 > 1.03  # longer than the first of two dispatches
    assert beside.edges == pytest.approx(without.edges / 2, rel=NEAR)


def test_a_slow_host_is_the_limit() -> None:
    verdict = judge(layer(8, cluster(0.1, 0.1, launch=LaunchRates(seconds=1.0))).forward)
    assert verdict.limit.startswith("launch gaps")


def test_computation_is_slowed_by_what_is_under_way() -> None:
    link = LinkRates(latency_seconds=0.0, bytes_per_second=SENT / 2.0, computation_kept=0.5)
    plain, slowed = (makespan(layer(4, cluster(8.0, 2.0, **change)).forward) for change in ({}, {"inside": link}))
    hidden = judge(layer(4, cluster(8.0, 2.0)).forward).hidden
    assert slowed == pytest.approx(plain + hidden / 2, rel=NEAR)  # half a second less done in every hidden one


def test_the_host_waits_for_the_numbers_of_rows() -> None:
    found = Layer(SIZE, TWO_RANKS, Way("all_to_all", 2), Rates(cluster(8.0, 2.0), "bf16"))
    counts = next(each for each in found.forward if each.task.kind == "counts")
    pack = next(each for each in found.forward if each.task.name == "pack 1/2")
    assert counts.task.resource == INSIDE
    assert pack.start >= counts.end > counts.start


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
@pytest.mark.parametrize("expert, exchange", [(8.0, 2.0), (1.0, 8.0), (2.0, 2.0)])
def test_the_rule_that_picks_chunks_says_the_same_of_simple_rates(chunks: int, expert: float, exchange: float) -> None:
    found = layer(chunks, cluster(expert, exchange))
    simple = rule.Layer(ROWS, WIDTH, FFN, SIZE.value_bytes, elsewhere=0.5)
    rates = rule.Rates(SENT / exchange, flops_per_second=PASS / expert)
    mine = makespan(found.forward) + makespan(found.backward)
    assert mine == pytest.approx(rule.seconds(simple, rates, chunks), rel=NEAR)
