"""Softmax over experts, both ways of computing it."""

import pytest
import torch

from megamoe.ops.row_softmax import NARROW, row_softmax
from megamoe.testing import assert_close


@pytest.mark.parametrize("experts", [1, 2, 8, NARROW - 1, NARROW, 64])
def test_it_is_the_softmax_with_its_gradient(experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = (torch.randn(50, experts, generator=generator) * 30).requires_grad_()
    probe_TE = torch.randn(50, experts, generator=generator)
    found, expected = row_softmax(logits_TE), logits_TE.double().softmax(-1)
    assert_close(found, expected.float(), abs=2e-6)
    gradient = torch.autograd.grad((found * probe_TE).sum(), logits_TE)[0]
    assert_close(gradient, torch.autograd.grad((expected * probe_TE).sum(), logits_TE)[0], abs=5e-6)


@pytest.mark.parametrize("experts", [4, 64])
def test_extreme_logits_stay_finite(experts: int) -> None:
    logits_TE = torch.zeros(2, experts)
    logits_TE[0, 0], logits_TE[1] = 1e30, -1e30
    found = row_softmax(logits_TE)
    assert found[0].tolist() == [1.0] + [0.0] * (experts - 1)
    assert found[1].tolist() == pytest.approx([1 / experts] * experts)


def test_no_rows() -> None:
    assert row_softmax(torch.empty(0, 4)).shape == (0, 4)
