"""Clipping equals torch's on one rank, and the whole model's where experts are spread over ranks."""

import pytest
import torch
from torch import Tensor, nn

from megamoe.moe.marker import is_expert
from megamoe.parallel.groups import build_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, assert_equal_bits, run_ranks
from megamoe.training.grad_norm import clip_gradients

EXPERTS = 4
SHAPES = {"wq": (6, 5), "norm": (5,), "experts.w1": (EXPERTS, 3, 5), "experts.w2": (EXPERTS, 5, 3)}


def parameters(size: int = 1, rank: int = 0, scale: float = 1.0) -> dict[str, nn.Parameter]:
    """The share of one rank of `size`, with gradients; and one parameter without any."""
    generator, mine = torch.Generator().manual_seed(0), {}
    local = EXPERTS // size
    for name, shape in SHAPES.items():
        gradient = torch.randn(*shape, generator=generator) * scale
        expert = name.startswith("experts.")
        if expert:
            gradient = gradient[rank * local : (rank + 1) * local].clone()
        mine[name] = nn.Parameter(torch.zeros_like(gradient))
        mine[name].grad = gradient
        mine[name].allreduce = not expert
    return {**mine, "unused": nn.Parameter(torch.zeros(2))}


def clipped(max_norm: float, ep: int, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    groups = build_groups(Topology(torch.distributed.get_world_size(), ep=ep))
    mine = parameters(ep, groups.ep.place, scale)
    assert [is_expert(p) for p in mine.values()] == [False, False, True, True, False]
    norm = clip_gradients(mine.values(), max_norm, groups)
    return norm, {name: p.grad for name, p in mine.items() if p.grad is not None}


def torchs(max_norm: float, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    whole = parameters(scale=scale)
    norm = nn.utils.clip_grad_norm_(whole.values(), max_norm)
    return norm, {name: p.grad for name, p in whole.items() if p.grad is not None}


@pytest.mark.parametrize("max_norm", [0.5, 1e4])
@pytest.mark.parametrize("world_size, ep", [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_equals_torch_on_the_whole_model(world_size: int, ep: int, max_norm: float) -> None:
    expected_norm, expected = torchs(max_norm)
    results = run_ranks(clipped, world_size, max_norm, ep)
    for rank, (norm, gradients) in enumerate(results):
        assert_close(norm, expected_norm, rel=1e-6, name="norm")
        assert_equal_bits(norm, results[0][0], name="every rank has the same norm")
        local, place = EXPERTS // ep, rank % ep
        for name, gradient in gradients.items():
            part = slice(place * local, (place + 1) * local) if name.startswith("experts.") else slice(None)
            assert_close(gradient, expected[name][part], rel=1e-6, name=name)
    assert (max_norm < float(expected_norm)) == (max_norm == 0.5), "one case clips and one does not"


def test_zero_only_measures() -> None:
    ((norm, gradients),) = run_ranks(clipped, 1, 0.0, 1)
    assert_close(norm, torchs(1e9)[0], rel=1e-6)
    for name, parameter in parameters().items():
        if parameter.grad is not None:
            assert_equal_bits(gradients[name], parameter.grad, name=name)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    ((norm, _),) = run_ranks(clipped, 1, 1.0, 1, float("inf"))
    assert not bool(norm.isfinite())


def exactly_clipped() -> tuple[float, Tensor]:
    groups, dense = build_groups(Topology(1)), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    dense.grad = torch.tensor([3.0, 4.0 + 2.0**-40], dtype=torch.float64)
    expected = dense.grad.clone()
    norm = clip_gradients([dense], 1.0, groups)
    return float(norm - expected.norm()), dense.grad - expected / (expected.norm() + 1e-6)


def test_fp64_keeps_its_digits() -> None:
    ((norm, gradient),) = run_ranks(exactly_clipped, 1)
    assert abs(norm) < 1e-15
    assert float(gradient.abs().max()) < 1e-15


def without_experts() -> tuple[float, float]:
    groups = build_groups(Topology(1))
    dense = nn.Parameter(torch.zeros(2))
    none = float(clip_gradients([dense], 1.0, groups))
    dense.grad = torch.tensor([3.0, 4.0])
    return none, float(clip_gradients([dense], 1.0, groups))


def test_a_model_without_experts_or_without_gradients() -> None:
    assert run_ranks(without_experts, 1) == [(0.0, 5.0)]
