"""Moving rows to their places and summing them back: the plain implementation against loops, and its gradients."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.ops.movement import (
    PERMUTE_ROWS,
    UNPERMUTE_ROWS,
    permute_rows_reference,
    unpermute_backward_reference,
    unpermute_rows_reference,
)
from megamoe.testing import assert_close, assert_equal_bits

# Four tokens of two choices in seven rows: choice 2 has no row, choice 5 neither; rows 1 and 4 are holes.
PLACE = torch.tensor([[0, 6], [-1, 2], [3, -1], [5, -1]], dtype=torch.int32)
SOURCE = torch.tensor([0, -1, 3, 4, -1, 6, 1], dtype=torch.int32)
NOBODY = torch.tensor([[-1, -1]] * 4, dtype=torch.int32)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_two_forms_of_the_plan_agree() -> None:
    for row, choice in enumerate(SOURCE.tolist()):
        assert choice < 0 or PLACE.flatten()[choice] == row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_permute_against_a_loop(dtype: torch.dtype) -> None:
    x = numbers(4, 3, dtype=dtype)
    expected = torch.zeros(7, 3, dtype=dtype)
    for row, choice in enumerate(SOURCE.tolist()):
        if choice >= 0:
            expected[row] = x[choice // 2]
    assert_equal_bits(permute_rows_reference(x, SOURCE, PLACE), expected)


@pytest.mark.parametrize(
    "dtype, columns", [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 2), (torch.float64, 1)]
)
def test_values_travel_as_bits_in_further_columns(dtype: torch.dtype, columns: int) -> None:
    x, wide = numbers(4, 3, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    values = numbers(4, 2, dtype=wide, seed=1)
    y = permute_rows_reference(x, SOURCE, PLACE, values, -2.0)
    assert y.shape == (7, 3 + columns)
    assert_equal_bits(y[:, :3].contiguous(), permute_rows_reference(x, SOURCE, PLACE))
    arrived = y[:, 3:].contiguous().view(wide).flatten().tolist()
    flat = values.flatten().tolist()
    assert arrived == [flat[choice] if choice >= 0 else -2.0 for choice in SOURCE.tolist()]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpermute_against_a_loop(dtype: torch.dtype, weighted: bool) -> None:
    y, weights = numbers(7, 3, dtype=dtype), numbers(4, 2, seed=1)
    y[SOURCE < 0] = torch.nan  # nobody asks for a hole
    expected = torch.zeros(4, 3)
    for token, places in enumerate(PLACE.tolist()):
        for k, row in enumerate(places):
            if row >= 0:
                expected[token] += y[row].float() * (weights[token, k] if weighted else 1.0)
    out = unpermute_rows_reference(y, PLACE, SOURCE, weights if weighted else None)
    assert out.dtype == dtype
    assert_close(out.float(), expected.to(dtype).float(), rel=1e-6)


def test_sums_are_in_fp32_and_rounded_once() -> None:
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 257 is not a number in bf16, 258 is
    place, source = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    assert unpermute_rows_reference(y, place, source).item() == 258.0
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    permute_rows_reference(x, source, place).backward(y)
    assert x.grad is not None
    assert x.grad.item() == 258.0


def test_gradients_are_derivatives() -> None:
    x, y, weights = (
        numbers(*shape, dtype=torch.float64, seed=i).requires_grad_()
        for i, shape in enumerate([(4, 3), (7, 3), (4, 2)])
    )
    assert torch.autograd.gradcheck(lambda x: permute_rows_reference(x, SOURCE, PLACE), x)
    assert torch.autograd.gradcheck(lambda y: unpermute_rows_reference(y, PLACE, SOURCE), y)
    assert torch.autograd.gradcheck(lambda y, w: unpermute_rows_reference(y, PLACE, SOURCE, w), (y, weights))


def test_gradients_of_holes_and_of_choices_without_a_row_are_zero() -> None:
    y = numbers(7, 3)
    y[SOURCE < 0] = torch.nan
    d_y, d_weights = unpermute_backward_reference(numbers(4, 3, seed=1), y, PLACE, SOURCE, numbers(4, 2, seed=2))
    assert not d_y[SOURCE < 0].any()
    assert not d_weights[PLACE < 0].any()
    assert d_weights[PLACE >= 0].all()


def test_a_gradient_through_values_is_refused() -> None:
    x, values = numbers(4, 3).requires_grad_(), numbers(4, 2)
    with pytest.raises(NotImplementedError, match="values travel"):
        permute_rows_reference(x, SOURCE, PLACE, values)
    with torch.no_grad():
        permute_rows_reference(x, SOURCE, PLACE, values)


def test_nothing_to_move() -> None:
    none, no_place = torch.empty(0, dtype=torch.int32), torch.empty(0, 2, dtype=torch.int32)
    holes = torch.full((3,), -1, dtype=torch.int32)
    assert permute_rows_reference(numbers(4, 3), none, NOBODY).shape == (0, 3)
    assert_equal_bits(permute_rows_reference(numbers(0, 3), holes, no_place), torch.zeros(3, 3))
    with_values = permute_rows_reference(numbers(0, 3), holes, no_place, numbers(0, 2), -1.0)
    assert_equal_bits(with_values[:, 3].contiguous(), torch.full((3,), -1.0))
    assert_equal_bits(unpermute_rows_reference(numbers(0, 3), NOBODY, none), torch.zeros(4, 3))
    assert_equal_bits(unpermute_rows_reference(numbers(0, 3), NOBODY, none, numbers(4, 2)), torch.zeros(4, 3))


def test_the_host_waits_for_nothing() -> None:
    with FakeTensorMode() as fake:  # has shapes only: whoever asks for a number fails
        x, weights = (fake.from_tensor(t).requires_grad_() for t in (numbers(4, 3), numbers(4, 2)))
        place, source = fake.from_tensor(PLACE), fake.from_tensor(SOURCE)
        y = permute_rows_reference(x, source, place)
        unpermute_rows_reference(y.tanh(), place, source, weights).sum().backward()


def test_every_implementation_can_be_asked_for() -> None:
    for op in (PERMUTE_ROWS, UNPERMUTE_ROWS):
        assert [i.name for i in op.implementations] == ["kernels", "reference"]
        assert op.choose("reference", torch.device("cpu"), torch.float32).name == "reference"
        assert op.choose("auto", torch.device("meta"), torch.float32).name == "reference"
