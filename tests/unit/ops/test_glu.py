"""The plain gated linear unit against torch's own gates, in values and in all gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.ops.glu import GLU, GLU_BACKWARD, KINDS, backward_reference, reference
from megamoe.testing import assert_close, assert_equal_bits

GATES = {"swiglu": F.silu, "geglu": F.gelu}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    h1, h3 = (numbers(6, 5, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
    return h1, h3, numbers(6, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=3).requires_grad_()


@ALL_KINDS
def test_against_torchs_gates(kind: str) -> None:
    h1, h3, weights = case(torch.float64)
    act = reference(h1, h3, weights, None, kind)
    expected = weights[:, None] * GATES[kind](h1) * h3
    assert_close(act.detach(), expected.detach(), rel=1e-14)
    probe = numbers(6, 5, dtype=torch.float64, seed=4)
    for got, right in zip(
        torch.autograd.grad(act, (h1, h3, weights), probe),
        torch.autograd.grad(expected, (h1, h3, weights), probe),
        strict=True,
    ):
        assert_close(got, right, rel=1e-14)
    assert_close(reference(h1, h3, kind=kind).detach(), (GATES[kind](h1) * h3).detach(), rel=1e-14)


@ALL_KINDS
def test_gradients_are_derivatives(kind: str) -> None:
    counts = torch.tensor([1, 0, 3])
    assert torch.autograd.gradcheck(lambda *t: reference(*t, counts, kind), case(torch.float64))


@ALL_KINDS
def test_rows_that_do_not_count_become_zeros_whatever_they_hold(kind: str) -> None:
    tensors = [t.detach() for t in case(torch.bfloat16)]
    for tensor in tensors:
        tensor[4:] = torch.nan
    counts = torch.tensor([1, 0, 3])
    for result in (reference(*tensors, counts, kind), *backward_reference(tensors[0], *tensors, counts, kind)):
        assert not result[4:].any()
        assert result[:4].isfinite().all()


def test_half_precisions_are_computed_in_fp32_and_rounded_once() -> None:
    h1, h3, weights = case(torch.bfloat16)
    act = reference(h1, h3, weights)
    assert_equal_bits(act.detach(), reference(h1.float(), h3.float(), weights).detach().bfloat16())
    d_h1, d_h3, d_weights, again = backward_reference(act.detach(), h1.detach(), h3.detach(), weights.detach())
    assert_equal_bits(again, act.detach())
    assert (d_h1.dtype, d_h3.dtype, d_weights.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_no_gradient_for_weights_that_are_not_there() -> None:
    h1, h3, _ = case(torch.float32)
    assert backward_reference(h1.detach(), h1.detach(), h3.detach())[2].shape == (0,)
    reference(h1, h3).sum().backward()
    assert h1.grad is not None
    assert h3.grad is not None


def test_an_unknown_kind_is_refused() -> None:
    h1, h3, _ = case(torch.float32)
    with pytest.raises(ValueError, match="no gate 'relu'; there are swiglu, geglu"):
        reference(h1, h3, kind="relu")


def test_the_host_waits_for_nothing() -> None:
    tensors = [t.detach() for t in case(torch.float32)]
    with FakeTensorMode() as fake:  # has shapes only: whoever asks for a number fails
        tensors = [fake.from_tensor(t).requires_grad_() for t in tensors]
        reference(*tensors, fake.from_tensor(torch.tensor([2, 2]))).sum().backward()


def test_forward_and_backward_are_chosen_together() -> None:
    for device in (torch.device("cpu"), torch.device("meta")):
        for dtype in (torch.float32, torch.bfloat16):
            assert GLU.choose("auto", device, dtype).name == GLU_BACKWARD.choose("auto", device, dtype).name
    assert GLU.choose("auto", torch.device("meta"), torch.float32).name == "reference"
