"""Forced balance."""

import pytest
import torch

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import BalancedRouterConfig
from megamoe.moe.routers.balanced import BalancedRouter
from megamoe.moe.routers.base import RouterSize


def build(experts: int, top_k: int, capacity: CapacityConfig | None = None) -> BalancedRouter:
    return BalancedRouter(BalancedRouterConfig(), RouterSize(8, experts, top_k), capacity or CapacityConfig())


@pytest.mark.parametrize("tokens, experts, top_k", [(12, 6, 2), (13, 6, 2), (7, 5, 5), (3, 8, 1), (1, 1, 1)])
def test_experts_take_turns(tokens: int, experts: int, top_k: int) -> None:
    plan = build(experts, top_k)(torch.zeros(tokens, 8))
    expected = sorted(((t * top_k + k) % experts, t) for t in range(tokens) for k in range(top_k))
    assert list(zip(plan.expert_ids_A.tolist(), plan.token_ids_A.tolist(), strict=True)) == expected
    loads = plan.rows_per_expert_E.tolist()
    assert max(loads) - min(loads) <= 1
    assert plan.weights_A.tolist() == pytest.approx([1 / top_k] * tokens * top_k)
    assert plan.losses == plan.observations == {}


def test_the_static_capacity_of_factor_1_drops_nothing() -> None:
    capacity = CapacityConfig(mode="static", factor=1.0)
    assert build(6, 2, capacity)(torch.zeros(61, 8)).metrics["drop_share"][0].item() == 0.0


def test_over_capacity_the_latest_tokens_are_dropped() -> None:
    plan = build(4, 2, CapacityConfig(mode="static", factor=0.5))(torch.zeros(40, 8))  # 10 of 20
    for expert in range(4):
        kept = plan.token_ids_A[plan.expert_ids_A == expert].tolist()
        assert kept == [t for t in range(40) if expert in (2 * t % 4, (2 * t + 1) % 4)][:10]


def test_nothing_is_learned_or_stored() -> None:
    router = build(4, 2)
    assert list(router.parameters()) == []
    assert router.state_dict() == {}
