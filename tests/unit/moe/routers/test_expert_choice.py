"""Expert choice against a loop over experts."""

import math

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import ExpertChoiceRouterConfig
from megamoe.moe.routers.base import RouterSize
from megamoe.moe.routers.expert_choice import ExpertChoiceRouter, best_tokens
from megamoe.moe.types import RoutingPlan
from megamoe.testing import assert_close

TOKENS, WIDTH, EXPERTS = 48, 12, 6


def build(factor: float = 1.0, top_k: int = 2, **settings: float) -> ExpertChoiceRouter:
    capacity = CapacityConfig(mode="static", factor=factor)
    router = ExpertChoiceRouter(ExpertChoiceRouterConfig(**settings), RouterSize(WIDTH, EXPERTS, top_k), capacity)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    return router


def rows(number: int = TOKENS) -> Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(2))


def as_dict(plan: RoutingPlan) -> dict[tuple[int, int], float]:
    found = list(zip(plan.expert_ids_A.tolist(), plan.token_ids_A.tolist(), strict=True))
    assert found == sorted(set(found)), "by expert, then by token, none twice"
    return dict(zip(found, plan.weights_A.tolist(), strict=True))


def scores(router: ExpertChoiceRouter, rows_TD: Tensor) -> list[list[float]]:
    """[T][E] in Python numbers."""
    result = []
    for row in rows_TD.tolist():
        logits = [sum(w * x for w, x in zip(vector, row, strict=True)) for vector in router.weight.tolist()]
        result.append([math.exp(v) / sum(map(math.exp, logits)) for v in logits])
    return result


@pytest.mark.parametrize("factor, capacity", [(0.5, 8), (1.0, 16), (1.3, 21), (6.0, TOKENS)])
def test_training_against_a_loop(factor: float, capacity: int) -> None:
    router, rows_TD = build(factor), rows()
    table, expected = scores(router, rows_TD), {}
    for expert in range(EXPERTS):
        best = sorted(range(TOKENS), key=lambda t, e=expert: -table[t][e])[:capacity]
        expected |= {(expert, t): table[t][expert] for t in best}
    plan = router(rows_TD)
    assert as_dict(plan) == pytest.approx(expected, rel=1e-4)
    assert plan.rows_per_expert_E.tolist() == [capacity] * EXPERTS
    assert plan.metrics["max_load"][0].item() == pytest.approx(capacity / 16)
    served = [sum((e, t) in expected for e in range(EXPERTS)) for t in range(TOKENS)]
    assert max(served) > 2, "a token may get more than K experts"
    missing = sum(max(0, 2 - n) for n in served)
    assert plan.metrics["drop_share"][0].item() == pytest.approx(missing / (2 * TOKENS))


def test_evaluation_is_token_choice_of_the_same_scores() -> None:
    router, rows_TD = build().eval(), rows()
    table, expected = scores(router, rows_TD), {}
    for token in range(TOKENS):
        best = sorted(range(EXPERTS), key=lambda e, t=token: -table[t][e])[:2]
        expected |= {(e, token): table[token][e] for e in best}
    plan = router(rows_TD)
    assert as_dict(plan) == pytest.approx(expected, rel=1e-4)
    assert plan.capacity is None


def test_of_equal_scores_the_earlier_token_is_taken() -> None:
    scores_TE = torch.tensor([0.1, 0.5, 0.5, 0.1, 0.5, 0.9])[:, None].expand(6, 3)
    assert best_tokens(scores_TE, 3).tolist() == [[1, 2, 5]] * 3
    assert best_tokens(scores_TE, 0).shape == (3, 0)


def test_gradients_reach_router_and_rows_through_the_scores() -> None:
    router, rows_TD = build(), rows().requires_grad_()
    plan = router(rows_TD)
    probe_A = torch.randn(len(plan.weights_A), generator=torch.Generator().manual_seed(7))
    got = torch.autograd.grad((plan.weights_A * probe_A).sum(), [router.weight, rows_TD])
    scores_TE = (rows_TD @ router.weight.t()).softmax(-1)
    loss = (scores_TE[plan.token_ids_A, plan.expert_ids_A] * probe_A).sum()
    for name, a, b in zip(("weight", "rows"), got, torch.autograd.grad(loss, [router.weight, rows_TD]), strict=True):
        assert_close(a, b, rel=1e-5, name=name)


def test_the_balance_loss_counts_what_tokens_would_choose() -> None:
    router, rows_TD = build(balance_loss=0.5, z_loss=0.25), rows()
    table = torch.tensor(scores(router, rows_TD))
    share_E = torch.bincount(table.topk(2).indices.flatten(), minlength=EXPERTS) / (2 * TOKENS)
    terms = router(rows_TD).losses
    assert terms["balance_loss"].item() == pytest.approx(0.5 * EXPERTS * float(share_E @ table.mean(0)), rel=1e-4)
    logits_TE = rows_TD @ router.weight.detach().t()
    assert terms["z_loss"].item() == pytest.approx(0.25 * logits_TE.logsumexp(-1).square().mean().item(), rel=1e-4)
    assert build()(rows_TD).losses == {}
