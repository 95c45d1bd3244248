"""Recomputed blocks: the gradients belong to the decisions of the forward pass, whatever the second pass would say."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from megamoe.config.moe import BroadcastConfig, CapacityConfig, MoEConfig
from megamoe.config.routers import (
    ExpertChoiceRouterConfig,
    ResonanceRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    TopKRouterConfig,
)
from megamoe.model.recompute import recomputed
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.testing import assert_close, assert_equal_bits, max_rel_error

BATCH, SEQUENCE, WIDTH, FFN, EXPERTS = 2, 16, 12, 5, 6
HALF = EXPERTS // 2
STATIC = CapacityConfig(mode="static", factor=1.6)
"""9 rows, so one of a pair of tokens may be in and the other out."""

Layer = Any
"""An MoE layer, whose router has what the case is about."""
Run = Callable[..., Any]
plain: Run = partial(checkpoint, use_reentrant=False)

CASES: dict[str, tuple[RouterConfig, CapacityConfig, dict[str, Any]]] = {
    "softmax": (TopKRouterConfig(), CapacityConfig(), {}),
    "softmax, static": (TopKRouterConfig(), STATIC, {"slots": "first"}),
    "softmax, random drops": (TopKRouterConfig(), STATIC.model_copy(update={"drop": "random"}), {"choose": "random"}),
    "groups": (
        TopKRouterConfig(score="sigmoid", bias_update_rate=0.01, num_groups=2, top_groups=1),
        CapacityConfig(),
        {"top_m": 3},
    ),
    "resonance": (ResonanceRouterConfig(threshold=0.9), STATIC, {"choose": "lowest_entropy"}),
    "cosine": (ResonanceRouterConfig(affinity="cosine"), STATIC, {"top_m": 3}),
    "sinkhorn": (SinkhornRouterConfig(), CapacityConfig(), {}),
    "expert_choice": (ExpertChoiceRouterConfig(), STATIC, {}),
}
every_case = pytest.mark.parametrize("name", CASES)


def build(name: str, broadcast: bool = True) -> Layer:
    """fp64; one expert per token."""
    router, capacity, settings = CASES[name]
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=1,
        expert_ffn_size=FFN,
        router=router,
        capacity=capacity,
        broadcast=BroadcastConfig(threshold="fixed", entropy=0.7, max_share=0.3, **settings) if broadcast else None,
    )
    layer, generator = MoELayer(config, WIDTH, ExpertParallel()).double(), torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    if hasattr(layer.router, "log_scale"):
        torch.nn.init.constant_(layer.router.log_scale, 1.5)
    return layer


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(BATCH, SEQUENCE, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def direct(block: Run, *args: Any) -> Any:
    return block(*args)


def gradients(layer: Layer, x: Tensor, run: Run, between: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
    """Forward pass, `between`, backward pass."""
    out, aux = run(layer, x, torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE))
    between()
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    targets = {"x": x, **dict(layer.named_parameters())}
    loss = sum(aux.losses.values(), (out * probe).sum())
    found = torch.autograd.grad(loss, list(targets.values()), allow_unused=True)
    return {"out": out.detach()} | {n: g for n, g in zip(targets, found, strict=True) if g is not None}


@every_case
@pytest.mark.parametrize("broadcast", [True, False])
def test_recomputation_changes_no_bit(name: str, broadcast: bool) -> None:
    found, expected = (gradients(build(name, broadcast), inputs(), run) for run in (recomputed, direct))
    assert found.keys() == expected.keys()
    for key in expected:
        assert_equal_bits(found[key], expected[key], name=key)


# Decisions are made once

CHANGED = {"softmax": torch.nan, "softmax, static": 0.0, "softmax, random drops": torch.nan, "resonance": 0.95}


@pytest.mark.parametrize("name", [*CHANGED, "expert_choice"])
def test_a_threshold_that_moves_between_the_passes_moves_nothing(name: str) -> None:
    expected = gradients(build(name), inputs(), direct)

    def with_another_threshold(run: Run) -> dict[str, Tensor]:
        layer = build(name)
        return gradients(
            layer, inputs(), run, lambda: layer.router.broadcast.threshold.fill_(CHANGED.get(name, torch.nan))
        )

    for key, value in with_another_threshold(recomputed).items():
        assert_equal_bits(value, expected[key], name=key)
    # And it would have: torch finds tensors of other shapes, or the gradients are of another routing.
    with pytest.raises(CheckpointError):
        with_another_threshold(plain)


def test_a_selection_bias_that_moves_between_the_passes_moves_nothing() -> None:
    expected = gradients(build("groups"), inputs(), direct)

    def with_another_bias(run: Run) -> dict[str, Tensor]:
        layer = build("groups")
        return gradients(layer, inputs(), run, lambda: layer.router.bias_E.add_(torch.linspace(-1, 1, EXPERTS)))

    for key, value in with_another_bias(recomputed).items():
        assert_equal_bits(value, expected[key], name=key)
    assert max_rel_error(with_another_bias(plain)["x"], expected["x"]) > 0.1


# Near ties


class Unrepeatable(torch.nn.Module):
    """Adds in the second pass what sums in another order could add, to its input and the router."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.passes = layer, 0

    def forward(self, x: Tensor, tokens: Tensor) -> Any:
        generator = torch.Generator().manual_seed(8)
        noise = 1e-9 * self.passes * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for parameter in self.layer.router.parameters():
            parameter.data += 1e-9 * self.passes * torch.randn(parameter.shape, generator=generator)
        self.passes += 1
        return self.layer(x + noise, tokens)


@torch.no_grad()
def near_ties(name: str, broadcast: bool) -> tuple[Layer, Tensor]:
    """Each expert of the first half scores as one of the second half does, and tokens come in pairs, but for 1e-12."""
    layer, x, generator = build(name, broadcast), inputs(), torch.Generator().manual_seed(9)
    x[:, 1::2] = x[:, ::2]
    if hasattr(layer.router, "weight"):
        layer.router.weight[HALF:] = layer.router.weight[:HALF]
    else:  # an expert for each slice of 2 features
        x[..., WIDTH // 2 :] = x[..., : WIDTH // 2]
        layer.router.slice_values[WIDTH // 2 :] = layer.router.slice_values[: WIDTH // 2]
    for near in (x, *layer.router.parameters()):
        near += 1e-12 * torch.randn(near.shape, generator=generator)
    return layer, x


@every_case
@pytest.mark.parametrize("broadcast", [True, False])
def test_near_ties_fall_as_they_fell(name: str, broadcast: bool) -> None:
    def unrepeatable(run: Run) -> dict[str, Tensor]:
        layer, x = near_ties(name, broadcast)
        return gradients(layer, x, lambda block, *args: run(Unrepeatable(block), *args))

    expected = unrepeatable(direct)
    found = unrepeatable(recomputed)
    assert found.keys() == expected.keys()
    for key in expected:
        assert_close(found[key], expected[key], rel=1e-6, name=key)
    try:
        different = max(max_rel_error(value, expected[key]) for key, value in unrepeatable(plain).items())
    except CheckpointError:  # other numbers of rows
        return
    assert different > 1e-2
