"""The MoE layer on compiled ops is the layer on plain torch."""

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import BroadcastConfig, CapacityConfig, MoEConfig
from megamoe.config.ops import OpsConfig
from megamoe.config.routers import ResonanceRouterConfig, RouterConfig, SinkhornRouterConfig, TopKRouterConfig
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ALONE
from megamoe.testing import assert_close

EXPERTS, TOP_K, WIDTH, FFN, TOKENS = 16, 2, 48, 24, 200
PLAIN = OpsConfig(plan="reference", rows="reference", grap_affinity="reference", router_scores="reference")
COMPILED = OpsConfig(plan="kernels", rows="kernels", grap_affinity="kernels", router_scores="kernels")
ROUTERS: dict[str, RouterConfig] = {
    "topk": TopKRouterConfig(z_loss=0.01, balance_loss=0.01),
    "sigmoid": TopKRouterConfig(score="sigmoid", bias_update_rate=0.01),
    "sinkhorn": SinkhornRouterConfig(),
    "grap": ResonanceRouterConfig(affinity="grap", balance_loss=0.01),
    "grap_learned": ResonanceRouterConfig(balance_loss=0.01),
    "cosine": ResonanceRouterConfig(affinity="cosine", balance_loss=0.01, orthogonality_loss=0.01),
}
CAPACITIES = {
    "dropless": CapacityConfig(),
    "static": CapacityConfig(mode="static", factor=0.75),
    "position": CapacityConfig(mode="static", factor=0.75, drop="position"),
    "random": CapacityConfig(mode="static", factor=0.75, drop="random"),
}


def passed(
    router: str, capacity: str, ops: OpsConfig, device: torch.device, dtype: torch.dtype, broadcasts: bool = False
) -> dict[str, Tensor]:
    """Output, gradients and how many tokens were dropped, of a layer whose weights follow from its settings alone."""
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=TOP_K,
        expert_ffn_size=FFN,
        router=ROUTERS[router],
        capacity=CAPACITIES[capacity],
        broadcast=BroadcastConfig(threshold="fixed", entropy=0.9) if broadcasts else None,
    )
    layer = MoELayer(config, WIDTH, ALONE, ops).train()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if "log_scale" in dict(layer.router.named_parameters()):
            layer.router.log_scale.fill_(3.0)
    layer = layer.to(device=device, dtype=dtype)
    x = torch.randn(4, TOKENS // 4, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    out, aux = layer(x)
    torch.autograd.backward([out.square().sum(), *aux.losses.values()])
    assert x.grad is not None
    grads = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "x": x.grad, "drop_share": aux.metrics["drop_share"][0], **grads}


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_compiled_and_plain_layers_agree(router: str, capacity: str, backend: torch.device) -> None:
    plain = passed(router, capacity, PLAIN, backend, torch.float32)
    found = passed(router, capacity, COMPILED, backend, torch.float32)
    assert (float(plain["drop_share"]) > 0) == (capacity != "dropless")
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert_close(found[name], value, rel=2e-5 if backend.type == "cuda" else 5e-6, name=name)


@pytest.mark.parametrize("router", ["topk", "grap_learned", "cosine"])
def test_in_bf16_they_differ_by_what_bf16_does(router: str, backend: torch.device) -> None:
    exact = passed(router, "static", PLAIN, backend, torch.float32)
    plain = passed(router, "static", PLAIN, backend, torch.bfloat16)
    found = passed(router, "static", COMPILED, backend, torch.bfloat16)
    for name, value in exact.items():
        if float(value.norm()) == 0.0:
            continue
        rounded = float((plain[name].float() - value).norm() / value.norm())
        assert float((found[name].float() - value).norm() / value.norm()) <= 2 * rounded + 1e-3, name


def test_broadcasting_takes_the_compiled_plan(backend: torch.device) -> None:
    plain = passed("topk", "static", PLAIN, backend, torch.float32, broadcasts=True)
    found = passed("topk", "static", COMPILED, backend, torch.float32, broadcasts=True)
    for name, value in plain.items():
        assert_close(found[name], value, rel=2e-5 if backend.type == "cuda" else 5e-6, name=name)
