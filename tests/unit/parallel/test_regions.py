"""Every border against one process that has the tensors of all ranks: what comes out, and what comes back."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.parallel import regions
from megamoe.parallel.axis import Axis, axis_of
from megamoe.parallel.groups import build_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, assert_equal_bits, max_rel_error, run_ranks

LAYOUTS = [(1, 1), (2, 2), (4, 4), (4, 2)]  # ranks, ranks of an axis; the last: two axes that must not mix
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-15}
LENGTH, WIDTH = 8, 3

REGIONS: dict[str, Callable[[Tensor, Axis], Tensor]] = {
    "gather_sequence": regions.gather_sequence,
    "reduce_scatter_sequence": regions.reduce_scatter_sequence,
    "gather_shared": regions.gather_shared,
    "gather_shared, dim 1": partial(regions.gather_shared, dim=1),
    "gather_shared, last dim": partial(regions.gather_shared, dim=-1),
    "sum_partials": regions.sum_partials,
    "sum_gradients": regions.sum_gradients,
}
EQUAL_USE = {name for name in REGIONS if name.startswith(("gather_shared", "sum_partials"))}
"""Every rank uses the result in the same way, so there is one loss, not one per rank."""


def specified(name: str, xs: list[Tensor]) -> list[Tensor]:
    """The result of every rank, from the arguments of all."""
    ranks = len(xs)
    if name == "reduce_scatter_sequence":
        return list(torch.stack(xs).sum(0).chunk(ranks, dim=1))
    if name == "sum_partials":
        return [torch.stack(xs).sum(0)] * ranks
    if name == "sum_gradients":
        return [xs[0]] * ranks  # the one tensor that all ranks have
    return [torch.cat(xs, dim={"gather_shared": 0, "gather_shared, last dim": -1}.get(name, 1))] * ranks


def draw(shape: torch.Size | tuple[int, ...], *seed: int) -> Tensor:
    number = sum(value * 1000**place for place, value in enumerate(seed))
    return torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def argument(name: str, batch: int, group: int, rank: int) -> Tensor:
    return draw((batch, LENGTH, WIDTH), 1, group, 0 if name == "sum_gradients" else rank)


def use(name: str, y: Tensor, group: int, rank: int) -> Tensor:
    """The loss that a rank makes of its result: a weight for every element."""
    return (y * draw(y.shape, 2, group, 0 if name in EQUAL_USE else rank).to(y.dtype)).sum()


def axes(size: int) -> tuple[Axis, int]:
    """This rank's axis of that size, and which of such axes it is."""
    groups = build_groups(Topology(dist.get_world_size(), tp=size))
    return axis_of(groups.tp), groups.dp.place


def passed(size: int, dtype: torch.dtype) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Result and gradient of every region on this rank; arguments and incoming gradients are not contiguous."""
    axis, group = axes(size)
    found = {}
    for (name, region), batch in product(REGIONS.items(), (1, 2)):
        x = argument(name, batch, group, axis.rank).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
        before = x.clone()
        y = region(x.requires_grad_(), axis)
        use(name, y, group, axis.rank).backward()
        assert x.grad is not None
        assert_equal_bits(x, before, name=f"argument of {name}")
        found[name, batch] = y.detach(), x.grad
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size, size", LAYOUTS)
def test_regions_are_what_one_process_computes(world_size: int, size: int, dtype: torch.dtype) -> None:
    for rank, found in enumerate(run_ranks(passed, world_size, size, dtype)):
        group, place = divmod(rank, size)
        for (name, batch), (y, gradient) in found.items():
            xs = [argument(name, batch, group, p).to(dtype).requires_grad_() for p in range(size)]
            ys = specified(name, xs)
            losses = [use(name, result, group, p) for p, result in enumerate(ys)]
            torch.stack(losses[:1] if name in EQUAL_USE else losses).sum().backward()
            source = xs[0 if name == "sum_gradients" else place]
            assert source.grad is not None
            assert y.dtype == gradient.dtype == dtype
            assert_close(y, ys[place].detach(), rel=DTYPES[dtype], name=f"{name} on rank {rank}")
            assert_close(gradient, source.grad, rel=DTYPES[dtype], name=f"gradient of {name} on rank {rank}")


def test_a_missing_sum_would_show() -> None:
    """The control: gradients that only see the own rank's loss are far from those above."""
    for rank, found in enumerate(run_ranks(passed, 2, 2, torch.float64)):
        for name, own in (
            ("gather_sequence", draw((1, 2 * LENGTH, WIDTH), 2, 0, rank).chunk(2, dim=1)[rank]),
            ("sum_gradients", draw((1, LENGTH, WIDTH), 2, 0, rank)),
        ):
            assert max_rel_error(own, found[name, 1][1]) > 0.1, name


def test_alone_a_region_is_its_argument() -> None:
    x = draw((2, LENGTH, WIDTH), 1).requires_grad_()
    for name, region in REGIONS.items():
        assert region(x, Axis()) is x, name
    assert regions.reduced(x, Axis()) is x
    weight = nn.Parameter(draw((3,), 2))
    regions.sum_replicated_gradients([weight], Axis())
    weight.sum().backward()
    assert_equal_bits(weight.grad, torch.ones_like(weight))


def test_a_sequence_that_does_not_divide_fails_before_anything_is_sent() -> None:
    with pytest.raises(RuntimeError, match="7"):
        regions.reduce_scatter_sequence(torch.zeros(2, 7, 3), Axis(2, 0, None))


def shared_counts() -> tuple[Tensor, Tensor, Tensor]:
    axis, _ = axes(2)
    counts = torch.tensor([axis.rank, 10 + axis.rank])
    gathered = regions.gather_shared(counts, axis)
    return gathered, regions.reduced(counts, axis, "min"), regions.reduced(counts, axis, "max")


def test_whole_numbers_can_be_gathered_and_reduced() -> None:
    for gathered, smallest, largest in run_ranks(shared_counts, 2):
        assert_equal_bits(gathered, torch.tensor([0, 10, 1, 11]))
        assert_equal_bits(smallest, torch.tensor([0, 10]))
        assert_equal_bits(largest, torch.tensor([1, 11]))


def nothing_at_all() -> list[tuple[int, ...]]:
    axis, _ = axes(2)
    x = torch.zeros(2, 0, WIDTH, requires_grad=True)
    y = regions.reduce_scatter_sequence(regions.gather_sequence(x, axis), axis)
    regions.gather_shared(y, axis).sum().backward()
    assert x.grad is not None
    return [tuple(y.shape), tuple(x.grad.shape)]


def test_empty_sequences() -> None:
    assert run_ranks(nothing_at_all, 2) == [[(2, 0, WIDTH)] * 2] * 2


def beside() -> tuple[Tensor, Tensor]:
    """A summed branch and a plain one that receive one and the same gradient tensor."""
    axis, _ = axes(2)
    summed, plain = (torch.ones(3, requires_grad=True) for _ in range(2))
    ((regions.sum_gradients(summed, axis) + plain) * (axis.rank + 1.0)).sum().backward()
    assert summed.grad is not None
    assert plain.grad is not None
    return summed.grad, plain.grad


def test_a_sum_leaves_the_gradient_of_its_neighbour_alone() -> None:
    for rank, (summed, plain) in enumerate(run_ranks(beside, 2)):
        assert_equal_bits(summed, torch.full((3,), 3.0))
        assert_equal_bits(plain, torch.full((3,), rank + 1.0))


def replicated(size: int, hooked: bool) -> list[Tensor | None]:
    """Gradients after two backward passes: of a parameter used twice in each, of one used once, of an unused one."""
    axis, group = axes(size)
    twice, once, unused = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(3))
    if hooked:
        regions.sum_replicated_gradients((parameter for parameter in (twice, once, unused)), axis)
    for step in range(2):
        first, second, third = draw((3, 4), step, group, axis.rank)
        (twice * first + twice * second + once * third).sum().backward()
    return [twice.grad, once.grad, unused.grad]


@pytest.mark.parametrize("world_size, size", LAYOUTS)
def test_gradients_of_replicated_parameters_are_summed(world_size: int, size: int) -> None:
    for rank, (twice, once, unused) in enumerate(run_ranks(replicated, world_size, size, True)):
        group = rank // size
        total = torch.stack([draw((3, 4), step, group, p) for step in range(2) for p in range(size)]).sum(0)
        assert twice is not None
        assert once is not None
        assert_close(twice, total[0] + total[1], rel=1e-15)
        assert_close(once, total[2], rel=1e-15)
        assert unused is None


def test_without_the_hook_they_are_not() -> None:
    with_hook, without = (run_ranks(replicated, 2, 2, hooked)[0] for hooked in (True, False))
    for summed, partial_sum in zip(with_hook[:2], without[:2], strict=True):
        assert summed is not None
        assert partial_sum is not None
        assert max_rel_error(partial_sum, summed) > 0.1


class Copies(TorchDispatchMode):
    """How many tensors are copied element by element inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


def copies(batch: int) -> list[int]:
    """Of each sequence region, forward and backward, beside those that gloo makes inside its reduce-scatter."""
    axis, _ = axes(2)
    with Copies() as message:
        regions._reduce_scatter(torch.zeros(4), torch.zeros(8), group=axis.group)
    counts = []
    for region in (regions.gather_sequence, regions.reduce_scatter_sequence):
        x = torch.zeros(batch, LENGTH, WIDTH, requires_grad=True)
        with Copies() as forward:
            y = region(x, axis)
        gradient = torch.zeros_like(y)
        with Copies() as backward:
            torch.autograd.grad(y, x, gradient)
        counts += [forward.count, backward.count]
    return [counts[0], counts[1] - message.count, counts[2] - message.count, counts[3]]


def test_one_sequence_needs_no_copies_beside_the_messages() -> None:
    assert run_ranks(copies, 2, 1) == [[0, 0, 0, 0]] * 2
    assert run_ranks(copies, 2, 2) == [[1, 1, 1, 1]] * 2
