"""Gathering rows and summing them back: literal meaning, and that each is the other's backward pass."""

import pytest
import torch
from torch import Tensor

from megamoe.ops.rows import gather_rows, sum_rows
from megamoe.testing import assert_close, assert_equal_bits

ROWS, WIDTH = 7, 3
INDICES = [
    pytest.param([3, 0, 3, 3, 6, 1], id="repeats and gaps"),
    pytest.param([4, 2, 0, 6, 5, 3, 1], id="permutation"),
    pytest.param([2] * 9, id="one row only"),
    pytest.param([], id="none"),
]


def rows(number: int, seed: int) -> Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("indices", INDICES)
def test_against_a_loop(indices: list[int]) -> None:
    ids_A = torch.tensor(indices, dtype=torch.int64)
    rows_TD, rows_AD = rows(ROWS, 1), rows(len(indices), 2)
    gathered_AD, summed_TD = torch.empty(len(indices), WIDTH), torch.zeros(ROWS, WIDTH)
    for place, index in enumerate(indices):
        gathered_AD[place] = rows_TD[index]
        summed_TD[index] += rows_AD[place]
    assert_equal_bits(gather_rows(rows_TD, ids_A), gathered_AD)
    assert_equal_bits(sum_rows(rows_AD, ids_A, ROWS), summed_TD)


@pytest.mark.parametrize("indices", INDICES)
def test_each_is_the_backward_pass_of_the_other(indices: list[int]) -> None:
    ids_A = torch.tensor(indices, dtype=torch.int64)
    rows_TD, rows_AD = rows(ROWS, 1).requires_grad_(), rows(len(indices), 2).requires_grad_()
    gathered_AD, summed_TD = gather_rows(rows_TD, ids_A), sum_rows(rows_AD, ids_A, ROWS)
    products = (gathered_AD * rows_AD).sum(), (rows_TD * summed_TD).sum()
    assert_close(*products, abs=1e-5, name="adjoint")
    d_rows_TD = torch.autograd.grad(gathered_AD, rows_TD, rows_AD.detach())[0]
    d_rows_AD = torch.autograd.grad(summed_TD, rows_AD, rows_TD.detach())[0]
    assert_equal_bits(d_rows_TD, summed_TD.detach(), name="backward of gather")
    assert_equal_bits(d_rows_AD, gathered_AD.detach(), name="backward of sum")


def test_rows_are_added_in_the_order_they_stand() -> None:
    big, small = torch.tensor([[1e8]]), torch.tensor([[3.0]])
    ids_A = torch.zeros(3, dtype=torch.int64)
    assert sum_rows(torch.cat([big, small, -big]), ids_A, 1).item() == 0.0
    assert sum_rows(torch.cat([big, -big, small]), ids_A, 1).item() == 3.0
