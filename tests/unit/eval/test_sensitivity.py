"""Plans with random experts, and the losses that come of them."""

import dataclasses
import statistics
from collections.abc import Callable

import pytest
import torch

from megamoe.common.errors import ConfigError
from megamoe.data.batch import Batch
from megamoe.eval.routing import Routed, measure_entropy, on_routers
from megamoe.eval.sensitivity import (
    ARMS,
    arm_tokens,
    measure_sensitivity,
    randomised_experts,
    uncertain_tokens,
    with_random_experts,
)
from megamoe.model.decoder import Decoder
from megamoe.moe.types import RoutingPlan
from megamoe.testing import assert_equal_bits
from megamoe.training.setup import Runtime

Build = Callable[..., Decoder]
Pairs = dict[tuple[int, int], float]

ROUTERS = {
    "normalised": (),
    "not normalised": ("moe.router.normalize_weights=false",),
    "one expert": ("moe.top_k=1",),
    "sigmoid": ("moe.router.score=sigmoid",),
    "resonance": ("moe.router.type=resonance", "moe.top_k=3"),
}


def routed_of(model: Decoder, batch: Batch) -> list[Routed]:
    found: list[Routed] = []
    with on_routers(model, found.append):
        model(*batch, each=True)
    return found


def weights(plan: RoutingPlan) -> Pairs:
    """Weight of each (token, expert)."""
    pairs = zip(plan.token_ids_A.tolist(), plan.expert_ids_A.tolist(), strict=True)
    return dict(zip(pairs, plan.weights_A.tolist(), strict=True))


def of_token(pairs: Pairs, token: int) -> dict[int, float]:
    return {expert: weight for (t, expert), weight in pairs.items() if t == token}


def replaced(routed: Routed, which_T: torch.Tensor, seed: int = 0) -> RoutingPlan:
    return with_random_experts(routed, which_T, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_plan_with_random_experts(build: Build, batches: list[Batch], router: str, share: float) -> None:
    for routed in routed_of(build(*ROUTERS[router]), batches[0]):
        which_T = torch.rand(26, generator=torch.Generator().manual_seed(3)) < share
        plan, top_k = replaced(routed, which_T), routed.router.top_k
        old, new = weights(routed.plan), weights(plan)
        for token in range(26):
            before, after = of_token(old, token), of_token(new, token)
            if not which_T[token]:
                assert after == before, "bit for bit"
                continue
            assert len(after) == top_k, "all different"
            assert not after.keys() & before.keys()
            assert sum(after.values()) == pytest.approx(sum(before.values()), rel=1e-5)
            shares = {expert: float(routed.probs_TE[token, expert]) for expert in after}
            for expert, weight in after.items():
                expected = shares[expert] / sum(shares.values()) * sum(before.values())
                assert weight == pytest.approx(expected, rel=1e-4)
        order = list(zip(plan.expert_ids_A.tolist(), plan.token_ids_A.tolist(), strict=True))
        assert order == sorted(order), "by expert, then by token"
        assert plan.rows_per_expert_E.tolist() == [sum(e == expert for e, _ in order) for expert in range(8)]
        assert plan.token_ids_A.dtype == plan.expert_ids_A.dtype == plan.rows_per_expert_E.dtype == torch.int64


def test_every_other_expert_is_drawn_equally_often(build: Build, batches: list[Batch]) -> None:
    routed, drawn_E, draws = routed_of(build(), batches[0])[0], torch.zeros(8), 1200
    generator, which_T = torch.Generator().manual_seed(0), torch.arange(26) == 4
    for _ in range(draws):
        plan = with_random_experts(routed, which_T, generator)
        drawn_E[plan.expert_ids_A[plan.token_ids_A == 4]] += 1
    others = (~routed.chosen_TE[4]).nonzero().flatten()
    assert drawn_E.sum() == drawn_E[others].sum() == 2 * draws
    # Binomial with p = 1/3: standard deviation 16 of 400.
    assert drawn_E[others].tolist() == pytest.approx([draws / 3] * 6, abs=80)


def test_nobody_is_replaced(build: Build, batches: list[Batch]) -> None:
    for routed in routed_of(build(), batches[0]):
        plan = replaced(routed, torch.zeros(26, dtype=torch.bool))
        for name in ("token_ids_A", "expert_ids_A", "weights_A", "rows_per_expert_E"):
            assert_equal_bits(getattr(plan, name), getattr(routed.plan, name), name=name)


def test_fewer_others_than_a_token_needs(build: Build, batches: list[Batch]) -> None:
    for routed in routed_of(build("moe.num_experts=4", "moe.top_k=3"), batches[0]):
        old, new = weights(routed.plan), weights(replaced(routed, torch.ones(26, dtype=torch.bool)))
        for token in range(26):
            before, after = of_token(old, token).keys(), of_token(new, token).keys()
            assert len(after) == 3
            assert len(after & before) == 2, "the one other expert is in"


def test_probabilities_too_small_for_fp32(build: Build, batches: list[Batch]) -> None:
    routed = routed_of(build(), batches[0])[0]
    certain_TE = torch.full((26, 8), -1e4)
    certain_TE[routed.plan.token_ids_A, routed.plan.expert_ids_A] = 0.0
    routed = routed._replace(plan=routed.plan._replace(logits_TE=certain_TE))
    plan = replaced(routed, torch.ones(26, dtype=torch.bool))
    assert plan.weights_A.tolist() == pytest.approx([0.5] * 52), "nothing to tell them apart by"


def test_draws_follow_from_the_seed(build: Build, batches: list[Batch]) -> None:
    model = build()

    def losses(seed: int) -> list[float]:
        with randomised_experts(model, lambda routed: routed.real_T, seed):
            return [float(model(*batch, each=True).scores.losses_BS.sum()) for batch in (batches[0], batches[0])]

    first, second = losses(1)
    assert first != second, "each pass draws anew"
    assert losses(1) == [first, second]
    assert losses(2)[0] != first
    plain = [float(model(*batches[0], each=True).scores.losses_BS.sum()) for _ in range(2)]
    assert plain[0] == plain[1] != first, "nothing stays behind"


def test_uncertain_tokens_of_the_pass_itself(build: Build, batches: list[Batch]) -> None:
    first, second = routed_of(build(), batches[0])
    choose = uncertain_tokens({0: 0.0, 1: float(second.entropy_T[:26].median())})
    assert choose(first).tolist() == [True] * 26, "routers see no padding"
    expected_T = second.real_T & (second.entropy_T >= second.entropy_T[:26].median())
    assert 0 < int(expected_T.sum()) < 26
    assert torch.equal(choose(second), expected_T)


def test_all_arms_take_equally_many_tokens(build: Build, batches: list[Batch]) -> None:
    routed = routed_of(build(), batches[0])[1]
    uncertain_T = uncertain_tokens({1: float(routed.entropy_T[:26].sort().values[-7])})(routed)
    found = {arm.name: arm_tokens(arm, routed, uncertain_T, 0) for arm in ARMS}
    assert [int(of.sum()) for of in found.values()] == [7, 7, 7]
    assert torch.equal(found["uncertain"], uncertain_T)
    lowest = sorted(range(26), key=lambda token: float(routed.entropy_T[token]))[:7]
    assert found["certain"].nonzero().flatten().tolist() == sorted(lowest)
    drawn = [arm_tokens(ARMS[1], routed, uncertain_T, seed) for seed in range(20)]
    assert all(int(of.sum()) == 7 and not of[26:].any() for of in drawn)
    assert len({tuple(of.tolist()) for of in drawn}) == 20
    assert torch.stack(drawn).any(0)[:26].all(), "anyone may be drawn"


def test_losses_of_the_arms(build: Build, batches: list[Batch], runtime: Runtime) -> None:
    model = build()
    thresholds = measure_entropy(model, batches, runtime, quantile=0.8).thresholds
    report = measure_sensitivity(model, batches, thresholds, runtime, draws=3, seed=4)
    scores = [model(*batch, each=True).scores for batch in batches]
    labels = sum(int(of.counted_BS.sum()) for of in scores)
    assert report.labels == labels == 3 * 23
    assert report.loss == pytest.approx(sum(float(of.losses_BS.sum()) for of in scores) / labels, rel=1e-6)
    assert report.replaced_share == pytest.approx(16 / 78), "ceil(0.2 * 78) in each block"
    assert list(report.arms) == ["uncertain", "random", "certain"]
    for arm in report.arms.values():
        assert len(set(arm.losses)) == 3, "each draw has its own"
        assert arm.mean == pytest.approx(statistics.mean(arm.losses))
        assert arm.deviation == pytest.approx(statistics.stdev(arm.losses))
        assert arm.change == pytest.approx(arm.mean - report.loss)
        assert abs(arm.change) > 1e-3
    assert measure_sensitivity(model, batches, thresholds, runtime, draws=3, seed=4) == report
    assert measure_sensitivity(model, batches, thresholds, runtime, draws=3, seed=5).arms != report.arms
    one = measure_sensitivity(model, batches, None, runtime, draws=1)
    assert one.replaced_share == pytest.approx(4 / 78), "the .95 quantile of this model"
    assert one.arms["random"].deviation is None
    assert one.as_dict()["arms"]["random"]["losses"] == one.arms["random"].losses


def test_without_uncertain_tokens_all_is_equal_bit_for_bit(
    build: Build, batches: list[Batch], runtime: Runtime
) -> None:
    report = measure_sensitivity(build(), batches, {0: 1.1, 1: 1.1}, runtime, draws=2)
    assert report.replaced_share == 0.0
    for arm in report.arms.values():
        assert (arm.losses, arm.deviation, arm.change) == ((report.loss,) * 2, 0.0, 0.0)
    everybody = measure_sensitivity(build(), batches, {0: 0.0, 1: 0.0}, runtime, draws=1)
    assert everybody.replaced_share == 1.0
    assert report.loss not in [loss for arm in everybody.arms.values() for loss in arm.losses]


def test_draws_do_not_depend_on_the_ranks(build: Build, batches: list[Batch], runtime: Runtime) -> None:
    model, thresholds = build(), {0: 0.5, 1: 0.5}
    alone = measure_sensitivity(model, batches[:2], thresholds, runtime, draws=2)
    places = [dataclasses.replace(runtime, rank=rank, world_size=2) for rank in (0, 1)]
    parts = [measure_sensitivity(model, [batches[p.rank]], thresholds, p, draws=2) for p in places]
    for name, arm in alone.arms.items():
        halves = [statistics.mean(part.arms[name].losses[draw] for part in parts) for draw in (0, 1)]
        assert arm.losses == pytest.approx(halves, rel=1e-12), "both have equally many labels"
    once, twice = (measure_sensitivity(model, batches[:1] * n, thresholds, runtime, draws=1).arms for n in (1, 2))
    assert all(once[name].mean != twice[name].mean for name in once), "a batch that comes again is drawn for again"


def test_nothing_to_replace_by(build: Build, batches: list[Batch], runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match="no other experts"):
        measure_sensitivity(build("moe.num_experts=2"), batches, None, runtime)
