"""The dispatcher of one rank, the order of received rows, and which dispatcher is built."""

import pytest
import torch

from megamoe.moe.dispatch import build_dispatcher
from megamoe.moe.dispatch.all_to_all import experts_of
from megamoe.moe.dispatch.expert_tensor import to_everyone
from megamoe.moe.dispatch.journey import unpack
from megamoe.moe.dispatch.local import LocalDispatcher
from megamoe.moe.routers.base import count
from megamoe.moe.types import RoutingPlan
from megamoe.ops.rows import permute_rows
from megamoe.testing import assert_equal_bits


def plan_of(pairs: list[tuple[int, int]], num_experts: int) -> RoutingPlan:
    """A plan of (expert, token) pairs; weights are 1/8, 2/8, ... in that order."""
    experts = torch.tensor([e for e, _ in pairs], dtype=torch.int64)
    tokens = torch.tensor([t for _, t in pairs], dtype=torch.int64)
    weights = (torch.arange(len(pairs)) + 1) / 8
    return RoutingPlan(tokens, experts, weights, count(experts, num_experts), torch.empty(0), {}, {}, {})


# Token 0 twice, 1 nowhere, 2 three times, 3 once; expert 1 is empty.
PAIRS = [(0, 0), (0, 2), (2, 2), (3, 0), (3, 2), (3, 3)]
CHOICES = torch.tensor([2.0, 0.0, 3.0, 1.0])


def test_rows_stand_by_expert_and_token() -> None:
    rows_TD = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    plan = plan_of(PAIRS, 4)
    rows_RD, rows_per_expert_L, handle = LocalDispatcher().dispatch(rows_TD, plan)
    assert_equal_bits(rows_RD, torch.stack([rows_TD[token] for _, token in PAIRS]))
    assert rows_per_expert_L.tolist() == [2, 0, 1, 3]
    assert_equal_bits(handle.weights_R, plan.weights_A)


def test_identity_experts_give_each_row_times_its_choices_and_so_does_the_backward_pass() -> None:
    rows_TD = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dispatcher = LocalDispatcher()
    rows_RD, _, handle = dispatcher.dispatch(rows_TD, plan_of(PAIRS, 4))
    out_TD = dispatcher.combine(rows_RD, handle)
    assert torch.equal(out_TD, rows_TD * CHOICES[:, None])
    probe_TD = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.autograd.grad(out_TD, rows_TD, probe_TD)[0], probe_TD * CHOICES[:, None])


def test_nothing_to_dispatch() -> None:
    rows_RD, rows_per_expert_L, handle = LocalDispatcher().dispatch(torch.randn(3, 5), plan_of([], 2))
    assert rows_RD.shape == (0, 5)
    assert rows_per_expert_L.tolist() == [0, 0]
    assert torch.equal(LocalDispatcher().combine(rows_RD, handle), torch.zeros(3, 5))


@pytest.mark.parametrize("received", [[[2, 0, 1], [1, 3, 0]], [[0, 0], [0, 0]], [[4]], [[1], [2], [3]]], ids=str)
def test_arrived_rows_are_known_by_their_experts(received: list[list[int]]) -> None:
    arrived = [e for row in received for e, rows in enumerate(row) for _ in range(rows)]
    assert experts_of(torch.tensor(received), len(arrived)).tolist() == arrived


def test_every_row_to_everyone() -> None:
    order = to_everyone(3, 2, torch.device("cpu"))
    assert order.place_NK.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert order.source_M.tolist() == [0, 2, 4, 1, 3, 5]


def test_without_a_group_everything_is_local() -> None:
    assert build_dispatcher("auto", None).name == "local"
    assert build_dispatcher("local", None).name == "local"
    with pytest.raises(ValueError, match="process group"):
        build_dispatcher("all_to_all", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_weights_travel_beside_rows_without_losing_a_bit(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    rows_AD, weights_A = torch.randn(rows, 6, generator=generator).to(dtype), torch.randn(rows, generator=generator)
    weights_A[:3] = torch.tensor([1e-45, float("inf"), -0.0])[:rows]
    source_A = torch.arange(rows, dtype=torch.int32)
    values = weights_A.double() if dtype == torch.float64 else weights_A
    packed = permute_rows(rows_AD, source_A, source_A[:, None], values[:, None])
    there_AD, there_A = unpack(packed, 6, torch.float32)
    assert (there_AD.shape, there_AD.dtype, there_A.shape) == (rows_AD.shape, dtype, weights_A.shape)
    for there, here in zip([*there_AD, *there_A], [*rows_AD, *weights_A], strict=True):
        assert_equal_bits(there, here)
