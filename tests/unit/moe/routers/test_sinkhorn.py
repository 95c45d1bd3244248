"""Sinkhorn assignment against a loop in Python numbers."""

import math

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import SinkhornRouterConfig
from megamoe.moe.routers.base import RouterSize
from megamoe.moe.routers.sinkhorn import SinkhornRouter, log_assignment
from megamoe.moe.types import RoutingPlan
from megamoe.testing import assert_close

TOKENS, WIDTH, EXPERTS = 64, 12, 4


def build(top_k: int = 1, capacity: CapacityConfig | None = None, **settings: float) -> SinkhornRouter:
    size = RouterSize(WIDTH, EXPERTS, top_k)
    router = SinkhornRouter(SinkhornRouterConfig(**settings), size, capacity or CapacityConfig())
    torch.nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    return router


def rows() -> Tensor:
    """Tokens that share a direction, so that by themselves most would choose the same experts."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)) + 0.7


def literal(logits_TE: Tensor, iterations: int) -> list[list[float]]:
    matrix = [[math.exp(v) for v in row] for row in logits_TE.tolist()]
    for _ in range(iterations):
        matrix = [[v / sum(row) for v in row] for row in matrix]
        totals = [sum(row[e] for row in matrix) for e in range(EXPERTS)]
        matrix = [[v / total * TOKENS / EXPERTS for v, total in zip(row, totals, strict=True)] for row in matrix]
    return matrix


def as_dict(plan: RoutingPlan) -> dict[tuple[int, int], float]:
    found = list(zip(plan.token_ids_A.tolist(), plan.expert_ids_A.tolist(), strict=True))
    return dict(zip(found, plan.weights_A.tolist(), strict=True))


def expected(router: SinkhornRouter, rows_TD: Tensor, ranked_by: list[list[float]]) -> dict[tuple[int, int], float]:
    """The K experts of highest value, with weights from the softmax of the logits."""
    weights = {}
    for token, logits in enumerate((rows_TD @ router.weight.detach().t()).tolist()):
        chosen = sorted(range(EXPERTS), key=lambda e, t=token: -ranked_by[t][e])[: router.top_k]
        mass = sum(map(math.exp, logits if router.top_k == 1 else [logits[e] for e in chosen]))
        weights |= {(token, e): math.exp(logits[e]) / mass for e in chosen}
    return weights


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_the_assignment_against_a_loop(iterations: int) -> None:
    logits_TE = rows() @ build().weight.detach().t()
    assigned_TE = log_assignment(logits_TE, iterations).exp()
    assert_close(assigned_TE, torch.tensor(literal(logits_TE, iterations)), rel=1e-4)
    assert_close(assigned_TE.sum(0), torch.full((EXPERTS,), TOKENS / EXPERTS), rel=1e-5)


def test_many_iterations_satisfy_tokens_and_experts_even_with_large_logits() -> None:
    logits_TE = 40 * (rows() @ build().weight.detach().t())
    assert float(logits_TE.max()) > 100, "exp of it is infinite in fp32"
    assigned_TE = log_assignment(logits_TE, 3000).exp()
    assert bool(assigned_TE.isfinite().all())
    assert_close(assigned_TE.sum(0), torch.full((EXPERTS,), TOKENS / EXPERTS), rel=1e-4)
    assert_close(assigned_TE.sum(1), torch.ones(TOKENS), rel=2e-2)


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_training_chooses_by_the_assignment_and_evaluation_by_the_logits(top_k: int) -> None:
    router, rows_TD = build(top_k), rows()
    logits_TE = rows_TD @ router.weight.detach().t()
    in_training, in_evaluation = as_dict(router(rows_TD)), as_dict(router.eval()(rows_TD))
    assert in_training == pytest.approx(expected(router, rows_TD, literal(logits_TE, 8)), rel=1e-4)
    assert in_evaluation == pytest.approx(expected(router, rows_TD, logits_TE.tolist()), rel=1e-4)
    assert (in_training.keys() == in_evaluation.keys()) == (top_k == EXPERTS)


def test_the_load_is_more_even_than_the_tokens_own_choice() -> None:
    router, rows_TD = build(), rows()
    balanced = router(rows_TD).metrics["max_load"][0].item()
    alone = router.eval()(rows_TD).metrics["max_load"][0].item()
    assert alone > 1.6
    assert balanced < 1.3


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_pass_through_the_weights_and_not_the_assignment(top_k: int) -> None:
    router, rows_TD = build(top_k), rows().requires_grad_()
    plan = router(rows_TD)
    probe_A = torch.randn(len(plan.weights_A), generator=torch.Generator().manual_seed(7))
    got = torch.autograd.grad((plan.weights_A * probe_A).sum(), [router.weight, rows_TD])
    scores_TE = (rows_TD @ router.weight.t()).softmax(-1)
    if top_k > 1:
        chosen_TE = torch.zeros(TOKENS, EXPERTS)
        chosen_TE[plan.token_ids_A, plan.expert_ids_A] = 1.0
        scores_TE = scores_TE / (scores_TE * chosen_TE).sum(-1, keepdim=True)
    loss = (scores_TE[plan.token_ids_A, plan.expert_ids_A] * probe_A).sum()
    for name, a, b in zip(("weight", "rows"), got, torch.autograd.grad(loss, [router.weight, rows_TD]), strict=True):
        assert_close(a, b, rel=1e-5, name=name)


def test_the_balance_loss_counts_what_evaluation_would_choose() -> None:
    router, rows_TD = build(balance_loss=0.5), rows()
    probs_TE = (rows_TD @ router.weight.detach().t()).softmax(-1)
    share_E = torch.bincount(probs_TE.argmax(-1), minlength=EXPERTS) / TOKENS
    by_hand = 0.5 * EXPERTS * float(share_E @ probs_TE.mean(0))
    assert router(rows_TD).losses["balance_loss"].item() == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 0.55, "not the balanced assignment, which would give 0.5"
    assert build()(rows_TD).losses == {}


def test_static_capacity_drops_the_lowest_scores() -> None:
    router, rows_TD = build(2, CapacityConfig(mode="static", factor=0.6)), rows()
    free = as_dict(build(2)(rows_TD))
    scores_TE = (rows_TD @ router.weight.detach().t()).softmax(-1)
    kept = set()
    for expert in range(EXPERTS):
        takers = [t for t, e in free if e == expert]
        takers.sort(key=lambda t, e=expert: -scores_TE[t, e].item())
        kept |= {(t, expert) for t in takers[:20]}  # .6 * 2 * 64 / 4 = 19.2
    assert as_dict(router(rows_TD)) == {pair: free[pair] for pair in free if pair in kept}
    assert len(kept) < len(free)
