"""The layer benchmark in a tiny size: what it measures and what its report holds. No time is judged."""

import json
from dataclasses import replace

import pytest
import torch

from megamoe.bench import layer as bench
from megamoe.bench.contestants import BROADCASTING, CONTESTANTS, DENSE, OURS, Contestant, LayerShape
from megamoe.bench.layer import LayerSettings, bench_layer, forward_backward, markdown

TINY = LayerSettings(
    tokens=16,
    hidden=8,
    ffn=12,
    experts=(2, 4),
    threads=1,
    rounds=2,
    warmup=0,
    contestants=(OURS, BROADCASTING, "deepspeed no drop"),
)
NAMES = (OURS, BROADCASTING, "deepspeed no drop")


def test_the_report_has_every_contestant_at_every_size() -> None:
    report = json.loads(json.dumps(bench_layer(TINY, note="a remark")))
    measured = {(row["dtype"], row["contestant"], row["experts"]) for row in report["results"]}
    sizes = {(DENSE, 0), *((name, experts) for name in NAMES for experts in (2, 4))}
    assert measured == {(dtype, *size) for dtype in ("fp32", "bf16") for size in sizes}
    for row in report["results"]:
        for values in (row["seconds"], row["ratio_to_dense"]):
            assert 0 < values["min"] <= values["median"] <= values["max"]
    grown = {(row["dtype"], row["contestant"], row["from"], row["to"]) for row in report["growth"]}
    assert grown == {(dtype, name, 2, 4) for dtype in ("fp32", "bf16") for name in NAMES}
    predicted = {(row["dtype"], row["experts"], row["predicted"]) for row in report["broadcast"]}
    assert predicted == {(dtype, *pair) for dtype in ("fp32", "bf16") for pair in ((2, 1.0), (4, 1.05))}
    assert report["targets"] == []  # nothing is promised for this size
    assert report["conditions"]["note"] == "a remark"
    assert report["conditions"]["packages"]["torch"] == torch.__version__
    text = markdown(report)
    assert "a remark" in text
    assert all(name in text for name, _ in sizes)


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Contestant("elsewhere", lambda shape: torch.nn.Identity(), "no_such_package", "")
    monkeypatch.setattr(bench, "CONTESTANTS", (*CONTESTANTS, absent))
    report = bench_layer(replace(TINY, experts=(2,), dtypes=("fp32",), contestants=("elsewhere",)))
    assert report["not_installed"] == [{"contestant": "elsewhere", "install": "pip install 'megamoe[bench]'"}]
    assert [row["contestant"] for row in report["results"]] == [DENSE]
    assert "not installed" in markdown(report)


def test_promises_are_judged_at_the_promised_size_only() -> None:
    settings = LayerSettings(experts=(8, 64))
    slow = {"dtype": "fp32", "contestant": OURS, "experts": 8, "ratio_to_dense": {"median": 1.16}}
    grown = {"dtype": "bf16", "contestant": OURS, "from": 8, "to": 64, "median": 1.2}
    cost = {"dtype": "fp32", "experts": 8, "predicted": 1.0, "median": 1.2}
    judged = bench._targets(settings, [slow], [grown], [cost])
    reached = [(t["limit"], t["value"], t["holds"]) for t in judged]
    assert reached == [(1.1, 1.16, False), (1.25, 1.2, True), (1.1, 1.2, False)]
    assert bench._targets(replace(settings, tokens=512), [slow], [grown], [cost]) == []


@pytest.mark.parametrize("name", [DENSE, OURS, BROADCASTING])
def test_a_turn_is_a_forward_and_a_backward_pass(name: str) -> None:
    contestant = next(c for c in CONTESTANTS if c.name == name)
    shape = LayerShape(hidden=8, ffn=12, experts=4, top_k=2)
    module = bench._build(contestant, shape, "fp32")
    rows_TD = torch.randn(16, 8, requires_grad=True)
    forward_backward(module, rows_TD, torch.randn(16, 8))
    assert rows_TD.grad is not None
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_dense_and_experts_cost_the_same_per_token() -> None:
    shape = LayerShape(hidden=8, ffn=12, experts=4, top_k=2)
    dense, ours = (next(c for c in CONTESTANTS if c.name == name).build(shape) for name in (DENSE, OURS))
    per_expert = sum(p.numel() for n, p in ours.named_parameters() if ".experts." in n) // shape.experts
    assert sum(p.numel() for p in dense.parameters()) == shape.top_k * per_expert
