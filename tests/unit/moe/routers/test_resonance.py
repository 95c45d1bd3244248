"""Expert-Token Resonance: the identities of the paper and of what we define beside it."""

import math

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import ResonanceRouterConfig
from megamoe.moe import losses
from megamoe.moe.routers.base import RouterSize
from megamoe.moe.routers.resonance import ResonanceRouter, slice_mask
from megamoe.testing import assert_close, assert_equal_bits

TOKENS, WIDTH, EXPERTS = 48, 32, 4
MODES = ("grap", "grap_learned", "cosine")


def build(
    width: int = WIDTH,
    experts: int = EXPERTS,
    top_k: int = 2,
    capacity: CapacityConfig | None = None,
    **settings,
) -> ResonanceRouter:
    size = RouterSize(width, experts, top_k)
    router = ResonanceRouter(ResonanceRouterConfig(**settings), size, capacity or CapacityConfig())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in router.named_parameters():
        if name == "log_scale":
            torch.nn.init.constant_(parameter, math.log(router.initial_scale))
        else:
            torch.nn.init.normal_(parameter, generator=generator)
    return router


def rows(number: int = TOKENS, width: int = WIDTH) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("width, experts", [(32, 4), (30, 4), (7, 7), (33, 8), (5, 1)])
def test_slices_are_contiguous_disjoint_and_as_equal_as_can_be(width: int, experts: int) -> None:
    mask_ED = slice_mask(experts, width)
    assert mask_ED.sum(0).tolist() == [1.0] * width
    owners = mask_ED.argmax(0).tolist()
    assert owners == sorted(owners)
    lengths = mask_ED.sum(1).tolist()
    assert set(lengths) <= {float(width // experts), float(-(-width // experts))}
    assert lengths == sorted(lengths, reverse=True)


def test_fixed_grap_is_the_closed_form() -> None:
    rows_TD, slice_size = rows(), WIDTH // EXPERTS
    expected_TE = torch.empty(TOKENS, EXPERTS)
    for token in range(TOKENS):
        for expert in range(EXPERTS):
            total = rows_TD[token, expert * slice_size : (expert + 1) * slice_size].sum()
            expected_TE[token, expert] = total / (rows_TD[token].norm() * math.sqrt(WIDTH / EXPERTS))
    router = build(affinity="grap", learn_scale=False)
    assert list(router.parameters()) == []
    assert_close(router.affinity(rows_TD), expected_TE, abs=1e-6)


@pytest.mark.parametrize("width", [32, 30])
@pytest.mark.parametrize("affinity", MODES)
def test_affinity_is_the_cosine_with_unit_vectors(affinity: str, width: int) -> None:
    router, rows_TD = build(width, affinity=affinity, centre=False), rows(width=width)
    vectors_ED, affinity_TE = router.expert_vectors(), router.affinity(rows_TD)
    assert_close(vectors_ED.norm(dim=-1), torch.ones(EXPERTS), rel=1e-6)
    if affinity != "cosine":
        gram_EE = vectors_ED @ vectors_ED.t()
        off_diagonal = gram_EE[~torch.eye(EXPERTS, dtype=torch.bool)]
        assert off_diagonal.tolist() == [0.0] * (EXPERTS * (EXPERTS - 1)), "orthogonal, and exactly so"
        assert affinity_TE.square().sum(-1).max().item() <= 1 + 1e-6
    expected_TE = torch.nn.functional.cosine_similarity(rows_TD[:, None], vectors_ED[None], dim=-1)
    assert_close(affinity_TE, expected_TE, abs=1e-6)
    assert affinity_TE.dtype == torch.float32


def test_learned_grap_keeps_its_supports_for_any_values() -> None:
    router = build(affinity="grap_learned", width=30)
    assert bool((router.expert_vectors()[slice_mask(EXPERTS, 30) == 0] == 0).all())
    values = router.slice_values.detach()
    assert_close(router.expert_vectors()[0, :8], values[:8] / values[:8].norm(), rel=1e-6)


def test_learned_grap_starts_as_fixed_grap() -> None:
    learned = build(affinity="grap_learned", width=30)
    torch.nn.init.ones_(learned.slice_values)
    assert_close(learned.affinity(rows(width=30)), build(affinity="grap", width=30).affinity(rows(width=30)))


@pytest.mark.parametrize("affinity", MODES)
def test_affinity_does_not_depend_on_the_length_of_a_token(affinity: str) -> None:
    router, rows_TD = build(affinity=affinity, centre=False), rows()
    lengths_T1 = torch.logspace(-3, 3, TOKENS)[:, None]
    assert_close(router.affinity(rows_TD * lengths_T1), router.affinity(rows_TD), abs=2e-6)


def test_a_zero_token_has_no_affinity_and_finite_gradients() -> None:
    router, rows_TD = build(), torch.zeros(3, WIDTH, requires_grad=True)
    plan = router(rows_TD)
    (plan.weights_A.sum() + plan.logits_TE.sum()).backward()
    assert rows_TD.grad is not None
    assert bool(rows_TD.grad.isfinite().all())
    assert not bool(plan.logits_TE.any())


@pytest.mark.parametrize(
    "settings, kappa",
    [
        ({"affinity": "grap"}, 2 * math.sqrt(WIDTH)),
        ({"affinity": "grap_learned"}, 2 * math.sqrt(WIDTH)),
        ({"affinity": "cosine"}, 14.0),
        ({"scale_init": 5.0}, 5.0),
        ({"learn_scale": False}, 2 * math.sqrt(WIDTH)),
    ],
    ids=str,
)
def test_initial_scale(settings: dict[str, object], kappa: float) -> None:
    router = build(**settings)
    assert router.scale().item() == pytest.approx(kappa)
    rows_TD = rows()
    assert_close(router(rows_TD).logits_TE, kappa * router.affinity(rows_TD), rel=1e-6)


def test_the_limits_of_the_scale_can_be_set() -> None:
    router = build(scale_min=3.0, scale_init=4.0, scale_max=5.0)
    for log_scale, kappa in ((-9.0, 3.0), (math.log(4.0), 4.0), (9.0, 5.0)):
        torch.nn.init.constant_(router.log_scale, log_scale)
        assert router.scale().item() == pytest.approx(kappa)


@pytest.mark.parametrize("log_scale, kappa", [(-9.0, math.sqrt(WIDTH) / 2), (9.0, 16 * math.sqrt(WIDTH))])
def test_the_scale_is_clamped(log_scale: float, kappa: float) -> None:
    router = build()
    torch.nn.init.constant_(router.log_scale, log_scale)
    assert router.scale().item() == pytest.approx(kappa)


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("affinity", MODES)
def test_token_choice_and_weights_against_a_loop(affinity: str, top_k: int) -> None:
    router, rows_TD = build(top_k=top_k, affinity=affinity), rows()
    router.update({"token_sum": torch.linspace(-9, 9, WIDTH), "token_count": torch.tensor([30.0])})
    kappa, mean_D = router.scale().item(), router.token_mean_D
    expected = {}
    for token, row in enumerate(rows_TD):
        centred = row - mean_D if affinity != "cosine" else row
        delta = [float(torch.dot(centred, w) / centred.norm()) for w in router.expert_vectors().detach()]
        gates = [math.exp(kappa * d) for d in delta]
        chosen = sorted(range(EXPERTS), key=lambda e: -delta[e])[:top_k]
        mass = sum(gates) if top_k == 1 else sum(gates[e] for e in chosen)
        expected |= {(token, e): gates[e] / mass for e in chosen}
    plan = router(rows_TD)
    found = zip(plan.token_ids_A.tolist(), plan.expert_ids_A.tolist(), plan.weights_A.tolist(), strict=True)
    assert {(t, e): w for t, e, w in found} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("drop", ["affinity", "position"])
def test_expert_choice_after_token_choice(drop: str) -> None:
    """The experts' choice among those that chose them, literally, by affinity and not by gate weight."""
    capacity = CapacityConfig(mode="static", factor=0.5, drop=drop)
    router, rows_TD = build(capacity=capacity, affinity="grap"), rows(96)
    rows_TD[:, :8] += 0.7  # the first expert is wanted by most
    affinity_TE, limits = router.affinity(rows_TD).detach(), router.limits(96)
    assert limits is not None
    assert limits.per_expert_E.tolist() == [24] * EXPERTS
    limit = 24
    expected = set()
    for expert in range(EXPERTS):
        takers = [t for t in range(96) if expert in affinity_TE[t].topk(2).indices.tolist()]
        if drop == "affinity":
            takers.sort(key=lambda t: -affinity_TE[t, expert].item())
        expected |= {(t, expert) for t in takers[:limit]}
    plan = router(rows_TD)
    assert set(zip(plan.token_ids_A.tolist(), plan.expert_ids_A.tolist(), strict=True)) == expected
    assert len(expected) < 2 * 96


@pytest.mark.parametrize("top_k, share", [(1, 0.587), (2, 0.54)])
def test_share_that_the_threshold_keeps_of_isotropic_tokens(top_k: int, share: float) -> None:
    router = build(256, 8, top_k, affinity="grap", threshold=0.75)
    rows_TD = rows(8192, 256)
    kept = len(router(rows_TD).token_ids_A) / (8192 * top_k)
    assert kept == pytest.approx(share, abs=0.012)
    assert len(router.eval()(rows_TD).token_ids_A) == 8192 * top_k


@pytest.mark.parametrize("affinity", MODES)
def test_gradients_reach_scale_vectors_and_rows(affinity: str) -> None:
    router, rows_TD = build(affinity=affinity), rows().requires_grad_()
    plan = router(rows_TD)
    probe_A = torch.randn(len(plan.weights_A), generator=torch.Generator().manual_seed(7))
    targets = {**dict(router.named_parameters()), "rows": rows_TD}
    gradients = torch.autograd.grad((plan.weights_A * probe_A).sum(), list(targets.values()))
    for (name, target), gradient in zip(targets.items(), gradients, strict=True):
        assert bool(gradient.any()), name
        direction = gradient / gradient.norm()
        slope = finite_difference(router, rows_TD, target, direction, probe_A)
        assert slope == pytest.approx(float(gradient.norm()), rel=0.02), name


def finite_difference(
    router: ResonanceRouter, rows_TD: Tensor, target: Tensor, direction: Tensor, probe_A: Tensor
) -> float:
    values, step, choice = [], 1e-3, None
    original = target.detach().clone()
    for sign in (1, -1):
        with torch.no_grad():
            target.copy_(original + sign * step * direction)
            plan = router(rows_TD)
            target.copy_(original)
        choice = plan.token_ids_A if choice is None else choice
        assert torch.equal(choice, plan.token_ids_A), "the step is small enough that the choice stays"
        values.append(float((plan.weights_A * probe_A).sum()))
    return (values[0] - values[1]) / (2 * step)


def test_the_mean_moves_by_update_only_and_is_that_of_all_tokens() -> None:
    router, first_TD, second_TD = build(), rows(40) + 1.0, rows(64)[40:] - 2.0
    observed: dict[str, Tensor] = {}
    for rows_TD in (first_TD, second_TD):
        for name, value in router(rows_TD).observations.items():
            observed[name] = observed[name] + value if name in observed else value
        assert not bool(router.token_mean_D.any())
    router.update(observed)
    assert_close(router.token_mean_D, torch.cat([first_TD, second_TD]).mean(0), rel=1e-5)


def test_the_mean_of_a_large_batch_is_that_of_a_sample() -> None:
    rows_TD = rows(3000) + 1.0
    seen = build()(rows_TD).observations
    assert seen["token_count"].item() == 500
    assert_close(seen["token_sum"], rows_TD[::6].sum(0), rel=1e-5)


def test_later_means_move_by_the_momentum() -> None:
    router = build(centre_momentum=0.75)
    router.update({"token_sum": torch.full((WIDTH,), 8.0), "token_count": torch.tensor([4.0])})
    assert router.token_mean_D.tolist() == [2.0] * WIDTH
    router.update({"token_sum": torch.full((WIDTH,), 24.0), "token_count": torch.tensor([4.0])})
    assert router.token_mean_D.tolist() == [0.75 * 2 + 0.25 * 6] * WIDTH


def test_centring_takes_a_shared_direction_away() -> None:
    rows_TD = rows(2048, 64) + 3.0 * torch.randn(64, generator=torch.Generator().manual_seed(4))
    router = build(64, 8, top_k=1)
    torch.nn.init.ones_(router.slice_values)
    before = router(rows_TD)
    router.update(before.observations)
    after = router(rows_TD)
    assert before.metrics["max_load"][0].item() > 3.0
    assert after.metrics["max_load"][0].item() < 1.5


@pytest.mark.parametrize(
    "settings, centred",
    [({}, True), ({"affinity": "grap"}, True), ({"affinity": "cosine"}, False), ({"centre": False}, False)],
    ids=str,
)
def test_what_is_not_centred_observes_nothing(settings: dict[str, object], centred: bool) -> None:
    router = build(**settings)
    plan = router(rows())
    assert sorted(plan.observations) == (["token_count", "token_sum"] if centred else [])
    before = router.token_mean_D.clone()
    router.update(plan.observations)
    assert torch.equal(router.token_mean_D, before) != centred


def test_losses() -> None:
    router = build(affinity="cosine", balance_loss=0.5, z_loss=0.25, orthogonality_loss=0.125)
    plan = router(rows())
    probs_TE = plan.logits_TE.softmax(-1)
    chosen_E = router.eval()(rows()).rows_per_expert_E
    assert_equal_bits(plan.losses["balance_loss"], 0.5 * losses.balance_loss(probs_TE, chosen_E))
    assert_equal_bits(plan.losses["z_loss"], 0.25 * losses.z_loss(plan.logits_TE))
    assert_equal_bits(plan.losses["orthogonality_loss"], 0.125 * losses.orthogonality_loss(router.weight))
    assert sorted(build(affinity="grap_learned", orthogonality_loss=0.5)(rows()).losses) == ["balance_loss"]


def test_the_balance_loss_counts_choices_before_any_is_dropped() -> None:
    rows_TD = rows()
    rows_TD[:, :8] += 1.0
    tight = build(affinity="grap", capacity=CapacityConfig(mode="static", factor=0.3))
    free = build(affinity="grap")
    assert len(tight(rows_TD).token_ids_A) < len(free(rows_TD).token_ids_A)
    assert_equal_bits(tight(rows_TD).losses["balance_loss"], free(rows_TD).losses["balance_loss"])


def test_a_balanced_router_pays_its_coefficient() -> None:
    """Tokens that are the expert vectors themselves, each expert equally often."""
    router = build(top_k=1, affinity="grap", balance_loss=0.125)
    rows_TD = router.expert_vectors().repeat(5, 1)
    assert router(rows_TD).losses["balance_loss"].item() == pytest.approx(0.125)


# Capacity that follows training


def test_the_whole_capacity_and_no_threshold_are_plain_top_k() -> None:
    rows_TD = rows(96)
    free = build(affinity="grap")(rows_TD)
    full = build(affinity="grap", capacity=CapacityConfig(mode="static", factor=2.0))(rows_TD)  # C = T
    assert torch.equal(full.token_ids_A, free.token_ids_A)
    assert_equal_bits(full.weights_A, free.weights_A)


def separated(tokens: int, width: int = 64, experts: int = 8, bump: float = 2.0) -> Tensor:
    """Tokens with a planted affinity to an expert each."""
    router = build(width, experts, affinity="grap")
    own_TD = router.expert_vectors()[torch.arange(tokens) % experts]
    return rows(tokens, width) + bump * own_TD


@pytest.mark.parametrize("mode", ["locmoe", "etr_bound", "etr_success"])
def test_the_bound_moves_by_update_only_and_for_training_only(mode: str) -> None:
    router = build(64, 8, 1, CapacityConfig(mode=mode, momentum=0.0), affinity="grap", centre=False)
    rows_TD = separated(512)
    assert router.bound is not None
    before = {name: value.clone() for name, value in router.state_dict().items()}
    plan = router(rows_TD)
    router.eval()(rows_TD)
    assert {name: value.tolist() for name, value in router.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert router(rows_TD).capacity is None, "evaluation is dropless"
    assert router(rows_TD).observations == {}
    router.train().update(plan.observations)
    assert int(router.bound.num_updates) == 1
    after = router(rows_TD)
    assert sorted(after.metrics.keys() - plan.metrics.keys()) == []
    assert "capacity" in after.metrics


def test_the_success_bound_shrinks_the_capacity_and_keeps_the_nearest() -> None:
    router = build(64, 8, 1, CapacityConfig(mode="etr_success", momentum=0.0), affinity="grap", centre=False)
    rows_TD = separated(2048)
    first = router(rows_TD)
    router.update(first.observations)
    second = router(rows_TD)
    assert second.capacity is not None
    assert first.capacity is not None
    assert second.capacity < 0.7 * first.capacity
    limits = router.limits(2048)
    assert limits is not None
    assert bool((second.rows_per_expert_E <= limits.per_expert_E).all())
    affinity_TE = router.affinity(rows_TD)
    for expert in range(8):
        mine = second.token_ids_A[second.expert_ids_A == expert]
        takers = (affinity_TE.argmax(-1) == expert).nonzero().squeeze(-1)
        dropped = takers[~torch.isin(takers, mine)]
        if len(dropped):
            assert affinity_TE[mine, expert].min() >= affinity_TE[dropped, expert].max()


def test_locality_is_one_more_loss_and_is_said_once_where_it_only_balances() -> None:
    router = build(locality_loss=0.5)
    plan = router(rows())
    expected = 0.5 * losses.locality_loss(plan.logits_TE.softmax(-1), torch.ones(EXPERTS, dtype=torch.bool), 0.5)
    assert_close(plan.losses["locality_loss"], expected, abs=1e-7)
    assert len(router.remarks()) == 1
    assert build().remarks() == []
    assert "layout" in build(scope="local").remarks()[0]


def test_the_histogram_counts_the_tokens_choices() -> None:
    plan = build(256, 8, affinity="grap")(rows(4096, 256))
    histogram = plan.metrics["affinity_histogram"][0]
    assert histogram.sum().item() == pytest.approx(1.0)
    # The two largest of eight normal numbers: nearly none below 0, nearly none above 4.
    assert histogram[:16].sum().item() < 0.05
    assert histogram[24:].sum().item() < 0.01


def test_in_fp64_nothing_is_rounded_to_fp32() -> None:
    router = build().double()
    assert torch.autograd.gradcheck(lambda rows_TD: router(rows_TD).weights_A, rows(6).double().requires_grad_())


def test_ranked_by_gate_an_expert_keeps_those_that_weigh_it_most() -> None:
    capacity = CapacityConfig(mode="static", factor=0.5)
    rows_TD = rows(96)
    router = build(capacity=capacity, affinity="grap", rank_by="gate")
    free = build(affinity="grap")(rows_TD)
    plan = router(rows_TD)
    found = zip(free.token_ids_A.tolist(), free.expert_ids_A.tolist(), free.weights_A.tolist(), strict=True)
    weight = {(token, expert): value for token, expert, value in found}
    kept = set(zip(plan.token_ids_A.tolist(), plan.expert_ids_A.tolist(), strict=True))
    assert kept < set(weight)
    for expert in range(EXPERTS):
        mine = [w for pair, w in weight.items() if pair[1] == expert and pair in kept]
        dropped = [w for pair, w in weight.items() if pair[1] == expert and pair not in kept]
        assert min(mine) >= max(dropped, default=0.0)
    # With two choices a first one weighs at least a half: it is dropped only after every second one.
    by_affinity = build(capacity=capacity, affinity="grap")(rows_TD)
    assert plan.metrics["unserved_share"][0] < by_affinity.metrics["unserved_share"][0]


@pytest.mark.parametrize(
    "log_scale, direction, moves", [(9.0, 1, True), (9.0, -1, False), (-9.0, -1, True), (-9.0, 1, False)]
)
def test_a_scale_beyond_its_limit_can_only_come_back(log_scale: float, direction: int, moves: bool) -> None:
    """At the upper limit a positive gradient, whose step leads down, passes; at the lower one a negative."""
    router = build()
    torch.nn.init.constant_(router.log_scale, log_scale)
    (router.scale() * direction).backward()
    assert router.log_scale.grad is not None
    assert bool(router.log_scale.grad.any()) == moves
