"""The fused feed-forward of the experts against the specification: values, all gradients, padding, frozen weights."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.ops.expert_ffn import reference
from megamoe.ops.expert_ffn_fused import fused
from megamoe.testing import assert_close, assert_equal_bits, max_rel_error

WIDTH, FFN = 16, 24
COUNTS = {
    "uneven": ([5, 1, 9, 4], 0),
    "empty experts": ([0, 7, 0, 3], 0),
    "padding": ([3, 0, 8], 6),
    "only padding": ([0, 0, 0], 4),
    "no rows": ([0, 0, 0, 0], 0),
    "one expert": ([6], 0),
}
ALL_COUNTS = pytest.mark.parametrize("counts, padding", COUNTS.values(), ids=COUNTS.keys())
NAMES = ("rows", "weights", "w1", "w2", "w3")


def case(counts: list[int], padding: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows, gate weights (fp32, some of them 0), w1, w2, w3. Padding rows are NaN, and so are their weights."""
    generator = torch.Generator().manual_seed(len(counts) + sum(counts))
    rows, experts = sum(counts) + padding, len(counts)
    shapes = ((rows, WIDTH), (experts, FFN, WIDTH), (experts, WIDTH, FFN), (experts, FFN, WIDTH))
    x, w1, w2, w3 = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weights = torch.rand(rows, generator=generator)
    weights[::4] = 0.0
    x[sum(counts) :], weights[sum(counts) :] = torch.nan, torch.nan
    return [tensor.requires_grad_() for tensor in (x, weights, w1, w2, w3)]


def results(ffn, tensors: list[Tensor], counts: list[int]) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Output and gradients of a weighted sum of it, those of rows without the padding."""
    out, used = ffn(*tensors, torch.tensor(counts)), sum(counts)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    d_rows, d_weights, *rest = torch.autograd.grad(out, tensors, probe)
    found = {"out": out.detach()[:used], "rows": d_rows[:used], "weights": d_weights[:used]}
    return found | dict(zip(NAMES[2:], rest, strict=True))


@ALL_COUNTS
def test_values_and_gradients_are_the_references(counts: list[int], padding: int) -> None:
    tensors = case(counts, padding, torch.float32)
    expected = results(reference, tensors, counts)
    for name, value in results(fused, tensors, counts).items():
        assert value.dtype == expected[name].dtype
        assert_close(value, expected[name], rel=2e-6, name=name)


@ALL_COUNTS
def test_bf16_is_as_exact_as_plain_bf16(counts: list[int], padding: int) -> None:
    tensors = case(counts, padding, torch.bfloat16)
    exact = results(reference, [t.detach().double().requires_grad_() for t in tensors], counts)
    plain = results(reference, tensors, counts)
    for name, value in results(fused, tensors, counts).items():
        # Twice, and never less than one rounding of the largest element.
        allowed = 2 * max(max_rel_error(plain[name], exact[name]), 2**-9)
        assert_close(value, exact[name], rel=allowed, name=name)


def test_weights_of_padding_get_a_gradient_of_zero() -> None:
    tensors = case([3, 0, 8], 6, torch.float32)
    (d_weights,) = torch.autograd.grad(fused(*tensors, torch.tensor([3, 0, 8]))[:11].sum(), tensors[1])
    assert not d_weights[11:].any()
    assert d_weights[:11].isfinite().all()


def test_experts_without_rows_get_a_gradient_of_zero() -> None:
    counts = [0, 7, 0, 3]
    gradients = results(fused, case(counts, 0, torch.float32), counts)
    for name in ("w1", "w2", "w3"):
        assert not gradients[name][[0, 2]].any()
        assert gradients[name][[1, 3]].any()


@pytest.mark.parametrize("trained", [(), ("w2",), ("w1", "w3")], ids=["frozen", "w2 trained", "w1 and w3 trained"])
def test_frozen_experts_pass_the_same_gradients_on(trained: tuple[str, ...]) -> None:
    counts = [5, 1, 9, 4]
    tensors = case(counts, 0, torch.float32)
    expected = results(fused, tensors, counts)
    for name, tensor in zip(NAMES[2:], tensors[2:], strict=True):
        tensor.requires_grad_(name in trained)
    out = fused(*tensors, torch.tensor(counts))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)))
    for name, tensor in zip(NAMES, tensors, strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            assert_equal_bits(tensor.grad, expected[name], name=name)


def test_a_gradient_that_is_not_contiguous_is_taken() -> None:
    tensors, counts = case([5, 1], 0, torch.float32), torch.tensor([5, 1])
    expected = torch.autograd.grad(fused(*tensors, counts), tensors, torch.ones(6, WIDTH))
    for got, right in zip(torch.autograd.grad(fused(*tensors, counts).sum(), tensors), expected, strict=True):
        assert_equal_bits(got, right)


def test_the_host_waits_for_nothing() -> None:
    tensors = [t.detach() for t in case([3, 0, 8], 6, torch.bfloat16)]
    with FakeTensorMode() as fake:  # has shapes only: whoever asks for a number fails
        tensors = [fake.from_tensor(t).requires_grad_() for t in tensors]
        fused(*tensors, fake.from_tensor(torch.tensor([3, 0, 8]))).sum().backward()


def test_it_keeps_two_tensors_between_the_products_and_no_more() -> None:
    tensors, kept = case([5, 1, 9, 4], 0, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        fused(*tensors, torch.tensor([5, 1, 9, 4]))
    assert kept.count((19, FFN)) == 2
    assert kept.count((19, WIDTH)) == 1
