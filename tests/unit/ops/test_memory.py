"""Recycled memory: used again when the last tensor on it is gone, and never before."""

import sys

import pytest
import torch

from megamoe.ops.memory import WORTHWHILE_BYTES, recycled_like
from megamoe.testing import assert_equal_bits

LARGE = torch.empty(3, WORTHWHILE_BYTES // 8)

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is torch.empty_like")


@pytest.mark.parametrize(
    "like", [LARGE, LARGE.bfloat16(), torch.empty(4, 4), torch.empty(0, 3)], ids=["fp32", "bf16", "small", "empty"]
)
def test_it_is_like_the_tensor_given(like: torch.Tensor) -> None:
    made = recycled_like(like)
    assert (made.shape, made.dtype, made.device, made.stride()) == (like.shape, like.dtype, like.device, like.stride())


@linux
def test_memory_comes_back_after_the_last_tensor_on_it() -> None:
    first = recycled_like(LARGE).fill_(1.0)
    place, part = first.data_ptr(), first[2]
    del first
    other = recycled_like(LARGE).fill_(2.0)
    assert other.data_ptr() != place
    assert_equal_bits(part, torch.ones_like(part))
    del part
    assert recycled_like(LARGE).data_ptr() == place


@linux
def test_a_gradient_keeps_its_memory_until_it_is_cleared() -> None:
    weight = torch.nn.Parameter(torch.zeros_like(LARGE))
    weight.grad = recycled_like(weight)
    place = weight.grad.data_ptr()
    assert recycled_like(weight).data_ptr() != place
    weight.grad = None
    taken = [recycled_like(weight) for _ in range(2)]
    assert place in [tensor.data_ptr() for tensor in taken]
