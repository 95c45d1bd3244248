"""Layers that broadcast against sums over all experts written out, against layers that do not, and with ETR."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.config.moe import BroadcastConfig, CapacityConfig, MoEConfig
from megamoe.config.routers import (
    ExpertChoiceRouterConfig,
    ResonanceRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    TopKRouterConfig,
)
from megamoe.moe.broadcast import normalised_entropy
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers import Rows
from megamoe.moe.types import LayerAux, RoutingPlan
from megamoe.testing import assert_close, assert_equal_bits

BATCH, SEQUENCE, WIDTH, FFN, EXPERTS, CHOICES = 3, 16, 20, 5, 6, 2
TOKENS = BATCH * SEQUENCE

ROUTERS: dict[str, RouterConfig] = {
    "softmax": TopKRouterConfig(),
    "unnormalised": TopKRouterConfig(normalize_weights=False),
    "sigmoid": TopKRouterConfig(score="sigmoid", bias_update_rate=0.01, num_groups=3, top_groups=2),
    "grap": ResonanceRouterConfig(affinity="grap"),
    "grap_learned": ResonanceRouterConfig(affinity="grap_learned"),
    "cosine": ResonanceRouterConfig(affinity="cosine", centre=True),
    "sinkhorn": SinkhornRouterConfig(balance_loss=0.01),
    "expert_choice": ExpertChoiceRouterConfig(balance_loss=0.01),
}
STATIC = CapacityConfig(mode="static", factor=0.7)
ALL = BroadcastConfig(threshold="fixed", entropy=0.0, max_share=1.0)
NEVER_REACHED = BroadcastConfig(threshold="fixed", entropy=1.0, max_share=1.0)
NOT_MEASURED = BroadcastConfig(threshold="quantile", max_share=1.0)
Layer = Any
"""An MoE layer, whose router has what the case is about."""
every_router = pytest.mark.parametrize("router", ROUTERS)


def build(
    router: str | RouterConfig, broadcast: BroadcastConfig | None, capacity: CapacityConfig = STATIC, top_k: int = 2
) -> Layer:
    """fp64; the same values with and without broadcasting."""
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=top_k,
        expert_ffn_size=FFN,
        router=ROUTERS[router] if isinstance(router, str) else router,
        capacity=capacity,
        broadcast=broadcast,
    )
    layer, generator = MoELayer(config, WIDTH, ExpertParallel()).double(), torch.Generator().manual_seed(5)
    for name, parameter in sorted(layer.named_parameters()):
        torch.nn.init.normal_(parameter, mean=float(name == "router.slice_values"), std=0.5, generator=generator)
    if hasattr(layer.router, "log_scale"):
        torch.nn.init.constant_(layer.router.log_scale, 2.0)
    if hasattr(layer.router, "token_mean_D"):
        layer.router.token_mean_D += 0.2
    if router == "sigmoid":
        layer.router.bias_E += torch.linspace(-0.2, 0.3, EXPERTS)
    return layer


def inputs() -> Tensor:
    """Tokens of all lengths, so that linear routers are sure of some; more of them like the first experts' slices."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(BATCH, SEQUENCE, WIDTH, generator=generator, dtype=torch.float64)
    x[..., :4] += 0.8
    return (x * 2.5 * torch.rand(BATCH, SEQUENCE, 1, generator=generator)).requires_grad_()


def probe(out: Tensor, terms: dict[str, Tensor] | None = None) -> Tensor:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    return sum((terms or {}).values(), (out * weights).sum())


def gradients(layer: Layer, x: Tensor, loss: Tensor) -> dict[str, Tensor]:
    targets = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(targets, torch.autograd.grad(loss, list(targets.values()), allow_unused=True), strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rel: float | None) -> None:
    """With `rel` None: bit for bit."""
    for name in expected:
        assert (found[name] is None) == (expected[name] is None), name
        if expected[name] is None:
            continue
        if rel is None:
            assert_equal_bits(found[name], expected[name], name=name)
        else:
            assert_close(found[name], expected[name], rel=rel, name=name)


def literal_probabilities(layer: Layer, x: Tensor) -> Tensor:
    """[T, E], each router's distribution from its definition."""
    router, rows_TD = layer.router, x.reshape(-1, WIDTH)
    if not isinstance(router.config, ResonanceRouterConfig):
        scores = [[torch.dot(row, vector) for vector in router.weight] for row in rows_TD]
        logits_TE = torch.stack([torch.stack(row) for row in scores])
        if getattr(router.config, "score", "") == "sigmoid":
            values_TE = 1 / (1 + (-logits_TE).exp())
            return values_TE / values_TE.sum(1, keepdim=True)
        return logits_TE.softmax(1)
    if router.config.affinity == "cosine":
        vectors = list(router.weight)
    else:
        learned = router.config.affinity == "grap_learned"
        values_D = router.slice_values if learned else torch.ones(WIDTH, dtype=torch.float64)
        vectors, start = [], 0
        for size in [4, 4, 3, 3, 3, 3]:
            vectors.append(F.pad(values_D[start : start + size], (start, WIDTH - start - size)))
            start += size
    centred_TD = rows_TD - router.token_mean_D
    logits = [[torch.dot(row, v) / (row.norm() * v.norm()) for v in vectors] for row in centred_TD]
    return (router.log_scale.exp() * torch.stack([torch.stack(row) for row in logits])).softmax(1)


def expert_output(layer: Layer, expert: int, token_D: Tensor) -> Tensor:
    w1, w2, w3 = (getattr(layer.experts, name)[expert] for name in ("w1", "w2", "w3"))
    return w2 @ (F.silu(w1 @ token_D) * (w3 @ token_D))


def weighted(layer: Layer, x: Tensor, weights_TE: Tensor) -> Tensor:
    """sum_i w_ti E_i(x_t), token by token."""
    out = []
    for token_D, weights_E in zip(x.reshape(-1, WIDTH), weights_TE, strict=True):
        parts = [weight * expert_output(layer, e, token_D) for e, weight in enumerate(weights_E) if weight != 0]
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out).view(x.shape)


def plan_of(layer: Layer, x: Tensor, about: Rows | None = None) -> RoutingPlan:
    sequences_T = torch.arange(TOKENS) // SEQUENCE * SEQUENCE
    plan: RoutingPlan = layer.router(x.reshape(-1, WIDTH), about or Rows(sequences_T=sequences_T))
    return plan


def weights_of(plan: RoutingPlan) -> dict[tuple[int, int], float]:
    """By (token, expert)."""
    pairs = zip(plan.token_ids_A.tolist(), plan.expert_ids_A.tolist(), strict=True)
    return dict(zip(pairs, plan.weights_A.tolist(), strict=True))


def values(aux: LayerAux | RoutingPlan) -> dict[str, Tensor]:
    return {name: value for name, (value, _) in aux.metrics.items()}


def some(share: float = 0.3, **settings: Any) -> BroadcastConfig:
    """`with_threshold` gives it the threshold."""
    return BroadcastConfig(threshold="quantile", max_share=share, **settings)


def with_threshold(layer: Layer, x: Tensor, quantile: float = 0.5) -> Layer:
    """About that share of the tokens is certain."""
    entropy_T = normalised_entropy(literal_probabilities(layer, x))
    assert layer.router.broadcast is not None
    layer.router.broadcast.threshold.copy_(entropy_T.quantile(quantile))
    return layer


# All tokens


@every_router
def test_broadcasting_every_token_is_the_dense_mixture(router: str) -> None:
    layer, x = build(router, ALL), inputs()
    out, aux = layer(x)
    expected = weighted(layer, x, literal_probabilities(layer, x))
    assert_close(out, expected, rel=1e-12, name="output")
    assert_same(gradients(layer, x, probe(out)), gradients(layer, x, probe(expected)), rel=1e-12)
    found = values(aux)
    assert (found["broadcast_share"].item(), found["drop_share"].item(), found["unserved_share"].item()) == (1, 0, 0)
    assert found["load"].tolist() == [EXPERTS / CHOICES] * EXPERTS


def test_match_topk_is_the_dense_mixture_times_the_sum_of_the_usual_weights() -> None:
    layer, x = build("unnormalised", ALL.model_copy(update={"scale": "match_topk"})), inputs()
    probs_TE = literal_probabilities(layer, x)
    mass_T = probs_TE.sort(dim=1, descending=True).values[:, :CHOICES].sum(1)
    assert 0.3 < mass_T.min().item() < mass_T.max().item() <= 1
    expected = weighted(layer, x, probs_TE * mass_T[:, None])
    out, _ = layer(x)
    assert_close(out, expected, rel=1e-12, name="output")
    assert_same(gradients(layer, x, probe(out)), gradients(layer, x, probe(expected)), rel=1e-12)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "cosine"])
def test_top_m_mixes_the_best_with_weights_that_sum_to_1(router: str) -> None:
    layer, x = build(router, ALL.model_copy(update={"top_m": 3})), inputs()
    probs_TE = literal_probabilities(layer, x)
    best_TE = probs_TE >= probs_TE.sort(dim=1, descending=True).values[:, 2:3]
    expected = weighted(layer, x, probs_TE * best_TE / (probs_TE * best_TE).sum(1, keepdim=True))
    out, aux = layer(x)
    assert_close(out, expected, rel=1e-12, name="output")
    assert_same(gradients(layer, x, probe(out)), gradients(layer, x, probe(expected)), rel=1e-12)
    assert_close(values(aux)["load"], best_TE.sum(0) * EXPERTS / (TOKENS * CHOICES), rel=1e-6)


# No token, and evaluation


@every_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("never", [NEVER_REACHED, NOT_MEASURED], ids=["never reached", "not measured"])
def test_no_uncertain_token_leaves_the_layer_as_it_is(router: str, never: BroadcastConfig, dtype: torch.dtype) -> None:
    x, results = inputs().detach().to(dtype).requires_grad_(), []
    for broadcast in (never, None):
        layer = build(router, broadcast).to(dtype)
        out, aux = layer(x)
        results.append((out, aux, gradients(layer, x, probe(out, aux.losses))))
    (out, aux, found), (expected_out, expected_aux, expected) = results
    assert_equal_bits(out, expected_out)
    assert_same(found, expected, rel=None)
    assert values(expected_aux)["drop_share"] > 0, "experts dropped some"
    for name, value in values(expected_aux).items():
        assert_equal_bits(values(aux)[name], value, name=name)
    for name in ("uncertain_share", "broadcast_share", "dropped_uncertain"):
        assert values(aux)[name].item() == 0


@every_router
def test_evaluation_knows_nothing_of_it(router: str) -> None:
    x, results = inputs(), []
    for broadcast in (ALL, None):
        layer = build(router, broadcast).eval()
        out, aux = layer(x)
        results.append((out, aux, gradients(layer, x, probe(out, aux.losses)), plan_of(layer, x)))
    (out, aux, found, plan), (expected_out, expected_aux, expected, _) = results
    assert plan.broadcast is None
    assert_equal_bits(out, expected_out)
    assert_same(found, expected, rel=None)
    assert values(aux).keys() == values(expected_aux).keys()
    for name, value in values(expected_aux).items():
        assert_equal_bits(values(aux)[name], value, name=name)


# Some tokens


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "grap_learned"])
def test_an_uncertain_token_teaches_every_expert_and_is_no_multiple_of_its_input(router: str) -> None:
    layer, x = build(router, some(share=0.01)), inputs()
    with_threshold(layer, x, quantile=0.5)
    plan = plan_of(layer, x)
    assert plan.broadcast is not None
    assert len(plan.broadcast.token_ids_U) == BATCH, "one slot in each sequence"
    probs_TE = literal_probabilities(layer, x)
    for token in plan.broadcast.token_ids_U.tolist():
        out = layer(x)[0].reshape(-1, WIDTH)[token]
        assert_close(out, weighted(layer, x, probs_TE).reshape(-1, WIDTH)[token], rel=1e-12)
        for name, gradient in gradients(layer, x, out.sum()).items():
            if name.startswith("experts."):
                assert all(bool(gradient[expert].any()) for expert in range(EXPERTS)), name
        # The released layer calls no expert for these tokens and returns the last one's probability times x.
        row_D = x.reshape(-1, WIDTH)[token]
        assert (out - probs_TE[token, -1] * row_D).norm().item() > 0.1 * row_D.norm().item()
        assert abs(F.cosine_similarity(out, row_D, dim=0).item()) < 0.99


@every_router
def test_tokens_without_a_slot_go_their_usual_way(router: str) -> None:
    dropless = CapacityConfig(mode="static", factor=float(EXPERTS)) if router == "expert_choice" else CapacityConfig()
    usual, layer, x = build(router, None, dropless), build(router, some(), dropless), inputs()
    with_threshold(layer, x)
    plan, before = plan_of(layer, x), weights_of(plan_of(usual, x))
    assert plan.broadcast is not None
    chosen = set(plan.broadcast.token_ids_U.tolist())
    assert weights_of(plan) == {pair: weight for pair, weight in before.items() if pair[0] not in chosen}
    assert list(weights_of(plan)) == sorted(weights_of(plan), key=lambda pair: pair[::-1]), "the plan's order"
    metrics = values(plan)
    assert len(chosen) == 3 * 5, "at most ceil(.3 * 16) of a sequence"
    assert metrics["broadcast_share"].item() == pytest.approx(len(chosen) / TOKENS)
    assert metrics["uncertain_share"].item() == pytest.approx(0.5)
    load_E = torch.tensor([sum(e == expert for _, e in weights_of(plan)) for expert in range(EXPERTS)])
    assert_close(metrics["load"], (load_E + len(chosen)) * EXPERTS / (TOKENS * CHOICES), rel=1e-6)
    # And so the layer's output is one or the other, token by token.
    expected = weighted(layer, x, literal_probabilities(layer, x)).view(-1, WIDTH)
    expected = torch.stack([(expected if t in chosen else usual(x)[0].view(-1, WIDTH))[t] for t in range(TOKENS)])
    assert_close(layer(x)[0].view(-1, WIDTH), expected, rel=1e-12)


@every_router
def test_losses_and_observations_are_those_of_the_usual_choice(router: str) -> None:
    x = inputs()
    usual, layer = plan_of(build(router, None), x), plan_of(build(router, ALL), x)
    assert usual.losses.keys() == layer.losses.keys()
    assert usual.losses["balance_loss"] > 0
    for name, term in usual.losses.items():
        assert_equal_bits(layer.losses[name], term, name=name)
    assert usual.observations.keys() == layer.observations.keys()
    for name, value in usual.observations.items():
        assert_equal_bits(layer.observations[name], value, name=name)


def test_slots_follow_the_documents_that_the_layer_is_told() -> None:
    layer, x = with_threshold(build("softmax", some(share=0.25)), inputs(), quantile=0.0), inputs()
    documents_BS = torch.tensor([[0] * 9 + [1] * 4 + [-1] * 3, [0] * 16, [-1] * 16])
    seen: list[RoutingPlan] = []
    handle = layer.router.register_forward_hook(lambda module, args, plan: seen.append(plan))
    layer(x, documents=documents_BS)
    handle.remove()
    entropy_T = normalised_entropy(literal_probabilities(layer, x)).tolist()
    expected = set()
    for places, slots in ((range(9), 3), (range(9, 13), 1), (range(16, 32), 4)):
        expected |= set(sorted(places, key=lambda t: -entropy_T[t])[:slots])
    assert seen[0].broadcast is not None
    real_T = (documents_BS.flatten() >= 0).nonzero().squeeze(-1)  # the router sees no padding
    assert set(real_T[seen[0].broadcast.token_ids_U].tolist()) == expected


# With expert choice

CAPACITIES: dict[str, tuple[CapacityConfig, dict[str, Any]]] = {
    "affinity": (STATIC, {"threshold": 0.75}),
    "loose": (CapacityConfig(mode="static", factor=3.0), {"threshold": 0.75}),
    "dropless": (CapacityConfig(), {"threshold": 0.75}),
    "position": (STATIC.model_copy(update={"drop": "position"}), {}),
    "random": (STATIC.model_copy(update={"drop": "random"}), {}),
    "etr_success": (CapacityConfig(mode="etr_success", factor=1.0, minimum=0.1), {"threshold": 0.75}),
}


def pair_of_layers(name: str, x: Tensor) -> tuple[Layer, Layer]:
    """Without and with broadcasting, after a few steps of the running statistics."""
    capacity, settings = CAPACITIES[name]
    layers = []
    for broadcast in (None, some()):
        layer = build(ResonanceRouterConfig(affinity="grap_learned", **settings), broadcast, capacity)
        observations = {key: value.detach() for key, value in plan_of(layer, x).observations.items()}
        for _ in range(30):
            layer.router.update(observations)
        layers.append(layer)
    return layers[0], with_threshold(layers[1], x)


def chose(layer: Layer, x: Tensor) -> dict[tuple[int, int], float]:
    """Affinity by (token, expert), of what the tokens chose."""
    affinity_TK, expert_ids_TK = layer.router.affinity(x.reshape(-1, WIDTH)).topk(CHOICES)
    pairs = zip(expert_ids_TK.tolist(), affinity_TK.tolist(), strict=True)
    return {(t, e): a for t, (es, affinities) in enumerate(pairs) for e, a in zip(es, affinities, strict=True)}


def literal_kept(layer: Layer, candidates: dict[tuple[int, int], float], drop: str) -> set[tuple[int, int]]:
    """ETR's second step, expert by expert."""
    kept = set()
    limits = [TOKENS] * EXPERTS if layer.router.bound is None else layer.router.bound.capacities(TOKENS)
    for expert in range(EXPERTS):
        of_expert = sorted(pair for pair in candidates if pair[1] == expert)
        if drop == "affinity":
            of_expert.sort(key=lambda pair: -candidates[pair])
        goal = layer.router.config.threshold * sum(max(0.0, candidates[pair]) for pair in of_expert)
        reached = 0.0
        for pair in of_expert[: limits[expert]]:
            if layer.router.config.threshold < 1 and reached >= goal > 0:
                break
            kept.add(pair)
            reached += max(0.0, candidates[pair])
    return kept


@pytest.mark.parametrize("name", CAPACITIES)
def test_experts_choose_among_the_others_as_if_they_were_alone(name: str) -> None:
    x = inputs()
    usual, layer = pair_of_layers(name, x)
    plan, before = plan_of(layer, x), plan_of(usual, x)
    assert plan.broadcast is not None
    chosen = set(plan.broadcast.token_ids_U.tolist())
    assert len(chosen) == 15
    others = {pair: a for pair, a in chose(layer, x).items() if pair[0] not in chosen}
    kept, kept_before = set(weights_of(plan)), {p for p in weights_of(before) if p[0] not in chosen}
    assert kept < set(others), "experts still drop some, and no broadcast token is among the assigned ones"
    if name == "random":  # by place, so what was kept before stays, and takes the room that became free
        limits = layer.router.bound.capacities(TOKENS)
        assert kept_before < kept
        for expert in range(EXPERTS):
            wanted = sum(e == expert for _, e in others)
            assert sum(e == expert for _, e in kept) == min(wanted, limits[expert])
    else:
        assert kept == literal_kept(layer, others, layer.router.capacity.drop)
        assert kept != kept_before, "broadcast tokens left room"
    if name == "etr_success":
        assert len(set(layer.router.bound.capacities(TOKENS))) > 1
    assert plan.capacity == before.capacity
    if plan.capacity is not None:
        assert int(plan.rows_per_expert_E.max()) <= plan.capacity


@pytest.mark.parametrize("name", CAPACITIES)
def test_metrics_with_expert_choice(name: str) -> None:
    x = inputs()
    _, layer = pair_of_layers(name, x)
    plan = plan_of(layer, x)
    assert plan.broadcast is not None
    chosen, entropy_T = plan.broadcast.token_ids_U.tolist(), normalised_entropy(literal_probabilities(layer, x))
    lost = {t: CHOICES - sum(t == token for token, _ in weights_of(plan)) for t in range(TOKENS) if t not in chosen}
    uncertain = [t for t in lost if entropy_T[t] >= layer.router.broadcast.threshold]
    metrics = values(plan)
    assert len(uncertain) == TOKENS // 2 - len(chosen)
    assert metrics["drop_share"].item() == pytest.approx(sum(lost.values()) / (TOKENS * CHOICES))
    assert metrics["unserved_share"].item() == pytest.approx(list(lost.values()).count(CHOICES) / TOKENS)
    dropped_uncertain = sum(lost[t] for t in uncertain) / sum(lost.values())
    assert metrics["dropped_uncertain"].item() == pytest.approx(dropped_uncertain)
    assert 0 < dropped_uncertain < 1
    assert metrics["entropy_histogram"].sum().item() == pytest.approx(1.0)
    load_E = torch.tensor([sum(e == expert for _, e in weights_of(plan)) + len(chosen) for expert in range(EXPERTS)])
    assert_close(metrics["load"], load_E * EXPERTS / (TOKENS * CHOICES), rel=1e-6)
    assert metrics["max_load"].item() == pytest.approx(float(load_E.max()) * EXPERTS / (TOKENS * CHOICES))


@pytest.mark.parametrize("name", ["affinity", "random"])
def test_gradients_with_expert_choice(name: str) -> None:
    """Each token's weights are the plan's, or the whole distribution; then written out."""
    x = inputs()
    _, layer = pair_of_layers(name, x)
    plan, probs_TE = plan_of(layer, x), literal_probabilities(layer, x)
    assert plan.broadcast is not None
    chosen, kept = set(plan.broadcast.token_ids_U.tolist()), weights_of(plan)
    choices = {t: [e for token, e in chose(layer, x) if token == t] for t in range(TOKENS)}
    rows = []
    for t in range(TOKENS):
        mass = 1.0 if t in chosen else probs_TE[t, choices[t]].sum()
        takes = torch.tensor([float(t in chosen or (t, e) in kept) for e in range(EXPERTS)])
        rows.append(probs_TE[t] / mass * takes)
    weights_TE = torch.stack(rows)
    expected = torch.stack(
        [
            sum((w * expert_output(layer, e, row) for e, w in enumerate(ws) if w != 0), torch.zeros_like(row))
            for row, ws in zip(x.reshape(-1, WIDTH), weights_TE, strict=True)
        ]
    ).view(x.shape)
    out, _ = layer(x)
    assert_close(out, expected, rel=1e-12)
    assert_same(gradients(layer, x, probe(out)), gradients(layer, x, probe(expected)), rel=1e-12)


def test_expert_choice_fills_its_capacity_with_other_tokens() -> None:
    layer, x = build("expert_choice", some()), inputs()
    with_threshold(layer, x)
    plan, scores_TE = plan_of(layer, x), literal_probabilities(layer, x)
    assert plan.broadcast is not None
    chosen = set(plan.broadcast.token_ids_U.tolist())
    capacity = layer.router.bound.capacities(TOKENS)[0]
    for expert in range(EXPERTS):
        others = sorted(set(range(TOKENS)) - chosen, key=lambda t: -scores_TE[t, expert].item())
        assert {t for t, e in weights_of(plan) if e == expert} == set(others[:capacity])
