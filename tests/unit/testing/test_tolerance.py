"""The comparisons fail when they should, and say where."""

import pytest
import torch

from megamoe.testing import assert_close, assert_equal_bits, max_rel_error

EXPECTED = torch.tensor([[1.0, -4.0], [0.5, 2.0]])


def with_error(size: float) -> torch.Tensor:
    actual = EXPECTED.clone()
    actual[1, 0] += size
    return actual


def test_the_bound_is_relative_to_the_largest_expected_value() -> None:
    assert_close(with_error(0.039), EXPECTED, rel=0.01)
    with pytest.raises(AssertionError):
        assert_close(with_error(0.041), EXPECTED, rel=0.01)
    assert_close(with_error(0.041), EXPECTED, rel=0.01, abs=0.002)


def test_a_failure_names_tensor_coordinate_values_and_bound() -> None:
    with pytest.raises(AssertionError) as failure:
        assert_close(with_error(0.5), EXPECTED, rel=0.01, name="router.weight")
    message = str(failure.value)
    for part in ("router.weight", "(1, 0)", "actual: 1.0", "expected: 0.5", "tolerance: 4.000e-02", "1 of 4"):
        assert part in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_fail_unless_both_sides_agree(value) -> None:
    broken = EXPECTED.clone()
    broken[0, 1] = value
    assert_close(broken, broken.clone())
    assert max_rel_error(broken, EXPECTED) == float("inf")
    for actual, expected in ((broken, EXPECTED), (EXPECTED, broken)):
        with pytest.raises(AssertionError, match=r"\(0, 1\)"):
            assert_close(actual, expected, rel=10.0)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(2, 1\)"):
        assert_close(torch.zeros(2), torch.zeros(2, 1), abs=1.0)


def test_empty_tensors_are_close() -> None:
    assert_close(torch.empty(0, 3), torch.empty(0, 3))
    assert_equal_bits(torch.empty(0, 3), torch.empty(0, 3))
    assert max_rel_error(torch.empty(0), torch.empty(0)) == 0.0


def test_max_rel_error() -> None:
    assert max_rel_error(with_error(0.4), EXPECTED) == pytest.approx(0.1)
    assert max_rel_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert max_rel_error(torch.ones(2), torch.zeros(2)) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_equal_bits_of_every_kind(dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    assert_equal_bits(tensor.t(), tensor.t().contiguous())
    with pytest.raises(AssertionError, match=r"gate: 1 of 4 elements .* first at \(1, 0\)"):
        assert_equal_bits(tensor, torch.tensor([[0, 1], [0, 0]]).to(dtype), name="gate")


def test_bits_tell_apart_what_numbers_do_not() -> None:
    with pytest.raises(AssertionError, match=r"\(0,\)"):
        assert_equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    with pytest.raises(AssertionError, match="dtype"):
        assert_equal_bits(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert_equal_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert_equal_bits(torch.tensor(1.5), torch.tensor(1.5))
