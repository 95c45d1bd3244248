"""Experts some at a time, their weights' gradients last: the bits of all at once."""

import pytest
import torch
from torch import Tensor

from megamoe.ops.expert_ffn import EXPERT_FFN, EXPERT_FFN_SPLIT
from megamoe.testing import assert_equal_bits

COUNTS = [3, 0, 5, 1]
SPANS = (slice(0, 1), slice(1, 2), slice(2, 4))
WIDTH, FFN, BEYOND = 8, 16, 2
CPU = torch.device("cpu")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """Rows, gate weights in fp32, w1, w2, w3."""
    num_rows, num_experts = sum(COUNTS) + BEYOND, len(COUNTS)
    shapes = [(num_rows, WIDTH), (num_experts, FFN, WIDTH), (num_experts, WIDTH, FFN), (num_experts, FFN, WIDTH)]
    rows, *weights = (drawn(*shape, dtype=dtype) for shape in shapes)
    return [rows, drawn(num_rows), *weights]


def in_spans(implementation: str, tensors: list[Tensor]) -> Tensor:
    rows, gates, w1, w2, w3 = tensors
    chunks = EXPERT_FFN_SPLIT.choose(implementation, CPU, rows.dtype).function((w1, w2, w3))
    out, start = [], 0
    for span in SPANS:
        counts = COUNTS[span]
        stop = start + sum(counts)
        end = stop + BEYOND if span.stop == len(COUNTS) else stop
        out.append(chunks(span, rows[start:end], gates[start:end], torch.tensor(counts))[: stop - start])
        start = stop
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["blocked", "fused"])
def test_spans_of_experts_give_the_bits_of_all(implementation: str, dtype: torch.dtype) -> None:
    tensors, used = inputs(dtype), sum(COUNTS)
    whole = EXPERT_FFN.choose(implementation, CPU, dtype).function(*tensors, torch.tensor(COUNTS))[:used]
    found = in_spans(implementation, tensors)
    assert_equal_bits(found, whole)
    grad = drawn(used, WIDTH, dtype=dtype).detach()
    expected = torch.autograd.grad(whole, tensors, grad)
    for number in range(2):  # the second time as the first
        gradients = torch.autograd.grad(found, tensors, grad, retain_graph=True)
        for name, one, other in zip(("rows", "gates", "w1", "w2", "w3"), gradients, expected, strict=True):
            rows = slice(used) if name in ("rows", "gates") else slice(None)
            assert_equal_bits(one[rows], other[rows], name=f"{name}, time {number}")


@pytest.mark.parametrize("implementation", ["blocked", "fused"])
def test_frozen_experts_have_no_work_left(implementation: str) -> None:
    tensors = inputs(torch.float32)
    expected = torch.autograd.grad(in_spans(implementation, tensors).sum(), tensors[:2])
    frozen = [*tensors[:2], *(w.detach() for w in tensors[2:])]
    found = torch.autograd.grad(in_spans(implementation, frozen).sum(), frozen[:2])
    for one, other in zip(found, expected, strict=True):
        assert_equal_bits(one[: sum(COUNTS)], other[: sum(COUNTS)])
