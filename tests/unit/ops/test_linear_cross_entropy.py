"""The fused loss against its specification: values, gradients, precision, and what it holds in memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.ops.linear_cross_entropy import linear_cross_entropy, reference, token_scores
from megamoe.testing import assert_close, assert_equal_bits, max_rel_error

ROWS, WIDTH, VOCAB = 37, 24, 113


def case(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden_TD = torch.randn(rows, WIDTH, generator=generator)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator) * 0.5
    labels_T = torch.randint(VOCAB, (rows,), generator=generator)
    labels_T[0], labels_T[-1] = 0, VOCAB - 1
    return hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), labels_T


def results(loss: Tensor, hidden_TD: Tensor, weight_VD: Tensor) -> dict[str, Tensor]:
    """Loss and gradients; the loss enters a larger one with a factor, as it does beside auxiliary losses."""
    d_hidden, d_weight = torch.autograd.grad(loss * 0.3, [hidden_TD, weight_VD])
    return {"loss": loss.detach(), "hidden": d_hidden, "weight": d_weight}


class Shapes(TorchDispatchMode):
    """Shapes of everything that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out])}
        return out


@pytest.mark.parametrize("chunk_size", [0, 1, 5, 36, ROWS, 1024])
def test_value_and_gradients_equal_the_specification(chunk_size: int) -> None:
    hidden_TD, weight_VD, labels_T = case()
    got = results(linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk_size), hidden_TD, weight_VD)
    expected = results(reference(hidden_TD, weight_VD, labels_T), hidden_TD, weight_VD)
    assert got["loss"].dtype == torch.float32
    for name, tensor in expected.items():
        assert_close(got[name], tensor, rel=2e-6, name=name)


@pytest.mark.parametrize("chunk_size", [0, 8])
def test_bf16_is_at_most_twice_as_wrong_as_plain_bf16(chunk_size: int) -> None:
    hidden_TD, weight_VD, labels_T = case(torch.bfloat16, rows=512)
    exact_inputs = [t.detach().float().requires_grad_() for t in (hidden_TD, weight_VD)]
    exact = results(reference(*exact_inputs, labels_T), *exact_inputs)
    plain = results(reference(hidden_TD, weight_VD, labels_T), hidden_TD, weight_VD)
    got = results(linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk_size), hidden_TD, weight_VD)
    for name in exact:
        assert got[name].dtype == plain[name].dtype
        assert max_rel_error(got[name], exact[name]) <= 2 * max_rel_error(plain[name], exact[name]), name


def test_large_logits_do_not_overflow() -> None:
    hidden_TD, weight_VD, labels_T = case()
    large_TD = (hidden_TD.detach() * 1e3).requires_grad_()
    got = results(linear_cross_entropy(large_TD, weight_VD, labels_T, 8), large_TD, weight_VD)
    expected = results(reference(large_TD, weight_VD, labels_T), large_TD, weight_VD)
    for name, tensor in expected.items():
        assert bool(got[name].isfinite().all())
        assert_close(got[name], tensor, rel=1e-5, name=name)


def test_no_more_than_a_chunk_of_logits_exists() -> None:
    hidden_TD, weight_VD, labels_T = case()
    with Shapes() as shapes:
        results(linear_cross_entropy(hidden_TD, weight_VD, labels_T, 5), hidden_TD, weight_VD)
    rows_of_logits = {shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == VOCAB}
    rows_of_logits.discard(WIDTH)  # the transposed weight
    assert max(rows_of_logits) == 5


@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradients_none_are_formed(frozen: bool) -> None:
    hidden_TD, weight_VD, labels_T = case()
    expected = linear_cross_entropy(hidden_TD, weight_VD, labels_T, 5).detach()
    inputs = [t.detach() for t in (hidden_TD, weight_VD)] if frozen else [hidden_TD, weight_VD]
    with Shapes() as shapes, torch.set_grad_enabled(frozen):
        loss = linear_cross_entropy(*inputs, labels_T, 5)
    assert_equal_bits(loss, expected)
    assert not loss.requires_grad
    assert (VOCAB, WIDTH) not in shapes.seen


def test_a_frozen_head_still_passes_gradients_to_hidden_rows() -> None:
    hidden_TD, weight_VD, labels_T = case()
    loss = linear_cross_entropy(hidden_TD, weight_VD.detach(), labels_T, 5)
    expected = torch.autograd.grad(reference(hidden_TD, weight_VD, labels_T), hidden_TD)[0]
    assert_close(torch.autograd.grad(loss, hidden_TD)[0], expected, rel=2e-6)


@pytest.mark.parametrize("chunk_size", [0, 5])
def test_fp64_keeps_its_digits(chunk_size: int) -> None:
    hidden_TD, weight_VD, labels_T = case(torch.float64)
    got = results(linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk_size), hidden_TD, weight_VD)
    plain = torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.t(), labels_T)
    for name, tensor in results(plain, hidden_TD, weight_VD).items():
        assert got[name].dtype == torch.float64
        assert_close(got[name], tensor, rel=1e-14, name=name)
    each_T, right_T = token_scores(hidden_TD, weight_VD, labels_T, chunk_size)
    assert each_T.dtype == torch.float64
    assert_close(each_T.mean(), plain, rel=1e-14)
    assert torch.equal(right_T, (hidden_TD @ weight_VD.t()).argmax(-1) == labels_T)


def test_a_frozen_projection_passes_the_same_gradient_on() -> None:
    hidden_TD, weight_VD, labels_T = case(torch.float32)
    expected = results(linear_cross_entropy(hidden_TD, weight_VD, labels_T, 5), hidden_TD, weight_VD)
    weight_VD.requires_grad_(False)
    loss = linear_cross_entropy(hidden_TD, weight_VD, labels_T, 5)
    (gradient,) = torch.autograd.grad(loss * 0.3, hidden_TD)
    assert torch.equal(gradient, expected["hidden"])


def test_another_divisor() -> None:
    hidden_TD, weight_VD, labels_T = case(torch.float32)
    plain = results(linear_cross_entropy(hidden_TD, weight_VD, labels_T, 5), hidden_TD, weight_VD)
    halved = linear_cross_entropy(hidden_TD, weight_VD, labels_T, 5, targets=2.0 * len(labels_T))
    for name, value in results(halved, hidden_TD, weight_VD).items():
        assert_close(value, plain[name] / 2, rel=1e-6, name=name)
