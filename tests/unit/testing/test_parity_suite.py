"""The parity suite's names, plans, comparisons and verdicts; whole trainings are compared elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megamoe.common.errors import ConfigError, TopologyError
from megamoe.config.rules import check_world_size
from megamoe.testing import parity
from megamoe.testing.parity import Error, Flip, ParityRun, Tolerance
from megamoe.testing.parity_cases import (
    Case,
    Plan,
    Setting,
    Wanted,
    list_settings,
    make_plan,
    one_process_of,
    small_model,
)
from megamoe.testing.parity_judge import Finding, Measurement, Outcome, bounds_of, judge, measurement_of, worst_of
from megamoe.testing.parity_record import cut_margins
from megamoe.testing.parity_report import remarks, summary, table
from megamoe.testing.parity_topologies import LADDER, LARGE, filling, name_of, parse

BOUNDS = Tolerance().bounds()
FP32 = Setting("topk", "dropless", "fp32")

# --- names


@pytest.mark.parametrize(
    "name, ranks, degrees",
    [
        ("dp2", 2, {"dp": 2, "edp": 2}),
        ("ep2", 2, {"dp": 2, "ep": 2, "edp": 1}),
        ("ep2-edp2", 4, {"dp": 4, "ep": 2, "edp": 2}),
        ("edp2-ep2-dp4", 4, {"dp": 4, "edp": 2}),
        ("tp2-ep4", 4, {"dp": 2, "tp": 2, "ep": 4, "edp": 1}),
        ("ep4-tp2", 4, {"dp": 2, "tp": 2, "ep": 4}),
        ("tp2-ep2-etp2", 4, {"dp": 2, "tp": 2, "ep": 2, "etp": 2, "edp": 1}),
        ("tp2-ep3", 6, {"dp": 3, "edp": 2}),
        ("pp2-tp2-ep2", 4, {"dp": 1, "pp": 2}),
        ("tp2-ep4-pp2", 8, {"dp": 2, "pp": 2}),
        ("pp2-tp2-dp2-ep4", 8, {"dp": 2, "edp": 1}),
        ("cp2-ep2", 2, {"dp": 1, "cp": 2}),
        ("dp1", 1, {}),
    ],
)
def test_names_mean_layouts(name: str, ranks: int, degrees: dict[str, int]) -> None:
    layout = parse(name)
    assert layout.ranks == ranks
    assert {axis: layout.topology.degree(axis) for axis in degrees} == degrees


@pytest.mark.parametrize(
    "name, says",
    [
        ("tp2-xp4", "'xp4'"),
        ("etpp2", "did you mean etp?"),
        ("tp", "a number of at least 1"),
        ("tp0", "a number of at least 1"),
        ("2tp", "tp2-ep4-pp2"),
        ("", "''"),
        ("tp2-", "''"),
        ("tp2-tp4", "gives tp twice"),
        ("dp3-ep2", "3 % 2 = 1"),
        ("dp2-edp3", "pp 1 * dp 2 * cp 1 * tp 1 = 2; pp 1 * edp 3 * ep 1 * etp 1 = 3"),
    ],
)
def test_wrong_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(TopologyError) as refusal:
        parse(name)
    assert says in str(refusal.value)


@pytest.mark.parametrize("name", [*LADDER, *LARGE, "dp1", "edp2-etp2", "cp3-ep2"])
def test_the_shortest_name_means_the_same(name: str) -> None:
    topology = parse(name).topology
    assert parse(name_of(topology)).topology == topology


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 64])
def test_a_ladder_fills_the_ranks(ranks: int) -> None:
    layouts = filling(ranks)
    assert {layout.ranks for layout in layouts} == {ranks}
    assert len({layout.topology for layout in layouts}) == len(layouts)
    assert all(parse(layout.name).topology == layout.topology for layout in layouts)
    assert any(layout.topology.ep == ranks for layout in layouts)
    if ranks % 4 == 0:
        assert {1, 2} == {layout.topology.pp for layout in layouts} == {layout.topology.cp for layout in layouts}


# --- plans


def plan(*names: str, zero: tuple[int, ...] = (1,), settings: tuple[Setting, ...] = (FP32,), **more: list[str]) -> Plan:
    return make_plan(Wanted([parse(name) for name in names], zero, settings, 2, **more))


@pytest.mark.parametrize("names", [LADDER, ("tp3-ep6", "dp5"), ("ep128",), ("pp4",), ("cp4-tp4-ep2",)])
def test_the_small_model_fits_every_name(names: tuple[str, ...]) -> None:
    made = plan(*names, settings=tuple(list_settings(["topk", "resonance"], ["dropless", "static"], ["fp32"])))
    assert not [case.refusal for case in made.cases if case.config is None]
    for case in made.runnable():
        assert case.config is not None
        check_world_size(case.config, case.layout.ranks)


def test_the_small_model_has_something_to_cut_everywhere() -> None:
    config = plan("tp2-ep2").references[FP32]
    assert config.moe.first_k_dense == 1
    assert config.model.num_layers == 3
    assert config.moe.num_shared_experts == 1
    assert 1 < (config.model.num_kv_heads or 0) < config.model.num_heads
    assert small_model([parse("pp4")])["model"]["num_layers"] == 5


def test_what_the_configuration_refuses_is_not_run() -> None:
    bf16, etr = FP32._replace(precision="bf16"), FP32._replace(capacity="etr_success")
    made = plan("dp2", zero=(0, 1), settings=(FP32, bf16, etr))
    refused = {(case.zero_stage, case.setting): case.refusal for case in made.cases if case.config is None}
    assert refused.keys() == {(0, bf16), (0, etr), (1, etr)}
    assert refused[0, bf16].startswith("parallel.zero_stage: stage 0 accumulates bf16")
    assert "resonance" in refused[0, etr]
    assert "parallel.zero_stage=0" not in refused[0, bf16]
    assert made.references.keys() == {FP32, *one_process_of(bf16)}


def test_references_are_one_process() -> None:
    bf16 = FP32._replace(precision="bf16")
    made = plan("tp2-ep4-pp2", "dp2", settings=(bf16,), overrides=["parallel.offload_optimizer=true"])
    assert made.references[FP32].parallel.zero_stage == 0
    assert [made.references[each].parallel.zero_stage for each in one_process_of(bf16)] == [1, 2, 3]
    assert all(made.references[each].training.precision == "bf16" for each in one_process_of(bf16))
    for config in made.references.values():
        parallel = config.parallel
        assert (parallel.tp, parallel.pp, parallel.ep, parallel.etp, parallel.cp) == (1, 1, 1, 1, 1)
        assert not parallel.offload_optimizer
        check_world_size(config, 1)
    assert made.runnable()[0].config.parallel.offload_optimizer


def test_wrong_overrides_are_the_users_error() -> None:
    with pytest.raises(ConfigError, match=r"training\.stepz"):
        plan("dp2", overrides=["training.stepz=3"])


def test_overrides_reach_the_model() -> None:
    made = plan("dp2", overrides=["model.num_heads=8", "training.optimizer.eps=1e-3"])
    config = made.references[FP32]
    assert (config.model.num_heads, config.training.optimizer.eps) == (8, 1e-3)


# --- comparisons


def a_run(**changes: object) -> ParityRun:
    """Three steps of two micro-batches through two blocks."""
    generator = torch.Generator().manual_seed(1)

    def tensors() -> dict[str, Tensor]:
        return {name: torch.randn(4, 3, generator=generator) for name in ("embedding.weight", "blocks.0.norm.weight")}

    places = [(step, micro_batch, block) for step in range(3) for micro_batch in range(2) for block in range(2)]
    run = ParityRun(
        losses=[5.0, 4.0, 3.0],
        auxiliary=[0.02, 0.02, 0.01],
        norms=[2.0, 1.5, 1.0],
        gradients=tensors(),
        weights=tensors(),
        moments={"exp_avg": tensors(), "exp_avg_sq": tensors()},
        statistics={"blocks.0.ffn.router.bias_E": torch.randn(4, generator=generator)},
        choices={place: torch.eye(4, dtype=torch.bool) for place in places},
        margins={place: torch.full((4,), 0.5) for place in places},
    )
    return replace(run, **changes)  # type: ignore[arg-type]


def flipped(run: ParityRun, place: tuple[int, int, int], token: int) -> dict[tuple[int, int, int], Tensor]:
    """The run's choices with one token's changed."""
    mask = run.choices[place].clone()
    mask[token] = ~mask[token]
    return {**run.choices, place: mask}


def test_equal_runs() -> None:
    errors = parity.errors_of(a_run(), a_run())
    assert errors.keys() == BOUNDS.keys()
    assert {error.value for error in errors.values()} == {0.0}
    assert parity.compare(a_run(), a_run()) == dict.fromkeys(BOUNDS, 0.0)


@pytest.mark.parametrize("kind", ["gradients", "weights", "statistics"])
def test_a_wrong_tensor_is_named(kind: str) -> None:
    one = a_run()
    name = next(reversed(getattr(one, kind)))
    wrong = replace(one, **{kind: {**getattr(one, kind), name: getattr(one, kind)[name] * 1.01}})
    error = parity.errors_of(wrong, one)[kind.removesuffix("s")]
    assert error.where == name
    assert error.value == pytest.approx(0.01, rel=1e-5)
    with pytest.raises(AssertionError, match=f"{kind.removesuffix('s')} differs by 1.*{name}"):
        parity.compare(wrong, one)
    assert judge(measurement_of(wrong, one, True), BOUNDS, 1e-5)[0] == "miss"


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_wrong_moment_is_named(moment: str) -> None:
    one = a_run()
    changed = {**one.moments[moment], "embedding.weight": one.moments[moment]["embedding.weight"] + 0.1}
    wrong = replace(one, moments={**one.moments, moment: changed})
    errors = parity.errors_of(wrong, one)
    assert [kind for kind, error in errors.items() if error.value] == [moment]
    assert errors[moment].where == "embedding.weight"


@pytest.mark.parametrize("kind, values", [("losses", [5.0, 4.0, math.nan]), ("norms", [2.0, math.inf, 1.0])])
def test_what_is_not_finite_differs_infinitely(kind: str, values: list[float]) -> None:
    """Not only in the first step: NaN is neither more nor less than what came before it."""
    error = parity.errors_of(a_run(**{kind: values}), a_run())[{"losses": "loss", "norms": "norm"}[kind]]
    assert error.value == math.inf
    assert error.where in ("step 2", "step 3")
    both = parity.errors_of(a_run(losses=[math.nan] * 3), a_run(losses=[math.nan] * 3))
    assert both["loss"].value == math.inf


def test_missing_and_misshapen_tensors_differ_infinitely() -> None:
    one = a_run()
    fewer = {"embedding.weight": one.weights["embedding.weight"]}
    assert "blocks.0.norm.weight is missing" in parity.errors_of(a_run(weights=fewer), one)["weight"].where
    narrow = {**one.weights, "embedding.weight": one.weights["embedding.weight"][:1]}
    error = parity.errors_of(a_run(weights=narrow), one)["weight"]
    assert error.value == math.inf
    assert "shape (1, 3), not (4, 3)" in error.where


def test_only_the_steps_before_a_flip_are_compared() -> None:
    one = a_run()
    wrong = a_run(losses=[5.0, 4.0, 9.0], weights={name: -tensor for name, tensor in one.weights.items()})
    errors = parity.errors_of(wrong, one, steps=2)
    assert errors.keys() == {"loss", "auxiliary", "norm", "gradient"}
    assert errors["loss"].value == 0.0
    assert parity.errors_of(wrong, one, steps=0) == {}


def test_the_first_flip_has_to_be_the_near_tie() -> None:
    """Not one that follows from it in the same block, in a higher block, or in a later step."""
    flips = [
        Flip(1, 0, 1, 3, 0.2),  # made room by the next one
        Flip(1, 0, 1, 5, 1e-7),
        Flip(1, 0, 2, 0, 0.4),
        Flip(1, 1, 0, 2, 3e-7),
        Flip(1, 1, 1, 2, 0.3),
        Flip(2, 0, 0, 0, 0.5),
    ]
    assert parity.first_flip(flips) == flips[3]
    assert parity.first_flip([]) is None


def test_flips_are_found_with_their_margin() -> None:
    one = a_run()
    assert parity.routing_flips(a_run(choices=flipped(one, (2, 1, 0), 3)), one) == [Flip(2, 1, 0, 3, 0.5)]


def test_margins_of_what_an_expert_keeps() -> None:
    affinity = torch.tensor([0.9, 0.5, 0.4, 0.3, 0.7])
    experts, kept = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([True, True, False, True, False])
    expected = torch.tensor([0.5, 0.1, 0.1, torch.inf, torch.inf])
    torch.testing.assert_close(cut_margins(affinity, experts, kept, 3), expected)


# --- verdicts


@pytest.mark.parametrize(
    "flip, loss, verdict, says",
    [
        (Flip(4, 0, 1, 7, 3e-7), 1e-7, "flip", "compared up to step 4"),
        (Flip(4, 0, 1, 7, 2e-3), 1e-7, "miss", "no near tie"),
        (Flip(4, 0, 1, 7, math.nan), 1e-7, "miss", "no near tie"),
        (Flip(4, 0, 1, 7, 3e-7), 1e-3, "miss", "loss 1.0e-03 > 1.0e-06 at step 2"),
        (Flip(0, 0, 1, 7, 3e-7), None, "miss", "another training.seed"),
        (None, 1e-7, "equal", ""),
        (None, math.inf, "miss", "loss inf"),
    ],
)
def test_verdicts(flip: Flip | None, loss: float | None, verdict: str, says: str) -> None:
    errors = {"loss": Error(loss, "step 2")} if loss is not None else {}
    found, note = judge(Measurement(errors, flip, int(flip is not None)), BOUNDS, 1e-5)
    assert found == verdict
    assert says in note
    if flip is not None:
        assert "flip at step" in note
        assert "block 1, token 7: margin" in note


def test_the_worst_rank_counts() -> None:
    ranks = [Measurement({"weight": Error(value, "w")}) for value in (1e-7, 1e-2, 1e-7)]
    assert worst_of(ranks).errors["weight"] == Error(1e-2, "w, rank 1")
    assert worst_of(ranks[::2]).errors["weight"] == Error(1e-7, "w")


def test_bf16_may_differ_by_twice_what_one_process_does() -> None:
    bf16, one = FP32._replace(precision="bf16"), a_run()
    rounded = a_run(losses=[5.0, 4.0, 3.3], choices=flipped(one, (0, 0, 0), 1))
    bounds = bounds_of(bf16, {FP32: one, bf16: rounded})
    assert bounds["loss"] == pytest.approx(0.2)
    assert bounds["weight"] == BOUNDS["weight"]
    near, far = (measurement_of(a_run(losses=[5.0, 4.0, loss]), one, False) for loss in (3.5, 3.7))
    assert judge(near, bounds, 1e-5)[0] == "equal"
    assert judge(far, bounds, 1e-5)[0] == "miss"
    counted = measurement_of(rounded, one, False)
    assert (counted.flip, counted.flips) == (None, 1)
    assert counted.errors.keys() == BOUNDS.keys()


# --- the report


def a_case(name: str, zero_stage: int, refusal: str = "") -> Case:
    return Case(parse(name), zero_stage, FP32, None, refusal)


def test_the_table_shows_what_varies_and_where_the_worst_error_is() -> None:
    cases = [a_case("ep2", 0), a_case("ep2", 1), a_case("ep2", 2, "no")]
    errors = {"loss": Error(5e-7, "step 3"), "weight": Error(1e-6, "embedding.weight")}
    findings = [
        Finding(cases[0], "equal", "", errors, BOUNDS),
        Finding(cases[1], "miss", "loss is wrong", {"loss": Error(1.0, "step 1")}, BOUNDS),
        Finding(cases[2], "refused", "no"),
    ]
    made, outcome = Plan(cases, {}, 7), Outcome(findings, {FP32: 0})
    found = table(made, outcome)
    assert "7 steps, router topk, capacity dropless, precision fp32" in found.heading
    assert found.header == ["layout", "ranks", "zero", "loss", "weight", "flips", "verdict", "worst"]
    assert found.rows == [
        ["ep2", "2", "0", "5.0e-07", "1.0e-06", "0", "equal", "loss of step 3"],
        ["ep2", "2", "1", "1.0e+00", "", "0", "miss", "loss of step 1"],
        ["ep2", "2", "2", "", "", "", "refused", ""],
    ]
    lines = list(remarks(made, outcome))
    assert lines[:2] == ["miss: ep2, zero 1, topk, dropless, fp32: loss is wrong", "refused (1 case): no"]
    assert "clipping was never active" in lines[2]
    assert summary(outcome) == "1 equal, 1 miss, 1 refused"
    assert outcome.failed()
    assert not Outcome([findings[0], findings[2]], {}).failed()
