"""Top-k routing against a loop over tokens, and the loss-free bias."""

import math

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import TopKRouterConfig
from megamoe.moe.routers.base import RouterSize
from megamoe.moe.routers.topk import TopKRouter, within_best_groups
from megamoe.moe.types import RoutingPlan
from megamoe.testing import assert_close

TOKENS, WIDTH, EXPERTS = 40, 12, 6


def build(top_k: int = 2, capacity: CapacityConfig | None = None, **settings) -> TopKRouter:
    size = RouterSize(WIDTH, EXPERTS, top_k)
    router = TopKRouter(TopKRouterConfig(**settings), size, capacity or CapacityConfig())
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(router.weight, generator=generator)
    return router


def rows(number: int = TOKENS) -> Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(2))


def as_dict(plan: RoutingPlan) -> dict[tuple[int, int], float]:
    """(token, expert) to weight; fails on a pair that occurs twice."""
    pairs = list(zip(plan.token_ids_A.tolist(), plan.expert_ids_A.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    return dict(zip(pairs, plan.weights_A.tolist(), strict=True))


def literal(router: TopKRouter, rows_TD: Tensor) -> dict[tuple[int, int], float]:
    """Token by token in Python numbers."""
    weights, config = {}, router.config
    for token, row in enumerate(rows_TD.tolist()):
        logits = [sum(w * x for w, x in zip(vector, row, strict=True)) for vector in router.weight.tolist()]
        if config.score == "softmax":
            total = sum(math.exp(v) for v in logits)
            scores = [math.exp(v) / total for v in logits]
        else:
            scores = [1 / (1 + math.exp(-v)) for v in logits]
        biased = [score + bias for score, bias in zip(scores, router.bias_E.tolist(), strict=True)]
        allowed = literal_groups(biased, config.num_groups, config.top_groups)
        chosen = sorted(allowed, key=lambda e: -biased[e])[: router.top_k]
        normalise = router.top_k > 1 and (config.score == "sigmoid" or config.normalize_weights)
        mass = sum(scores[e] for e in chosen) if normalise else 1.0
        weights |= {(token, e): scores[e] / mass for e in chosen}
    return weights


def literal_groups(selection: list[float], num_groups: int, top_groups: int) -> list[int]:
    """The experts of the best groups, each ranked by its two best experts."""
    size = len(selection) // num_groups
    groups = [list(range(first, first + size)) for first in range(0, len(selection), size)]
    ranks = [sum(sorted((selection[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(num_groups), key=lambda g: -ranks[g])[:top_groups]
    return sorted(e for g in best for e in groups[g])


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize(
    "settings", [{}, {"normalize_weights": False}, {"score": "sigmoid", "bias_update_rate": 0.1}], ids=str
)
def test_against_a_loop(top_k: int, settings: dict[str, object]) -> None:
    router, rows_TD = build(top_k, **settings), rows()
    if router.config.bias_update_rate:
        router.bias_E.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    plan, expected = router(rows_TD), literal(router, rows_TD)
    assert as_dict(plan) == pytest.approx(expected, rel=1e-4)
    assert plan.weights_A.dtype == plan.logits_TE.dtype == torch.float32
    assert len(expected) == TOKENS * top_k


GROUPS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (6, 1), (6, 4)]


@pytest.mark.parametrize("num_groups, top_groups", GROUPS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_group_limits_against_a_loop(score: str, num_groups: int, top_groups: int) -> None:
    top_k = min(2, top_groups * EXPERTS // num_groups)
    settings = {"num_groups": num_groups, "top_groups": top_groups, "bias_update_rate": 0.1}
    router, rows_TD = build(top_k, score=score, **settings), rows()
    router.bias_E.copy_(torch.tensor([0.3, -0.9, 0.0, 0.2, -0.1, 0.1]))  # some scores become negative with it
    plan, expected = router(rows_TD), literal(router, rows_TD)
    assert as_dict(plan) == pytest.approx(expected, rel=1e-4)
    free = build(top_k, score=score, bias_update_rate=0.1)
    free.bias_E.copy_(router.bias_E)
    limited = num_groups > 1 and top_groups < num_groups and (num_groups < EXPERTS or top_k > top_groups)
    assert (set(literal(free, rows_TD)) != set(expected)) == limited


def test_a_group_ranks_by_its_two_best_experts() -> None:
    config = TopKRouterConfig(num_groups=3, top_groups=1)
    selection_TE = torch.tensor([[0.9, 0.0, 0.5, 0.5, -0.2, 0.8], [-5.0, -6.0, -1.0, -9.0, -4.0, -5.0]])
    inf = math.inf
    limited = within_best_groups(selection_TE, config).tolist()
    assert limited[0] == pytest.approx([-inf, -inf, 0.5, 0.5, -inf, -inf])
    assert limited[1] == pytest.approx([-inf, -inf, -inf, -inf, -4.0, -5.0]), "also where all are negative"
    assert within_best_groups(selection_TE[:0], config).shape == (0, 6)


def test_the_bias_decides_the_choice_and_not_the_weight() -> None:
    router, rows_TD = build(score="sigmoid", bias_update_rate=0.1), rows()
    before = as_dict(router(rows_TD))
    router.bias_E[3] = 10.0
    plan = router(rows_TD)
    after = as_dict(plan)
    assert int(plan.rows_per_expert_E[3]) == TOKENS
    scores_TE = (rows_TD @ router.weight.t()).sigmoid()
    for token in range(TOKENS):
        experts = [e for t, e in after if t == token]
        mass = sum(scores_TE[token, e].item() for e in experts)
        for e in experts:
            assert after[token, e] == pytest.approx(scores_TE[token, e].item() / mass, rel=1e-4)
    assert before != after


def test_the_bias_moves_against_the_load() -> None:
    router = build(score="sigmoid", bias_update_rate=0.25)
    router.update({"chosen_per_expert": torch.tensor([10.0, 0.0, 4.0, 4.0, 3.0, 3.0])})
    assert router.bias_E.tolist() == [-0.25, 0.25, 0.0, 0.0, 0.25, 0.25]


def test_the_bias_balances_a_skewed_load() -> None:
    router, rows_TD = build(top_k=1, score="sigmoid", bias_update_rate=0.01), rows(512) + 0.5
    loads = []
    for _ in range(100):
        plan = router(rows_TD)
        loads.append(plan.rows_per_expert_E.max().item() * EXPERTS / 512)
        router.update(plan.observations)
    assert loads[0] > 1.5
    assert loads[-1] < 1.3


def test_observations_of_micro_batches_add_up() -> None:
    router, rows_TD = build(score="sigmoid", bias_update_rate=0.1), rows()
    whole = router(rows_TD).observations["chosen_per_expert"]
    parts = [router(part).observations["chosen_per_expert"] for part in rows_TD.split(13)]
    assert whole.tolist() == sum(parts).tolist()
    assert whole.tolist() == router(rows_TD).rows_per_expert_E.tolist()
    assert build()(rows_TD).observations == {}


def test_gradients_reach_router_and_rows_through_the_weights() -> None:
    router, rows_TD = build(), rows().requires_grad_()
    plan = router(rows_TD)
    probe_A = torch.randn(len(plan.weights_A), generator=torch.Generator().manual_seed(7))
    got = torch.autograd.grad((plan.weights_A * probe_A).sum(), [router.weight, rows_TD])
    scores_TE = (rows_TD @ router.weight.t()).softmax(-1)
    chosen_TE = torch.zeros(TOKENS, EXPERTS)
    chosen_TE[plan.token_ids_A, plan.expert_ids_A] = 1.0
    weights_TE = scores_TE / (scores_TE * chosen_TE).sum(-1, keepdim=True)
    loss = (weights_TE[plan.token_ids_A, plan.expert_ids_A] * probe_A).sum()
    expected = torch.autograd.grad(loss, [router.weight, rows_TD])
    for name, a, b in zip(("weight", "rows"), got, expected, strict=True):
        assert_close(a, b, rel=1e-5, name=name)


def test_the_logits_of_a_bf16_model_are_computed_in_fp32() -> None:
    router, rows_TD = build().bfloat16(), rows().bfloat16()
    plan = router(rows_TD)
    assert_close(plan.logits_TE, rows_TD.float() @ router.weight.detach().float().t(), rel=1e-6)
    assert plan.weights_A.dtype == torch.float32


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_loss_is_its_coefficient_where_nothing_is_preferred(score: str) -> None:
    router = build(score=score, balance_loss=0.25, z_loss=0.5)
    torch.nn.init.zeros_(router.weight)
    terms = router(rows()).losses
    assert terms["balance_loss"].item() == pytest.approx(0.25)
    assert terms["z_loss"].item() == pytest.approx(0.5 * math.log(EXPERTS) ** 2)


def test_losses_without_coefficient_are_absent() -> None:
    assert build(balance_loss=0.0)(rows()).losses == {}


def test_static_capacity_drops_the_lowest_scores() -> None:
    router, rows_TD = build(capacity=CapacityConfig(mode="static", factor=0.5)), rows(96)
    router.weight.data[0] *= 3
    plan = router(rows_TD)
    capacity = 16  # .5 * 2 * 96 / 6
    choices = {}
    scores_TE = (rows_TD @ router.weight.t()).softmax(-1)
    full = as_dict(router.eval()(rows_TD))
    for token, expert in full:
        choices.setdefault(expert, []).append((scores_TE[token, expert].item(), token))
    expected = {
        (token, expert): full[token, expert]
        for expert, found in choices.items()
        for _, token in sorted(found, reverse=True)[:capacity]
    }
    assert as_dict(plan) == pytest.approx(expected)
    assert len(expected) < len(full)
