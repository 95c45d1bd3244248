"""What every router promises: the plan's order, expert choice in training only, no traces."""

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig, MoEConfig, ResonanceRouterConfig, TopKRouterConfig
from megamoe.moe.routers import build_router
from megamoe.moe.routers.base import Router
from megamoe.moe.types import RoutingPlan
from megamoe.testing import assert_close, assert_equal_bits

TOKENS, WIDTH, EXPERTS, CHOICES = 60, 20, 6, 2
ROUTERS = {
    "softmax": TopKRouterConfig(),
    "sigmoid": TopKRouterConfig(score="sigmoid", bias_update_rate=0.01),
    "grap": ResonanceRouterConfig(affinity="grap", threshold=0.9),
    "grap_learned": ResonanceRouterConfig(affinity="grap_learned"),
    "cosine": ResonanceRouterConfig(affinity="cosine", centre=True, orthogonality_loss=0.0),
}
STATIC = CapacityConfig(mode="static", factor=0.7)
every_router = pytest.mark.parametrize("name", ROUTERS)


def build(name: str, capacity: CapacityConfig = STATIC) -> Router:
    config = MoEConfig(num_experts=EXPERTS, top_k=CHOICES, router=ROUTERS[name], capacity=capacity)
    router = build_router(config, WIDTH)
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, mean=1.0, generator=generator)
    if hasattr(router, "log_scale"):
        torch.nn.init.constant_(router.log_scale, 2.0)
    return router


def rows(number: int = TOKENS) -> Tensor:
    """Tokens that prefer the first features, so that some experts are over capacity."""
    rows_TD = torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(2))
    rows_TD[:, :4] += 1.0
    return rows_TD


def pairs(plan: RoutingPlan) -> list[tuple[int, int]]:
    """(expert, token) in the plan's order."""
    return list(zip(plan.expert_ids_A.tolist(), plan.token_ids_A.tolist(), strict=True))


@every_router
def test_the_order_is_by_expert_and_then_by_token(name: str) -> None:
    router = build(name)
    for plan in (router(rows()), router.eval()(rows())):
        assert pairs(plan) == sorted(set(pairs(plan)))
        counts = [sum(e == expert for e, _ in pairs(plan)) for expert in range(EXPERTS)]
        assert plan.rows_per_expert_E.tolist() == counts
        assert plan.rows_per_expert_E.dtype == plan.token_ids_A.dtype == plan.expert_ids_A.dtype == torch.int64
        assert plan.weights_A.shape == plan.token_ids_A.shape


@every_router
def test_experts_keep_a_part_of_what_chose_them_with_unchanged_weights(name: str) -> None:
    router, rows_TD = build(name), rows()
    bounded = router(rows_TD)
    free = router.eval()(rows_TD)
    weights = dict(zip(pairs(free), free.weights_A.tolist(), strict=True))
    assert set(pairs(bounded)) < set(pairs(free)), "something is dropped, and nothing is added"
    assert len(pairs(free)) == TOKENS * CHOICES
    for pair, weight in zip(pairs(bounded), bounded.weights_A.tolist(), strict=True):
        assert weight == weights[pair]
    capacity = build(name).capacity_for(TOKENS)
    assert capacity is not None
    assert int(bounded.rows_per_expert_E.max()) <= capacity


@every_router
def test_a_capacity_of_all_tokens_is_plain_top_k(name: str) -> None:
    wide = build(name, CapacityConfig(mode="static", factor=float(EXPERTS)))
    if name == "grap":
        wide.config = wide.config.model_copy(update={"threshold": 1.0})
    assert wide.capacity_for(TOKENS) == TOKENS
    bounded, free = wide(rows()), wide.eval()(rows())
    assert pairs(bounded) == pairs(free)
    assert_equal_bits(bounded.weights_A, free.weights_A)


@every_router
def test_a_forward_pass_moves_nothing(name: str) -> None:
    router = build(name)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    first, second = router(rows()), router(rows())
    for key, value in router.state_dict().items():
        assert_equal_bits(value, before[key], name=key)
    assert pairs(first) == pairs(second)
    for key in first.observations:
        assert_equal_bits(first.observations[key], second.observations[key], name=key)


@every_router
def test_metrics_say_what_was_dropped(name: str) -> None:
    plan = build(name)(rows())
    values = {key: value for key, (value, _) in plan.metrics.items()}
    served = {token for _, token in pairs(plan)}
    assert values["drop_share"].item() == pytest.approx(1 - len(pairs(plan)) / (TOKENS * CHOICES))
    assert values["unserved_share"].item() == pytest.approx(1 - len(served) / TOKENS)
    load_E = plan.rows_per_expert_E / (TOKENS * CHOICES / EXPERTS)
    assert_close(values["load"], load_E, rel=1e-6)
    assert values["max_load"].item() == pytest.approx(load_E.max().item())
    assert {key: how for key, (_, how) in plan.metrics.items()}["max_load"] == "max"
    assert 0.0 < values["router_entropy"].item() <= 1.0


@every_router
def test_no_rows_are_no_problem(name: str) -> None:
    router, rows_TD = build(name), rows(0).requires_grad_()
    plan = router(rows_TD)
    assert pairs(plan) == []
    assert plan.rows_per_expert_E.tolist() == [0] * EXPERTS
    assert {key: value.item() for key, (value, _) in plan.metrics.items() if key.endswith("share")} == {
        "drop_share": 0.0,
        "unserved_share": 0.0,
    }
    loss = sum(plan.losses.values(), plan.weights_A.sum())
    loss.backward()
    for key, parameter in router.named_parameters():
        assert parameter.grad is not None, key
        assert not bool(parameter.grad.any()), key
    for key, value in plan.observations.items():
        assert not bool(value.any()), key


@every_router
def test_evaluation_does_not_look_across_the_batch(name: str) -> None:
    router, rows_TD = build(name).eval(), rows()
    whole = router(rows_TD)
    alone = set()
    for token in range(TOKENS):
        alone |= {(expert, token) for expert, _ in pairs(router(rows_TD[token : token + 1]))}
    assert alone == set(pairs(whole))
