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


LOCAL_E = torch.tensor([True, True, False, False, False, False])


def test_locality_is_zero_only_for_the_target_itself() -> None:
    """n_local / E = 1/3: epsilon = .5 * 2/3 = 1/3; local experts get 2/3 / 2 each, the others 1/3 / 4."""
    target_E = torch.tensor([1 / 3, 1 / 3, 1 / 12, 1 / 12, 1 / 12, 1 / 12])
    assert losses.locality_loss(target_E.expand(7, 6), LOCAL_E, 0.5).item() == pytest.approx(0.0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        probs_TE = torch.randn(9, 6, generator=generator).softmax(-1)
        load_E = probs_TE.mean(0)
        by_hand = (load_E * (load_E / target_E).log()).sum()
        assert by_hand > 1e-4
        assert_close(losses.locality_loss(probs_TE, LOCAL_E, 0.5), by_hand, rel=1e-4)


def test_locality_on_one_node_is_a_balance_loss() -> None:
    everywhere_E = torch.ones(4, dtype=torch.bool)
    assert losses.locality_loss(torch.full((3, 4), 0.25), everywhere_E, 0.5).item() == pytest.approx(0.0, abs=1e-6)
    one_TE = torch.eye(4)[torch.zeros(3, dtype=torch.int64)]
    assert losses.locality_loss(one_TE, everywhere_E, 0.5).item() == pytest.approx(math.log(4))


def test_locality_has_a_gradient_where_an_expert_has_no_probability_at_all() -> None:
    logits_TE = torch.tensor([[900.0, 0.0, 0.0, 0.0, 0.0, -900.0]] * 3, requires_grad=True)
    probs_TE = logits_TE.softmax(-1)
    assert probs_TE[0, 5].item() == 0.0
    losses.locality_loss(probs_TE, LOCAL_E, 0.5).backward()
    assert logits_TE.grad is not None
    assert bool(logits_TE.grad.isfinite().all())


def test_locality_pulls_towards_this_node() -> None:
    logits_TE = torch.zeros(5, 6, requires_grad=True)
    losses.locality_loss(logits_TE.softmax(-1), LOCAL_E, 0.5).backward()
    assert logits_TE.grad is not None
    assert bool((logits_TE.grad[:, LOCAL_E] < 0).all())
    assert bool((logits_TE.grad[:, ~LOCAL_E] > 0).all())


def test_a_rank_without_rows_adds_nothing() -> None:
    none_TE = torch.empty(0, 4)
    assert losses.balance_loss(none_TE, torch.zeros(4, dtype=torch.int64)).item() == 0.0
    assert losses.z_loss(none_TE).item() == 0.0
    assert losses.entropy(none_TE).item() == 0.0
    assert losses.mean_rows(none_TE).tolist() == [0.0] * 4
