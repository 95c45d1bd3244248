"""Layers in parts against one process that has the whole matrices."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.common.errors import TopologyError
from megamoe.parallel.axis import Axis, axis_of
from megamoe.parallel.groups import build_groups
from megamoe.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megamoe.parallel.regions import gather_sequence, reduce_scatter_sequence, sum_replicated_gradients
from megamoe.parallel.shards import Shard, part, shards_of
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, max_rel_error, run_ranks

BATCH, LENGTH, WIDTH, INNER = 2, 8, 6, 12
DIMS = {"x": 1, "w1": 0, "w2": 1}  # along which the ranks' gradients are put together; "gain" is whole on every rank


def inputs(group: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What one process has: the weights, and the rows of that data-parallel rank."""
    shapes = {"gain": (WIDTH,), "w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "x": (BATCH, LENGTH, WIDTH)}
    weights = torch.Generator().manual_seed(0)
    generators = dict.fromkeys(shapes, weights) | {"x": torch.Generator().manual_seed(1 + group)}
    drawn = {name: torch.randn(shape, generator=generators[name]) for name, shape in shapes.items()}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in drawn.items()}


def loss_of(y: Tensor, start: int = 0) -> Tensor:
    """Additive over positions, with another weight for each."""
    positions = torch.arange(start, start + y.shape[1], dtype=y.dtype)[:, None]
    return (y * torch.sin(1.0 + positions)).square().sum()


def alone(group: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of x + w2 silu(w1 (gain * x)) in one process."""
    have = inputs(group, dtype)
    y = have["x"] + F.linear(F.silu(F.linear(have["x"] * have["gain"], have["w1"])), have["w2"])
    loss_of(y).backward()
    return y.detach(), {name: tensor.grad for name, tensor in have.items() if tensor.grad is not None}


def in_parts(size: int, dtype: torch.dtype, summed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The same on this rank: its positions of the output, its parts of the gradients."""
    groups = build_groups(Topology(dist.get_world_size(), tp=size))
    tp = axis_of(groups.tp)
    have = inputs(groups.dp.place, dtype)
    first, second = ColumnParallelLinear(WIDTH, INNER, tp).to(dtype), RowParallelLinear(INNER, WIDTH, tp).to(dtype)
    for layer, name in ((first, "w1"), (second, "w2")):
        layer.weight.data.copy_(part(have[name], shards_of(layer.weight), {"tp": tp}))
    gain = nn.Parameter(have["gain"].detach())
    if summed:
        sum_replicated_gradients([gain], tp)
    x = have["x"].detach().chunk(size, dim=1)[tp.rank].clone().requires_grad_()
    y = x + reduce_scatter_sequence(second(F.silu(first(gather_sequence(x * gain, tp)))), tp)
    loss_of(y, tp.rank * y.shape[1]).backward()
    leaves = {"gain": gain, "w1": first.weight, "w2": second.weight, "x": x}
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("world_size, size", [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_a_feed_forward_in_parts_is_the_whole_one(world_size: int, size: int, dtype: torch.dtype, rel: float) -> None:
    results = run_ranks(in_parts, world_size, size, dtype, True)
    for group in range(world_size // size):
        found = results[group * size : (group + 1) * size]
        expected_y, expected = alone(group, dtype)
        assert_close(torch.cat([y for y, _ in found], dim=1), expected_y, rel=rel, name="output")
        for name, dim in DIMS.items():
            assert_close(torch.cat([parts[name] for _, parts in found], dim), expected[name], rel=rel, name=name)
        for _, parts in found:
            assert_close(parts["gain"], expected["gain"], rel=rel, name="gain")


def test_without_the_sum_a_replicated_gradient_is_wrong() -> None:
    _, expected = alone(0, torch.float64)
    for _, parts in run_ranks(in_parts, 2, 2, torch.float64, False):
        assert max_rel_error(parts["gain"], expected["gain"]) > 0.1


def test_parts_say_what_they_are() -> None:
    tp = Axis(4, 3, None)
    column, row = ColumnParallelLinear(8, 12, tp), RowParallelLinear(12, 8, tp)
    assert (tuple(column.weight.shape), shards_of(column.weight)) == ((3, 8), (Shard(0, "tp"),))
    assert (tuple(row.weight.shape), shards_of(row.weight)) == ((8, 3), (Shard(1, "tp"),))
    for layer in (column, row):
        assert [name for name, _ in layer.named_parameters()] == ["weight"]
        assert layer.weight.model_parallel is True


def test_alone_they_are_ordinary_layers() -> None:
    x = torch.randn(2, 8)
    for layer in (ColumnParallelLinear(8, 12, Axis()), RowParallelLinear(8, 12, Axis())):
        assert tuple(layer.weight.shape) == (12, 8)
        assert layer.weight.model_parallel is False
        assert torch.equal(layer(x), F.linear(x, layer.weight))


@pytest.mark.parametrize("layer, what", [(ColumnParallelLinear, "output"), (RowParallelLinear, "input")])
def test_misfits_show_the_arithmetic(layer: type[ColumnParallelLinear | RowParallelLinear], what: str) -> None:
    with pytest.raises(TopologyError, match=rf"10 {what} features[^%]*4 equal parts[^%]*10 % 4 = 2"):
        layer(10, 10, Axis(4, 0, None))
