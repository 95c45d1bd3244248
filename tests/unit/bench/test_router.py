"""The router benchmark in a tiny size: what it measures and what its report holds. No time is judged."""

import json
from dataclasses import replace

import pytest
import torch

from megamoe.bench import router as bench
from megamoe.bench.router import (
    CONTESTANTS,
    RESONANCE,
    TOPK,
    RouterContestant,
    RouterSettings,
    bench_router,
    build,
    forward_backward,
    markdown,
)

TINY = RouterSettings(tokens=16, hidden=8, experts=(2, 4), threads=1, rounds=2, warmup=0)
NAMES = [contestant.name for contestant in CONTESTANTS]


def test_the_report_has_every_contestant_at_every_size() -> None:
    report = json.loads(json.dumps(bench_router(TINY, note="a remark")))
    measured = {(row["dtype"], row["contestant"], row["experts"]) for row in report["results"]}
    assert report["left_out"] == []
    assert measured == {(dtype, name, experts) for dtype in ("fp32", "bf16") for name in NAMES for experts in (2, 4)}
    for row in report["results"]:
        for values in (row["seconds"], row["ratio_to_topk"]):
            assert 0 < values["min"] <= values["median"] <= values["max"]
        if row["contestant"] == TOPK:
            assert row["ratio_to_topk"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert report["targets"] == []  # nothing is promised for this size
    text = markdown(report)
    assert "a remark" in text
    assert all(name in text for name in NAMES)


def test_settings_that_do_not_exist_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = RouterContestant("of the future", {"capacity": {"mode": "of the future"}})
    monkeypatch.setattr(bench, "CONTESTANTS", (*CONTESTANTS, unknown))
    report = bench_router(replace(TINY, experts=(2,), dtypes=("fp32",), contestants=("of the future",)))
    assert [row["contestant"] for row in report["results"]] == [TOPK]
    assert [row["contestant"] for row in report["left_out"]] == ["of the future"]
    assert "capacity.mode" in report["left_out"][0]["reason"]
    assert "left out" in markdown(report)


def test_promises_are_judged_at_the_promised_size_only() -> None:
    rows = [
        {"dtype": "fp32", "contestant": RESONANCE, "experts": 8, "ratio_to_topk": {"median": 0.9}},
        {"dtype": "bf16", "contestant": RESONANCE, "experts": 64, "ratio_to_topk": {"median": 1.1}},
        {"dtype": "bf16", "contestant": RESONANCE, "experts": 16, "ratio_to_topk": {"median": 1.2}},
        {"dtype": "fp32", "contestant": TOPK, "experts": 8, "ratio_to_topk": {"median": 1.0}},
    ]
    judged = bench._targets(RouterSettings(), rows)
    assert [(t["limit"], t["value"], t["holds"]) for t in judged] == [(1.0, 0.9, True), (1.0, 1.1, False)]
    assert bench._targets(replace(RouterSettings(), tokens=512), rows) == []


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_turn_is_a_forward_and_a_backward_pass(contestant: RouterContestant, dtype: torch.dtype) -> None:
    rows_TD = torch.randn(64, 8).to(dtype).requires_grad_()
    router = build(contestant.config(experts=4, top_k=2), rows_TD)
    forward_backward(router, rows_TD, torch.randn(128))
    assert rows_TD.grad is not None
    assert all(parameter.grad is not None and parameter.dtype == dtype for parameter in router.parameters())
    assert all(buffer.dtype != torch.bfloat16 for buffer in router.buffers())


def test_resonance_is_measured_with_a_running_mean_and_its_own_scale() -> None:
    rows_TD = torch.randn(64, 16) + 1
    router = build(next(c for c in CONTESTANTS if c.name == RESONANCE).config(experts=4, top_k=2), rows_TD)
    torch.testing.assert_close(router.token_mean_D, rows_TD.mean(0))
    torch.testing.assert_close(router.scale(), torch.tensor(2 * 16**0.5))
