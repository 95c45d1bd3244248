"""A padded exchange between ranks asks the device for nothing either."""

import pytest
import torch

from megamoe.config.moe import CapacityConfig, MoEConfig
from megamoe.config.ops import OpsConfig
from megamoe.config.routers import ResonanceRouterConfig, RouterConfig, TopKRouterConfig
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers import base
from megamoe.parallel.groups import build_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import run_ranks
from megamoe.testing.waits import Waits

RANKS, WIDTH, TOKENS = 2, 32, 96
ROUTERS: dict[str, RouterConfig] = {
    "topk": TopKRouterConfig(balance_loss=0.01),
    "grap_learned": ResonanceRouterConfig(),
}


def waits(router: str, dispatcher: str) -> list[str]:
    base.waiting_costs = lambda device: True  # as on a GPU
    ep = build_groups(Topology(RANKS, ep=RANKS)).ep
    capacity = CapacityConfig(mode="static", factor=0.75)
    config = MoEConfig(
        num_experts=4, expert_ffn_size=16, router=ROUTERS[router], capacity=capacity, dispatcher=dispatcher
    )
    ops = OpsConfig(plan="reference", rows="reference", expert_ffn="fused", grap_affinity="reference")
    layer = MoELayer(config, WIDTH, ExpertParallel(ep.size, ep.place, ep.handle), ops).train()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)

    def once() -> None:
        x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(ep.place)).requires_grad_()
        out_TD, aux = layer(x_TD)
        torch.autograd.backward([out_TD.square().sum(), *aux.losses.values()])

    once()  # what is compared and made only once
    with Waits() as found:
        once()
    return found.found


@pytest.mark.parametrize("router", ROUTERS)
def test_the_host_waits_for_nothing(router: str) -> None:
    assert run_ranks(waits, RANKS, router, "padded") == [[]] * RANKS


def test_the_ragged_exchange_waits_for_its_counts_alone() -> None:
    for found in run_ranks(waits, RANKS, "topk", "all_to_all"):
        assert found == ["tolist", "tolist"]
