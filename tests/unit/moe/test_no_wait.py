"""What a GPU's host must not do, shown on the CPU: ask the device for a number in the middle of a layer."""

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig, MoEConfig
from megamoe.config.ops import OpsConfig
from megamoe.config.routers import (
    BalancedRouterConfig,
    ExpertChoiceRouterConfig,
    ResonanceRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    TopKRouterConfig,
)
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ALONE
from megamoe.moe.routers import base
from megamoe.testing import assert_close
from megamoe.testing.waits import Waits

EXPERTS, TOP_K, WIDTH, FFN, TOKENS = 8, 2, 32, 16, 96
ROUTERS: dict[str, RouterConfig] = {
    "topk": TopKRouterConfig(z_loss=0.01, balance_loss=0.01),
    "sigmoid": TopKRouterConfig(score="sigmoid", bias_update_rate=0.01),
    "grap_learned": ResonanceRouterConfig(balance_loss=0.01),
    "threshold": ResonanceRouterConfig(threshold=0.75),
    "cosine": ResonanceRouterConfig(affinity="cosine", rank_by="gate"),
    "sinkhorn": SinkhornRouterConfig(),
    "balanced": BalancedRouterConfig(),
    "expert_choice": ExpertChoiceRouterConfig(),
}
CAPACITIES = {
    "dropless": CapacityConfig(),
    "static": CapacityConfig(mode="static", factor=0.75),
    "position": CapacityConfig(mode="static", factor=0.75, drop="position"),
    "random": CapacityConfig(mode="static", factor=0.75, drop="random"),
    "etr_bound": CapacityConfig(mode="etr_bound", factor=1.25),
    "etr_success": CapacityConfig(mode="etr_success", factor=1.25),
    "locmoe": CapacityConfig(mode="locmoe", factor=1.25),
}


CASES = [
    pytest.param(router, capacity, id=f"{router}-{capacity}")
    for router in ROUTERS
    for capacity in CAPACITIES
    if (router, capacity) not in {("expert_choice", "dropless"), ("threshold", "position"), ("threshold", "random")}
    and (capacity not in ("etr_bound", "etr_success", "locmoe") or router in ("grap_learned", "cosine"))
    and (router != "expert_choice" or capacity == "static")
]


def built(router: str, capacity: str, ffn: str = "fused") -> MoELayer:
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=TOP_K,
        expert_ffn_size=FFN,
        router=ROUTERS[router],
        capacity=CAPACITIES[capacity],
        num_shared_experts=1,
    )
    layer = MoELayer(config, WIDTH, ALONE, OpsConfig(expert_ffn=ffn, grap_affinity="reference", plan="reference"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer.train()


def passed(layer: MoELayer) -> dict[str, Tensor]:
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(5)).requires_grad_()
    out_TD, aux = layer(x_TD)
    torch.autograd.backward([out_TD.square().sum(), *aux.losses.values()])
    grads = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert x_TD.grad is not None
    return {"out": out_TD.detach(), "x": x_TD.grad, **grads}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut to a length that the host would have to ask for."""
    monkeypatch.setattr(base, "waiting_costs", lambda device: True)


@pytest.mark.parametrize("router, capacity", CASES)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_host_waits_for_nothing(router: str, capacity: str) -> None:
    layer = built(router, capacity)
    passed(layer)  # what is made once for a size of micro-batch
    with Waits() as waits:
        passed(layer)
    assert waits.found == []


def test_on_a_cpu_plans_are_cut_and_that_is_seen() -> None:
    layer = built("topk", "static")
    with Waits() as waits:
        passed(layer)
    assert "_local_scalar_dense" in waits.found


@pytest.mark.parametrize("ffn", ["fused", "reference"])
@pytest.mark.parametrize("router, capacity", CASES)
def test_results_are_those_of_plans_that_are_cut(
    router: str, capacity: str, ffn: str, request: pytest.FixtureRequest
) -> None:
    cut = passed(built(router, capacity, ffn))
    request.getfixturevalue("as_on_a_gpu")
    uncut = passed(built(router, capacity, ffn))
    assert cut.keys() == uncut.keys()
    for name, value in cut.items():
        assert_close(uncut[name], value, rel=1e-6, name=name)  # products of another number of rows


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_bounded_plan_has_no_more_rows_than_the_capacity() -> None:
    """Memory follows the capacity where the number of rows kept is not known."""
    layer = built("topk", "static")
    with torch.no_grad():
        next(layer.router.parameters())[-1] = -10.0  # an expert that nobody wants
    plan = layer.router(torch.randn(1024, WIDTH, generator=torch.Generator().manual_seed(1)).abs())
    assert plan.capacity is not None
    assert len(plan.token_ids_A) == EXPERTS * plan.capacity < 1024 * TOP_K
    assert int(plan.rows_per_expert_E.sum()) < len(plan.token_ids_A)
    assert float(plan.weights_A.detach()[int(plan.rows_per_expert_E.sum()) :].abs().sum()) == 0.0
    trimmed = plan.trimmed()
    assert trimmed.choices is not None
    assert len(trimmed.token_ids_A) == len(trimmed.choices.source_A) == int(plan.rows_per_expert_E.sum())
