"""What every router promises: the plan's order, expert choice in training only, no traces."""

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import (
    BalancedRouterConfig,
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    ResonanceRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    TopKRouterConfig,
)
from megamoe.moe.routers import RouterSize, Rows, build_router
from megamoe.moe.routers.base import Router
from megamoe.moe.types import RoutingPlan
from megamoe.testing import assert_close, assert_equal_bits

TOKENS, WIDTH, EXPERTS, CHOICES, VOCABULARY = 60, 20, 6, 2, 50
ROUTERS: dict[str, RouterConfig] = {
    "softmax": TopKRouterConfig(),
    "sigmoid": TopKRouterConfig(score="sigmoid", bias_update_rate=0.01),
    "groups": TopKRouterConfig(score="sigmoid", bias_update_rate=0.01, num_groups=3, top_groups=2),
    "grap": ResonanceRouterConfig(affinity="grap", threshold=0.9),
    "grap_learned": ResonanceRouterConfig(affinity="grap_learned"),
    "cosine": ResonanceRouterConfig(affinity="cosine", centre=True, orthogonality_loss=0.0),
    "expert_choice": ExpertChoiceRouterConfig(balance_loss=0.01),
    "sinkhorn": SinkhornRouterConfig(balance_loss=0.01),
    "hash": HashRouterConfig(),
    "balanced": BalancedRouterConfig(),
}
STATIC = CapacityConfig(mode="static", factor=0.7)
every_router = pytest.mark.parametrize("name", ROUTERS)
# With expert choice, tokens choose nothing that experts could keep a part of.
token_choice = pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
# Balanced goes by the place in the batch, which is why it is not a way to learn.
independent_tokens = pytest.mark.parametrize("name", [name for name in ROUTERS if name != "balanced"])


def build(name: str, capacity: CapacityConfig = STATIC, **settings: float) -> Router:
    config = ROUTERS[name].model_copy(update=settings)
    router = build_router(config, RouterSize(WIDTH, EXPERTS, CHOICES, VOCABULARY), capacity)
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, mean=1.0, generator=generator)
    if hasattr(router, "log_scale"):
        torch.nn.init.constant_(router.log_scale, 2.0)
    return router


def tokens(number: int = TOKENS) -> Tensor:
    """Vocabulary entries, some often and most never."""
    drawn = torch.randint(0, VOCABULARY, (number,), generator=torch.Generator().manual_seed(3))
    return drawn // 3


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
    for plan in (router(rows(), Rows(tokens())), router.eval()(rows(), Rows(tokens()))):
        assert pairs(plan) == sorted(set(pairs(plan)))
        counts = [sum(e == expert for e, _ in pairs(plan)) for expert in range(EXPERTS)]
        assert plan.rows_per_expert_E.tolist() == counts
        assert plan.rows_per_expert_E.dtype == plan.token_ids_A.dtype == plan.expert_ids_A.dtype == torch.int64
        assert plan.weights_A.shape == plan.token_ids_A.shape


def without_limits(name: str) -> RoutingPlan:
    """What the tokens chose in training."""
    settings = {"threshold": 1.0} if name == "grap" else {}
    return build(name, CapacityConfig(), **settings)(rows(), Rows(tokens()))


@token_choice
def test_experts_keep_a_part_of_what_chose_them_with_unchanged_weights(name: str) -> None:
    router, free = build(name), without_limits(name)
    bounded = router(rows(), Rows(tokens()))
    weights = dict(zip(pairs(free), free.weights_A.tolist(), strict=True))
    assert set(pairs(bounded)) < set(pairs(free)), "something is dropped, and nothing is added"
    assert len(pairs(free)) == TOKENS * CHOICES
    for pair, weight in zip(pairs(bounded), bounded.weights_A.tolist(), strict=True):
        assert weight == weights[pair]
    assert int(bounded.rows_per_expert_E.max()) <= 14  # .7 * 2 * 60 / 6
    assert free.capacity is None
    assert bounded.capacity == 16, "rounded up to the tile"


@token_choice
@pytest.mark.parametrize("drop", ["affinity", "position", "random"])
def test_every_way_to_drop_fills_the_same_capacity(name: str, drop: str) -> None:
    capacity = STATIC.model_copy(update={"drop": drop})
    settings = {"threshold": 1.0} if name == "grap" else {}
    bounded = build(name, capacity, **settings)(rows(), Rows(tokens()))
    wanted_E = without_limits(name).rows_per_expert_E
    assert bounded.rows_per_expert_E.tolist() == wanted_E.clamp_max(14).tolist()


@token_choice
def test_a_capacity_of_all_tokens_drops_nothing(name: str) -> None:
    settings = {"threshold": 1.0} if name == "grap" else {}
    bounded = build(name, CapacityConfig(mode="static", factor=float(EXPERTS)), **settings)(rows(), Rows(tokens()))
    free = without_limits(name)
    assert bounded.capacity == TOKENS
    assert pairs(bounded) == pairs(free)
    assert_equal_bits(bounded.weights_A, free.weights_A)


@every_router
def test_a_forward_pass_moves_nothing(name: str) -> None:
    router = build(name)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    first, second = router(rows(), Rows(tokens())), router(rows(), Rows(tokens()))
    for key, value in router.state_dict().items():
        assert_equal_bits(value, before[key], name=key)
    assert pairs(first) == pairs(second)
    for key in first.observations:
        assert_equal_bits(first.observations[key], second.observations[key], name=key)


@every_router
def test_metrics_say_what_was_dropped(name: str) -> None:
    plan = build(name)(rows(), Rows(tokens()))
    values = {key: value for key, (value, _) in plan.metrics.items()}
    served = [sum(token == t for _, token in pairs(plan)) for t in range(TOKENS)]
    missing = sum(max(0, CHOICES - experts) for experts in served)
    assert values["drop_share"].item() == pytest.approx(missing / (TOKENS * CHOICES))
    assert values["unserved_share"].item() == pytest.approx(served.count(0) / TOKENS)
    load_E = plan.rows_per_expert_E / (TOKENS * CHOICES / EXPERTS)
    assert_close(values["load"], load_E, rel=1e-6)
    assert values["max_load"].item() == pytest.approx(load_E.max().item())
    assert {key: how for key, (_, how) in plan.metrics.items()}["max_load"] == "max"
    if name not in ("hash", "balanced"):
        assert 0.0 < values["router_entropy"].item() <= 1.0


@every_router
def test_no_rows_are_no_problem(name: str) -> None:
    router, rows_TD = build(name), rows(0).requires_grad_()
    plan = router(rows_TD, Rows(tokens(0)))
    assert pairs(plan) == []
    assert plan.rows_per_expert_E.tolist() == [0] * EXPERTS
    assert {key: value.item() for key, (value, _) in plan.metrics.items() if key.endswith("share")} == {
        "drop_share": 0.0,
        "unserved_share": 0.0,
    }
    loss = sum(plan.losses.values(), plan.weights_A.sum())
    if list(router.parameters()):
        loss.backward()
    for key, parameter in router.named_parameters():
        assert parameter.grad is not None, key
        assert not bool(parameter.grad.any()), key
    for key, value in plan.observations.items():
        assert not bool(value.any()), key


@independent_tokens
def test_evaluation_does_not_look_across_the_batch(name: str) -> None:
    router, rows_TD, tokens_T = build(name).eval(), rows(), tokens()
    whole = router(rows_TD, Rows(tokens_T))
    alone = set()
    for token in range(TOKENS):
        plan = router(rows_TD[token : token + 1], Rows(tokens_T[token : token + 1]))
        alone |= {(expert, token) for expert, _ in pairs(plan)}
    assert alone == set(pairs(whole))
    assert len(alone) == TOKENS * CHOICES


@every_router
def test_weights_and_logits_have_the_rows_precision_fp32_at_least(name: str) -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        router = build(name).to(torch.promote_types(dtype, torch.float32))
        for parameter in router.parameters():  # statistics stay as they are in a bf16 model
            parameter.data = parameter.data.to(dtype)
        plan = router(rows().to(dtype), Rows(tokens()))
        assert plan.weights_A.dtype == plan.logits_TE.dtype == expected
        assert plan.logits_TE.shape == (TOKENS, EXPERTS)
        assert bool((plan.weights_A >= 0).all()), "padded exchanges mark an empty slot by a negative weight"


def test_random_drops_follow_from_the_tokens_and_the_block() -> None:
    capacity = CapacityConfig(mode="static", factor=0.5, drop="random")

    def kept(token_ids_T: Tensor, layer: int = 0) -> list[tuple[int, int]]:
        router = build_router(ROUTERS["softmax"], RouterSize(WIDTH, EXPERTS, CHOICES, layer=layer), capacity)
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
        return pairs(router(rows(), Rows(token_ids_T)))

    some_T = torch.arange(TOKENS)
    assert kept(some_T) == kept(some_T.clone())
    assert kept(some_T) != kept(some_T + 7)
    assert kept(some_T) != kept(some_T, layer=1)
