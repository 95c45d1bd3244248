"""Comparisons of tensors whose failure says which tensor, where, both values and the bound.

The measure is the largest absolute difference over the largest absolute expected value, one number per
tensor: unlike an element-wise relative error it is not ruled by elements that cancel to nearly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def max_rel_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual − expected| / max|expected|, in fp64; infinite where the difference is not finite.

    Two empty tensors differ by 0. Where ``expected`` is zero everywhere the result is 0 or infinite.
    """
    difference = _difference(actual, expected)
    largest = float(difference.max()) if difference.numel() else 0.0
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    if largest == 0.0:
        return 0.0
    return largest / scale if scale > 0.0 else float("inf")


def assert_close(actual: Tensor, expected: Tensor, *, rel: float = 0.0, abs: float = 0.0, name: str = "tensor") -> None:
    """Assert max|actual − expected| ≤ abs + rel · max|expected|, and equal shapes.

    Args:
        actual: the tensor under test, any shape and floating or integer type.
        expected: the reference, of the same shape; its largest magnitude sets the scale of ``rel``.
        rel: allowed share of that scale.
        abs: allowed difference besides.
        name: what the failure calls the tensor.

    Raises:
        AssertionError: naming the tensor, the coordinate of the worst element, both values and the bound.
            NaN on one side only always fails; two NaNs and equal infinities count as equal.
    """
    _assert_same_shape(actual, expected, name)
    if expected.numel() == 0:
        return
    difference = _difference(actual, expected)
    finite = expected.detach().double().abs()
    finite = finite[finite.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    bound = abs + rel * scale
    worst = int(difference.argmax())
    if not float(difference.flatten()[worst]) <= bound:
        raise AssertionError(
            f"{name}: the worst of {_count(difference > bound)} elements outside the tolerance "
            f"is at {_coordinate(worst, expected)}\n"
            f"{_values(actual, expected, worst)}"
            f"  difference: {float(difference.flatten()[worst]):.3e}\n"
            f"  tolerance: {bound:.3e} = abs {abs:g} + rel {rel:g} x largest expected {scale:.6g}"
        )


def assert_equal_bits(actual: Tensor, expected: Tensor, *, name: str = "tensor") -> None:
    """Assert that both tensors have one dtype, one shape and the same bits: 0.0 differs from -0.0.

    Raises:
        AssertionError: naming the tensor, the first differing element and both values.
    """
    _assert_same_shape(actual, expected, name)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {expected.dtype}")
    differs = (_bytes(actual) != _bytes(expected)).any(dim=-1)
    if bool(differs.any()):
        first = int(differs.int().argmax())
        raise AssertionError(
            f"{name}: {_count(differs)} elements differ in their bits, "
            f"the first at {_coordinate(first, expected)}\n{_values(actual, expected, first)}"
            "  tolerance: none"
        )


def _difference(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual − expected| in fp64; infinite where one side only is not finite, 0 where both are alike."""
    left, right = actual.detach().cpu().double(), expected.detach().cpu().double()
    alike = (left == right) | (left.isnan() & right.isnan())
    difference = (left - right).abs()
    return difference.masked_fill(difference.isnan(), float("inf")).masked_fill(alike, 0.0)


def _bytes(tensor: Tensor) -> Tensor:
    """[number of elements, bytes per element]"""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).reshape(flat.numel(), flat.element_size())


def _assert_same_shape(actual: Tensor, expected: Tensor, name: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")


def _coordinate(index: int, tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape))


def _values(actual: Tensor, expected: Tensor, index: int) -> str:
    got, want = actual.detach().flatten()[index].item(), expected.detach().flatten()[index].item()
    return f"  actual: {got!r}\n  expected: {want!r}\n"


def _count(mask: Tensor) -> str:
    return f"{int(mask.sum())} of {mask.numel()}"
