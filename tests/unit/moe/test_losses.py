"""Auxiliary losses against their formulas."""

import math

import pytest
import torch

from megamoe.moe import losses
from megamoe.testing import assert_close


def random_probs(rows: int = 50, num_experts: int = 4) -> torch.Tensor:
    return torch.randn(rows, num_experts, generator=torch.Generator().manual_seed(3)).softmax(-1)


def test_balance_loss_by_hand() -> None:
    probs_TE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]])
    # f = (3/4, 1/4, 0), P = (.3, .5, .2)
    loss = losses.balance_loss(probs_TE, torch.tensor([3, 1, 0]))
    assert loss.item() == pytest.approx(3 * (0.75 * 0.3 + 0.25 * 0.5))


@pytest.mark.parametrize("num_experts", [1, 4, 16])
def test_balance_loss_is_one_when_balanced_and_more_otherwise(num_experts: int) -> None:
    even_TE = torch.full((10, num_experts), 1 / num_experts)
    assert losses.balance_loss(even_TE, torch.full((num_experts,), 5)).item() == pytest.approx(1.0)
    one_TE = torch.eye(num_experts)[torch.zeros(10, dtype=torch.int64)]
    assert losses.balance_loss(one_TE, 10 * one_TE[0].long()).item() == pytest.approx(num_experts)


def test_balance_loss_pushes_probability_away_from_the_loaded_expert() -> None:
    probs_TE = random_probs().requires_grad_()
    losses.balance_loss(probs_TE, torch.tensor([30, 10, 5, 5])).backward()
    assert probs_TE.grad is not None
    expected_TE = (torch.tensor([30, 10, 5, 5]) / 50 * 4 / 50).expand(50, 4)
    assert_close(probs_TE.grad, expected_TE, rel=1e-6)


def test_z_loss_by_hand() -> None:
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert losses.z_loss(logits_TE).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_orthogonality_loss() -> None:
    assert losses.orthogonality_loss(torch.eye(4, 9) * 7.0).item() == 0.0
    assert losses.orthogonality_loss(torch.ones(4, 9)).item() == pytest.approx(1.0, rel=1e-5)
    half = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # cosine 1/sqrt(2)
    assert losses.orthogonality_loss(half).item() == pytest.approx(0.5)
    assert losses.orthogonality_loss(torch.ones(1, 9)).item() == pytest.approx(0.0, abs=1e-6)


def test_entropy_is_normalised() -> None:
    assert losses.entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(1.0)
    assert losses.entropy(torch.eye(8)).item() == 0.0
    probs_TE = random_probs()
    nats = -(probs_TE * probs_TE.log()).sum(-1).mean().item()
    assert losses.entropy(probs_TE).item() == pytest.approx(nats / math.log(4))
    assert losses.entropy(torch.ones(5, 1)).item() == 0.0


def test_a_rank_without_rows_adds_nothing() -> None:
    none_TE = torch.empty(0, 4)
    assert losses.balance_loss(none_TE, torch.zeros(4, dtype=torch.int64)).item() == 0.0
    assert losses.z_loss(none_TE).item() == 0.0
    assert losses.entropy(none_TE).item() == 0.0
    assert losses.mean_rows(none_TE).tolist() == [0.0] * 4
