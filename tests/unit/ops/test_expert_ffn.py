"""Every implementation of the experts' feed-forward against the specification: values and all five gradients."""

import pytest
import torch
from torch import Tensor

from megamoe.ops.expert_ffn import EXPERT_FFN, ExpertFFN, blocked, by_source, grouped_mm, reference
from megamoe.testing import assert_close, assert_equal_bits, max_rel_error

WIDTH, FFN = 16, 24
COUNTS = {
    "uneven": [5, 1, 9, 4],
    "empty experts": [0, 7, 0, 3],
    "all on one": [0, 0, 12, 0],
    "no rows": [0, 0, 0, 0],
    "one expert": [6],
}
NAMES = ("rows", "weights", "w1", "w2", "w3")
IMPLEMENTATIONS = pytest.mark.parametrize("ffn", [blocked, by_source, grouped_mm], ids=lambda f: f.__name__)


def case(counts: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Rows, gate weights (fp32, some of them 0), w1, w2, w3."""
    generator = torch.Generator().manual_seed(len(counts) + sum(counts))
    rows, experts = sum(counts), len(counts)
    shapes = ((rows, WIDTH), (experts, FFN, WIDTH), (experts, WIDTH, FFN), (experts, FFN, WIDTH))
    x, w1, w2, w3 = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weights = torch.rand(rows, generator=generator)
    weights[::4] = 0.0
    weights = weights.double() if dtype == torch.float64 else weights
    return [tensor.requires_grad_() for tensor in (x, weights, w1, w2, w3)]


def results(ffn: ExpertFFN, tensors: list[Tensor], counts: list[int]) -> dict[str, Tensor]:
    """Output and gradients of a weighted sum of it."""
    out = ffn(*tensors, torch.tensor(counts))
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    gradients = torch.autograd.grad(out, tensors, probe)
    return {"out": out.detach(), **dict(zip(NAMES, gradients, strict=True))}


@IMPLEMENTATIONS
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_values_and_gradients_are_the_references(ffn: ExpertFFN, counts: list[int]) -> None:
    tensors = case(counts, torch.float32)
    expected = results(reference, tensors, counts)
    for name, value in results(ffn, tensors, counts).items():
        assert value.dtype == expected[name].dtype
        assert_close(value, expected[name], rel=2e-6, name=name)


@IMPLEMENTATIONS
@pytest.mark.parametrize("counts", [COUNTS["uneven"], COUNTS["empty experts"]], ids=["uneven", "empty experts"])
def test_bf16_is_as_exact_as_plain_bf16(ffn: ExpertFFN, counts: list[int]) -> None:
    tensors = case(counts, torch.bfloat16)
    exact = results(reference, [t.detach().double().requires_grad_() for t in tensors], counts)
    plain = results(reference, tensors, counts)
    for name, value in results(ffn, tensors, counts).items():
        # Twice, and never less than one rounding of the largest element.
        allowed = 2 * max(max_rel_error(plain[name], exact[name]), 2**-9)
        assert_close(value, exact[name], rel=allowed, name=name)


@pytest.mark.parametrize("counts", [COUNTS["uneven"], COUNTS["empty experts"]], ids=["uneven", "empty experts"])
def test_the_blocked_backward_pass_is_the_derivative_of_its_forward_pass(counts: list[int]) -> None:
    ends = torch.tensor(counts)
    assert torch.autograd.gradcheck(lambda *tensors: blocked(*tensors, ends), case(counts, torch.float64))


def test_blocked_repeats_bit_for_bit_and_leaves_its_inputs_alone() -> None:
    counts = [150, 90, 0, 260]
    tensors = case(counts, torch.float32)
    before = [tensor.detach().clone() for tensor in tensors]
    first, second = (results(blocked, tensors, counts) for _ in range(2))
    for name in first:
        assert_equal_bits(second[name], first[name], name=name)
    for tensor, copy in zip(tensors, before, strict=True):
        assert_equal_bits(tensor.detach(), copy)


@IMPLEMENTATIONS
def test_experts_without_rows_get_a_gradient_of_zero(ffn: ExpertFFN) -> None:
    tensors = case(COUNTS["empty experts"], torch.float32)
    gradients = results(ffn, tensors, COUNTS["empty experts"])
    for name in ("w1", "w2", "w3"):
        assert not gradients[name][[0, 2]].any()
        assert gradients[name][[1, 3]].any()


def test_gradients_in_recycled_memory_are_right_in_every_step() -> None:
    # 5 MB of fp32 per gradient: large enough to be recycled. The second step must not show anything of the first.
    experts, width, ffn_size = 5, 512, 512
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, width), (experts, ffn_size, width), (experts, width, ffn_size), (experts, ffn_size, width))
    x, w1, w2, w3 = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    weights = torch.rand(64, generator=generator).requires_grad_()
    for counts in ([10, 20, 0, 30, 4], [0, 0, 64, 0, 0], [1, 1, 1, 1, 60]):
        expected = results(reference, [x, weights, w1, w2, w3], counts)
        for name, value in results(blocked, [x, weights, w1, w2, w3], counts).items():
            assert_close(value, expected[name], rel=2e-6, name=name)


def test_auto_takes_blocked_on_a_cpu() -> None:
    assert EXPERT_FFN.choose("auto", torch.device("cpu"), torch.float32).name == "blocked"


@IMPLEMENTATIONS
@pytest.mark.parametrize("trained", [(), ("w2",)], ids=["frozen", "one matrix trained"])
def test_frozen_experts_pass_the_same_gradients_on(ffn: ExpertFFN, trained: tuple[str, ...]) -> None:
    tensors, counts = case(COUNTS["uneven"], torch.float32), COUNTS["uneven"]
    expected = results(ffn, tensors, counts)
    for name, tensor in zip(NAMES[2:], tensors[2:], strict=True):
        tensor.requires_grad_(name in trained)
    out = ffn(*tensors, torch.tensor(counts))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)))
    for name, tensor in zip(NAMES, tensors, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert_equal_bits(tensor.grad, expected[name], name=name)
        else:
            assert tensor.grad is None
