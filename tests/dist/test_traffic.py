"""Bytes sent per step and axis: what the configuration predicts, against what the ranks send, to the byte."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest

from megamoe.config import derive
from megamoe.config.traffic import sent_by_stage, totals
from megamoe.data.batch import Batch
from megamoe.model.decoder import ModelOutput
from megamoe.model.initialise import initialise
from megamoe.parallel.collectives import world_size
from megamoe.parallel.groups import build_groups
from megamoe.testing.configs import tiny_config
from megamoe.testing.parity import CPU, random_tokens
from megamoe.testing.ranks import run_ranks
from megamoe.testing.traffic import CONTROL, Traffic, replay
from megamoe.training.job import build_engine
from megamoe.training.setup import Runtime, topology_of

# A dense block, then MoE blocks with a shared expert, all of widths that are no powers of two.
THOROUGH = pytest.mark.thorough
MODEL = (
    "model.num_layers=3",
    "model.ffn_size=40",
    "moe.first_k_dense=1",
    "moe.num_shared_experts=1",
    "training.micro_batch_size=2",
)
BALANCED = ("moe.router.type=balanced",)
TOPK = ("moe.router.type=topk",)
RESONANCE = ("moe.router.type=resonance",)
STATIC = ("moe.capacity.mode=static", "moe.capacity.factor=1.0")
BF16 = ("training.precision=bf16",)
LAYOUTS = {
    "dp2": (2, ()),
    "ep2": (2, ("parallel.ep=2",)),
    "ep4": (4, ("parallel.ep=4",)),
    "tp2": (2, ("parallel.tp=2",)),
    "tp2-ep2": (2, ("parallel.tp=2", "parallel.ep=2")),
    "tp2-ep2-dp2": (4, ("parallel.tp=2", "parallel.ep=2")),
    "etp2": (2, ("parallel.etp=2",)),
    "tp2-ep2-etp2": (4, ("parallel.tp=2", "parallel.ep=2", "parallel.etp=2")),
    "cp2-ep2": (2, ("parallel.cp=2", "parallel.ep=2")),
    "cp2-ep2-dp2": (4, ("parallel.cp=2", "parallel.ep=2")),
    "pp2": (2, ("parallel.pp=2",)),
    "pp3": (3, ("parallel.pp=3", "moe.first_k_dense=0")),
    "pp2-tp2-ep2": (4, ("parallel.pp=2", "parallel.tp=2", "parallel.ep=2")),
}


class Counted(NamedTuple):
    """One optimizer step on one rank."""

    stage: int
    sent: dict[str, float]
    """Bytes by axis."""
    dispatched: float
    """Bytes that the dispatchers say they sent forward."""
    sent_again: dict[str, float]
    """By kind of operation, how much more a replay sent."""
    shares: list[float]
    """Of the work that a replay was asked to do between messages."""


def count(overrides: tuple[str, ...]) -> Counted:
    """The second optimizer step: the first one also settles shapes and traces."""
    config = tiny_config(*overrides)
    groups = build_groups(topology_of(config.parallel, world_size()))
    runtime = Runtime(groups.rank, groups.topology.world_size, CPU, groups)
    fill = partial(initialise, config=config.model, seed=config.training.seed)
    engine = build_engine(config, runtime, derive.vocab_size(config), fill)
    steps = derive.accumulation_steps(config, runtime.world_size)
    outputs: list[ModelOutput] = []

    def batches(step: int) -> list[Batch]:
        return [random_tokens(config, step, number * groups.dp.size + groups.dp.place) for number in range(steps)]

    engine.train(batches(0), 1.0, lambda output: None)
    with Traffic(groups) as traffic:
        engine.train(batches(1), 1.0, outputs.append)
    said = (aux.metrics["sent_bytes"][0] for output in outputs for aux in output.layers if "sent_bytes" in aux.metrics)
    shares: list[float] = []
    with Traffic(groups) as repeated:
        replay(traffic.messages, shares.append)
    again = repeated_sizes(traffic, repeated)
    return Counted(groups.pp.place, traffic.sent(), float(sum(map(float, said))), again, shares)


def repeated_sizes(traffic: Traffic, repeated: Traffic) -> dict[str, float]:
    """Bytes by kind of operation of a replay, less those of the step that it replays."""
    sizes: dict[str, float] = {}
    for sign, messages in ((1.0, repeated.messages), (-1.0, traffic.messages)):
        for message in messages:
            sizes[message.kind] = sizes.get(message.kind, 0.0) + sign * message.sent
    return sizes


def run(layout: str, *settings: str) -> tuple[list[Counted], list[dict[str, float]]]:
    """Of every rank what was counted, and what is predicted."""
    ranks, degrees = LAYOUTS[layout]
    overrides = (*MODEL, *degrees, *settings)
    counted = run_ranks(count, ranks, overrides)
    stages = sent_by_stage(tiny_config(*overrides), ranks)
    return counted, [totals(stages[rank.stage]) for rank in counted]


def assert_equal(counted: dict[str, float], predicted: dict[str, float], *but: str) -> None:
    assert {a: v for a, v in counted.items() if a not in (CONTROL, *but)} == {
        a: v for a, v in predicted.items() if a not in but
    }
    assert counted.get(CONTROL, 0.0) < 1000


@pytest.mark.parametrize(
    "layout, settings",
    [
        *(pytest.param("dp2", (f"parallel.zero_stage={stage}",), id=f"dp2-zero{stage}") for stage in range(4)),
        pytest.param(
            "dp2",
            (
                "parallel.zero_stage=3",
                "deepspeed_extra={zero_optimization: {stage3_param_persistence_threshold: 1000}}",
            ),
            id="dp2-zero3-gathers",
        ),
        pytest.param(
            "dp2", ("parallel.zero_stage=2", "parallel.offload_optimizer=true"), id="dp2-zero2-offload", marks=THOROUGH
        ),
        pytest.param("dp2", ("parallel.zero_stage=1", *BF16), id="dp2-zero1-bf16"),
        pytest.param("dp2", ("parallel.zero_stage=2", *BF16), id="dp2-zero2-bf16", marks=THOROUGH),
        pytest.param("ep2", ("parallel.zero_stage=2",), id="ep2-zero2", marks=THOROUGH),
        pytest.param("ep2", STATIC, id="ep2-padded"),
        pytest.param("ep2", (*STATIC, "moe.dispatcher=all_to_all"), id="ep2-static-ragged", marks=THOROUGH),
        pytest.param("ep4", (), id="ep4"),
        pytest.param("etp2", ("training.recompute=moe",), id="etp2-recompute-moe"),
        pytest.param("tp2", (), id="tp2"),
        pytest.param("tp2", ("model.num_kv_heads=1",), id="tp2-one-kv-head", marks=THOROUGH),
        pytest.param("tp2-ep2", BF16, id="tp2-ep2-bf16"),
        pytest.param("tp2-ep2-dp2", (), id="tp2-ep2-dp2", marks=THOROUGH),
        pytest.param("tp2-ep2-etp2", (), id="tp2-ep2-etp2"),
        pytest.param("cp2-ep2-dp2", (), id="cp2-ep2-dp2", marks=THOROUGH),
        pytest.param("cp2-ep2", ("model.num_kv_heads=1",), id="cp2-ep2-one-kv-head", marks=THOROUGH),
        pytest.param("pp2", (), id="pp2"),
        pytest.param("pp2", BF16, id="pp2-bf16", marks=THOROUGH),
        pytest.param("pp3", (), id="pp3", marks=THOROUGH),
        pytest.param("pp2-tp2-ep2", (), id="pp2-tp2-ep2"),
        *(
            pytest.param(layout, (f"training.recompute={again}",), id=f"{layout}-recompute-{again}", marks=THOROUGH)
            for layout in ("tp2-ep2-etp2", "cp2-ep2")
            for again in ("full", "attention", "moe")
        ),
    ],
)
def test_predicted_is_counted(layout: str, settings: tuple[str, ...]) -> None:
    """With even load, which the balanced router gives: everything."""
    for counted, predicted in zip(*run(layout, *BALANCED, *settings), strict=True):
        assert_equal(counted.sent, predicted)


@pytest.mark.parametrize(
    "layout, settings",
    [
        pytest.param("tp2-ep2", TOPK, id="tp2-ep2"),
        pytest.param("tp2-ep2", (*RESONANCE, "training.recompute=moe"), id="tp2-ep2-resonance-recompute-moe"),
        pytest.param(
            "cp2-ep2-dp2", (*TOPK, "training.recompute=full"), id="cp2-ep2-dp2-recompute-full", marks=THOROUGH
        ),
        pytest.param("tp2-ep2-etp2", TOPK, id="tp2-ep2-etp2"),
        pytest.param("ep4", RESONANCE, id="ep4"),
        pytest.param(
            "ep2",
            (*RESONANCE, "moe.router.scope=ep_group", *STATIC),
            id="ep2-experts-choose-over-ranks",
            marks=THOROUGH,
        ),
        pytest.param("ep2", (*TOPK, "moe.broadcast={threshold: fixed, entropy: 0.5}"), id="ep2-broadcast"),
    ],
)
def test_rows_to_experts_are_those_that_were_routed(layout: str, settings: tuple[str, ...]) -> None:
    """Whatever the load is, all but the rows' exchange is exact; and these are what the dispatchers say, twice.

    Backward sends what forward received and the other way round, so over all ranks it is as much; numbers of rows are
    sent forward only. A pass that is run again sends rows to the experts again, and none back.
    """
    overrides = (*MODEL, *LAYOUTS[layout][1], *settings)
    config = tiny_config(*overrides)
    ranks, predictions = run(layout, *settings)
    for counted, predicted in zip(ranks, predictions, strict=True):
        assert_equal(counted.sent, predicted, "ep", "etp")
    again = int(config.training.recompute in ("moe", "full"))
    exchanged = sum(rank.sent["ep"] + rank.sent.get("etp", 0.0) for rank in ranks)
    stages = sent_by_stage(config, len(ranks))
    numbers = len(ranks) * sum(stages[0].get(axis, {}).get("numbers of rows", 0.0) for axis in ("ep", "etp"))
    choices = len(ranks) * stages[0]["ep"].get("choices", 0.0)
    moved = sum(rank.dispatched for rank in ranks) - numbers / (1 + again)
    width = config.model.hidden_size  # of a row both ways; its weight goes there only
    assert exchanged == 2 * moved + again * moved * (width + 1) / (2 * width + 1) + numbers + choices


def test_a_replay_sends_the_same() -> None:
    """Of all kinds of operations: none is lost, also not those that come from the autograd engine."""
    for layout in ("tp2-ep2-etp2", "pp2-tp2-ep2"):
        for rank in run(layout, *BALANCED)[0]:
            assert set(rank.sent_again.values()) == {0.0}
            assert min(rank.shares) >= 0
            assert abs(sum(rank.shares) - 1) < 1e-9
