"""The benchmark of hidden exchange in a tiny size: what it measures, and how it judges. No time is judged but that it
holds what it must: the sleeps of the slow link."""

import json

import pytest

from megamoe.bench.overlap import SLOW, OverlapSettings, _targets, bench_overlap, markdown, predict
from megamoe.bench.probe import PLAIN, RatesSettings
from megamoe.common.errors import ConfigError
from megamoe.config.hardware import HardwareConfig, LaunchRates, LinkRates, ProductRate
from megamoe.plan.rates import Rates

TINY = RatesSettings(ranks=2, tokens=32, hidden=16, ffn=8, experts=4, rounds=2, warmup=0)
BYTES_PER_SECOND, LATENCY = 1e6, 1e-3
LEAST = 5 * LATENCY + 4 * 32 * 16 * 4 / BYTES_PER_SECOND
"""Seconds of four exchanges of 32 rows to the other rank and one of numbers."""


def test_every_link_and_number_of_chunks_is_measured_and_predicted() -> None:
    report = json.loads(json.dumps(bench_overlap(OverlapSettings(TINY, (2,), BYTES_PER_SECOND, LATENCY), "a remark")))
    results = {(row["link"], row["chunks"]): row for row in report["results"]}
    assert set(results) == {(link, chunks) for link in (PLAIN, SLOW) for chunks in (1, 2)}
    for row in results.values():
        assert row["seconds"]["min"] > 0
        assert row["predicted_seconds"] > row["predicted_exposed_seconds"] > 0
    assert results[SLOW, 1]["over_whole"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert results[SLOW, 1]["seconds"]["min"] >= LEAST
    assert results[SLOW, 1]["seconds"]["min"] > results[SLOW, 1]["exposed_seconds"]["min"] > 0
    assert "a remark" in markdown(report)


def test_what_is_predicted_where_only_the_link_takes_time() -> None:
    cluster = HardwareConfig(
        name="by hand",
        sources=("made up",),
        ranks_per_node=2,
        products={TINY.dtype: (ProductRate(rows=1, flops_per_second=1e30),)},
        memory_bytes_per_second=1e30,
        launch=LaunchRates(seconds=0.0),
        inside=LinkRates(latency_seconds=LATENCY, bytes_per_second=BYTES_PER_SECOND),
    )
    found = predict(TINY, 1, Rates(cluster, TINY.dtype))
    assert found.exposed == pytest.approx(found.total)
    assert found.exposed == pytest.approx(LEAST, rel=0.1), "gate weights and numbers of rows besides"
    assert found.exposed > LEAST


def row(link: str, chunks: int, error: float, hidden: float | None = None, ratio: float = 1.0) -> dict:  # type: ignore[type-arg]
    return {
        "link": link,
        "chunks": chunks,
        "predicted_over_measured": 1 + error,
        "hidden_of_hideable": hidden,
        "over_whole": {"median": ratio},
    }


def test_promises_are_judged() -> None:
    rows = [row(PLAIN, 1, 0.1), row(SLOW, 1, -0.2), row(SLOW, 4, 0.1, 0.7, 0.9), row(SLOW, 2, 0.1, 0.9, 1.1)]
    judged = [(t["target"], t["holds"]) for t in _targets(rows)]
    assert [holds for name, holds in judged if "prediction" in name] == [True, False, True, True]
    assert [holds for name, holds in judged if "hidden" in name] == [False, True]
    assert [holds for name, holds in judged if "over that" in name] == [True, False]


@pytest.mark.parametrize("chunks", [(), (1,), (3,)])
def test_chunks_that_there_cannot_be(chunks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="cannot be compared"):
        bench_overlap(OverlapSettings(TINY, chunks))
