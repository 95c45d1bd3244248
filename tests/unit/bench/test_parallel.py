"""The benchmark of layouts in a tiny size: what each layout trains on, and what the report holds."""

import json
import math

import pytest

from megamoe.bench.parallel import PLAIN, bench_parallel, layout_configs
from megamoe.bench.parallel_report import markdown
from megamoe.bench.train import TrainSettings
from megamoe.common.errors import MegamoeError, TopologyError

SIZE = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.ffn_size=16",
    "data.tokenizer.vocab_size=512",
    "moe.num_experts=4",
    "moe.expert_ffn_size=16",
    "data.seq_length=8",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
)


def test_layouts_are_compared_with_plain_data_parallelism() -> None:
    configs = layout_configs([], [*SIZE, "moe.router.type=balanced"], ["tp2-ep2", "ep2", "pp2"], 2)
    settings = TrainSettings(ranks=2, steps=1, rounds=2)
    report = json.loads(json.dumps(bench_parallel(configs, settings, "a remark")))
    results = {row["layout"]: row for row in report["results"]}
    assert list(results) == [PLAIN, "tp2-ep2", "ep2", "pp2"]
    assert results[PLAIN]["over_plain"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for row in results.values():
        assert row["tokens_per_second"]["min"] > 0
        assert abs(row["last_loss"] - math.log(512)) < 0.5  # a few steps on random tokens leave it where it starts
        assert all(axis["counted"] == axis["predicted"] > 0 for axis in row["axes"].values())
        assert all(axis["seconds"] > 0 for axis in row["axes"].values())
    assert {name: set(row["axes"]) for name, row in results.items()} == {
        PLAIN: {"dp"},
        "tp2-ep2": {"tp", "ep"},
        "ep2": {"ep", "dp"},
        "pp2": {"pp"},
    }
    assert [t["holds"] for t in report["targets"] if "off the prediction" in t["target"]] == [True] * 3
    assert report["conditions"]["note"] == "a remark"
    assert all(name in markdown(report) for name in results)


def test_a_rank_has_as_many_tokens_of_a_micro_batch_in_every_layout_that_the_batch_allows() -> None:
    configs = layout_configs([], [*SIZE, "training.global_batch_size=4"], ["tp2-ep2", "ep4", "tp2-pp2"], 4)
    sizes = {name: config.training.micro_batch_size for name, config in configs.items()}
    assert sizes == {PLAIN: 1, "tp2-ep2": 2, "ep4": 1, "tp2-pp2": 2}
    assert {config.parallel.zero_stage for config in configs.values()} == {1}
    alone = layout_configs([], [*SIZE, "training.micro_batch_size=2"], ["tp2"], 2)["tp2"]
    assert alone.training.micro_batch_size == 4


@pytest.mark.parametrize("layout, kind", [("tp2-ep4", TopologyError), ("tp4", MegamoeError), ("up2", TopologyError)])
def test_what_does_not_fit_is_refused_before_anything_starts(layout: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        layout_configs([], SIZE, [layout], 2 if layout == "tp2-ep4" else 4)
