"""The benchmark of layouts in a tiny size: what each layout trains on, and what the report holds."""

import json
import math
import os

import pytest

from megamoe.bench import parallel
from megamoe.bench.parallel import CONTROL, PLAIN, bench_parallel, layout_configs
from megamoe.bench.parallel_ranks import ALONE, AMID_WORK, STEP, About, Turn, _pin, _Work
from megamoe.bench.parallel_report import markdown
from megamoe.bench.train import TrainSettings
from megamoe.common import env
from megamoe.common.errors import MegamoeError, TopologyError
from megamoe.testing.ranks import run_ranks

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
    assert list(results) == [PLAIN, CONTROL, "tp2-ep2", "ep2", "pp2"]
    assert report["pieces"] > 0
    assert results[PLAIN]["over_plain"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for row in results.values():
        assert row["tokens_per_second"]["min"] > 0
        assert abs(row["last_loss"] - math.log(512)) < 0.5  # a few steps on random tokens leave it where it starts
        assert all(axis["counted"] == axis["predicted"] > 0 for axis in row["axes"].values())
        assert all(axis["seconds"] > 0 for axis in row["axes"].values())
    assert {name: set(row["axes"]) for name, row in results.items()} == {
        PLAIN: {"dp"},
        CONTROL: {"dp"},
        "tp2-ep2": {"tp", "ep"},
        "ep2": {"ep", "dp"},
        "pp2": {"pp"},
    }
    assert [t["holds"] for t in report["targets"] if "off the prediction" in t["target"]] == [True] * 4
    assert report["conditions"]["note"] == "a remark"
    assert all(name in markdown(report) for name in results)


def test_a_rank_has_as_many_tokens_of_a_micro_batch_in_every_layout_that_the_batch_allows() -> None:
    configs = layout_configs([], [*SIZE, "training.global_batch_size=4"], ["tp2-ep2", "ep4", "tp2-pp2"], 4)
    sizes = {name: config.training.micro_batch_size for name, config in configs.items()}
    assert sizes == {PLAIN: 1, CONTROL: 1, "tp2-ep2": 2, "ep4": 1, "tp2-pp2": 2}
    assert {config.parallel.zero_stage for config in configs.values()} == {1}
    alone = layout_configs([], [*SIZE, "training.micro_batch_size=2"], ["tp2"], 2)["tp2"]
    assert alone.training.micro_batch_size == 4


@pytest.mark.parametrize("layout, kind", [("tp2-ep4", TopologyError), ("tp4", MegamoeError), ("up2", TopologyError)])
def test_what_does_not_fit_is_refused_before_anything_starts(layout: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        layout_configs([], SIZE, [layout], 2 if layout == "tp2-ep4" else 4)


def _turns(step: float, amid: float, alone: float) -> dict[str, list[list[Turn]]]:
    """Eight rounds of two ranks, each of which took as long."""
    return {
        kind: [[Turn(seconds, 2 * seconds, {}) for _ in range(2)]] * 8
        for kind, seconds in ((STEP, step), (AMID_WORK, amid), (ALONE, alone))
    }


@pytest.mark.parametrize("amid, rest, holds", [(1.1, 0.2, False), (1.29, 0.01, True), (1.5, -0.2, True)])
def test_what_messages_explain_is_what_they_take_longer_amid_work(amid: float, rest: float, holds: bool) -> None:
    configs = layout_configs([], SIZE, ["ep2"], 2)
    about = [About("default", 6.0, {}, {}, 0.01)] * 2
    turns = {PLAIN: _turns(1.0, 0.8, 0.2), "ep2": _turns(1.5, amid, 0.3)}
    plain, result = (parallel._result(name, configs[name], turns, about) for name in turns)
    assert result["unexplained_seconds"]["median"] == pytest.approx(rest)
    assert result["times"][STEP]["longer"]["median"] == pytest.approx(0.5)
    assert result["times"][ALONE]["cpu_seconds"]["median"] == pytest.approx(4 * 0.3)
    said = parallel._targets([plain, result])[0]
    assert (said["limit"], said["holds"]) == (pytest.approx(50.0), holds)


def test_there_is_as_much_work_amid_messages_as_a_step_has() -> None:
    steps, alone = ([Turn(9.0, cpu, {})] * 2 for cpu in (1.0, 0.2))
    assert parallel._pieces(steps, alone, [About("default", 6.0, {}, {}, 0.1)] * 2) == pytest.approx(8.0)
    work = _Work(8, layout_configs([], SIZE, [], 2)[PLAIN])
    for share in (0.25, 0.0, 0.25, 0.5):
        work.in_shares(0)(share)
    assert work._done == 0
    do = work.in_shares(10)
    done = []
    for share in (0.25, 0.0, 0.25, 0.5):
        do(share)
        done.append(work._done)
    assert done == [2, 2, 5, 10]


def _pinned() -> set[int]:
    _pin(env.rank(), 3)
    return os.sched_getaffinity(0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux pins processes")
def test_ranks_share_the_cpus_in_turn() -> None:
    cpus, ranks = sorted(os.sched_getaffinity(0)), run_ranks(_pinned, 3, init=False)
    assert set.union(*ranks) == set(cpus)
    for rank, own in enumerate(ranks):
        assert own == set(cpus[rank::3] or [cpus[rank % len(cpus)]])
