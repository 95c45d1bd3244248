"""The measurement of rates in a tiny size: its file is a cluster that `plan` reads. No time is judged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe.bench.probe import PLAIN, RatesSettings
from megamoe.bench.rates import Found, bench_rates, fitted, hardware, markdown, write_cluster
from megamoe.common.errors import ConfigError
from megamoe.config.hardware import load_hardware

TINY = RatesSettings(ranks=2, tokens=32, hidden=16, ffn=8, experts=4, rounds=2, warmup=0)


def test_what_is_measured_is_a_cluster(tmp_path: Path) -> None:
    report = json.loads(json.dumps(bench_rates(TINY, note="a remark")))
    path = write_cluster(report, tmp_path / "new" / "cluster.yaml")
    cluster = load_hardware(path)
    assert cluster.ranks_per_node == 2
    assert not cluster.launch.ahead
    assert cluster.between is None
    assert any("a remark" in source for source in cluster.sources)
    assert [point.rows for point in cluster.products["fp32"]] == [8, 32, 64]
    assert [point.rows for point in cluster.experts["fp32"].weights] == [8, 32, 64]
    assert "a remark" in markdown(report)
    assert path.read_text(encoding="utf-8").startswith("# 2 ranks on ")


def test_latency_and_rate_of_a_line() -> None:
    sizes = [1e3, 1e4, 1e6]
    latency, rate = fitted(sizes, [1e-3 + size / 1e8 for size in sizes])
    assert latency == pytest.approx(1e-3)
    assert rate == pytest.approx(1e8)
    assert fitted([1.0, 2.0], [2.0, 1.0])[0] >= 0  # noise is no negative latency


def test_seconds_become_rates() -> None:
    """Two ranks of 32 tokens, K 2, D 16 in fp32: 4096 bytes per exchange of 64 rows, half of them to the other rank."""
    flops = 6.0 * 2 * 32 * 16 * 8
    seconds = {
        "product 32": 2.0 * 32 * 16 * 8 / 1e9,
        "forward 32": flops / 1e9,
        "inputs 32": flops / 2e9,
        "weights 32": flops / 3e9,
        "copy": 2 * 32 * 16 * 4 / 1e10,
        "rows": 3 * 32 * 16 * 4 / 1e9,
        "small": 200 * 1e-6,
        f"{PLAIN} 32": 1e-3 + 1024 / 1e7,
        f"{PLAIN} 64": 1e-3 + 2048 / 1e7,
    }
    cluster = hardware(TINY, Found(seconds, {PLAIN: (0.5, 0.75)}), PLAIN, "by hand", ["made up"])
    experts = cluster.experts["fp32"]
    assert cluster.products["fp32"][0].flops_per_second == pytest.approx(1e9)
    assert [getattr(experts, name)[0].flops_per_second for name in ("forward", "inputs", "weights")] == [1e9, 2e9, 3e9]
    assert cluster.memory_bytes_per_second == pytest.approx(1e10)
    assert cluster.rows_bytes_per_second == pytest.approx(1e9)
    assert cluster.launch.seconds == pytest.approx(1e-6)
    assert cluster.inside.bytes_per_second == pytest.approx(1e7)
    assert cluster.inside.latency_seconds == pytest.approx(1e-3)
    assert (cluster.inside.computation_kept, cluster.inside.exchange_kept) == (0.5, 0.75)


@pytest.mark.parametrize("change", [{"experts": 3}, {"tokens": 0}, {"top_k": 5}])
def test_sizes_that_make_no_layer(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="make no layer"):
        bench_rates(replace(TINY, **change))  # type: ignore[arg-type]
