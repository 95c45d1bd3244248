"""The scores of dense expert vectors: the specification against its formula, and what is chosen where."""

import pytest
import torch
from torch import Tensor

from megamoe.ops.scores import ROUTER_SCORES, reference
from megamoe.testing import assert_close

TOKENS, WIDTH, EXPERTS = 13, 24, 5


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a shared direction, expert vectors, the rows' mean."""
    generator = torch.Generator().manual_seed(11)
    rows_TD = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64) + 0.7
    vectors_ED = torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64)
    return rows_TD.to(dtype), vectors_ED, rows_TD.mean(0)


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "as is"])
def test_products_of_each_row_with_each_vector(centred: bool) -> None:
    rows_TD, vectors_ED, mean_D = case()
    scores_TE = reference(rows_TD, vectors_ED, mean_D if centred else None, False)
    for t in range(TOKENS):
        for e in range(EXPERTS):
            row_D = rows_TD[t] - mean_D if centred else rows_TD[t]
            assert_close(scores_TE[t, e], row_D.dot(vectors_ED[e]), rel=1e-12)


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "as is"])
def test_normalised_it_is_the_cosine_for_unit_vectors(centred: bool) -> None:
    rows_TD, vectors_ED, mean_D = case()
    vectors_ED = vectors_ED / vectors_ED.norm(dim=1, keepdim=True)
    scores_TE = reference(rows_TD, vectors_ED, mean_D if centred else None, True)
    row_TD = rows_TD - mean_D if centred else rows_TD
    assert_close(scores_TE, torch.cosine_similarity(row_TD[:, None], vectors_ED[None], dim=2), rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "product"])
def test_the_backward_pass_is_the_derivative_of_the_forward_pass(normalize: bool) -> None:
    rows_TD, vectors_ED, mean_D = case()
    inputs = (rows_TD.requires_grad_(), vectors_ED.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, v: reference(x, v, mean_D, normalize), inputs)


def test_a_row_at_the_mean_is_zero_with_a_finite_gradient() -> None:
    rows_TD, vectors_ED, mean_D = case()
    rows_TD[3] = mean_D
    rows_TD.requires_grad_()
    scores_TE = reference(rows_TD, vectors_ED, mean_D, True)
    scores_TE.square().sum().backward()
    assert not scores_TE[3].any()
    assert scores_TE[2].all()
    assert rows_TD.grad is not None
    assert not rows_TD.grad[3].any()
    assert rows_TD.grad.isfinite().all()


def test_bf16_rows_are_computed_in_fp32() -> None:
    rows_TD, vectors_ED, mean_D = case(torch.bfloat16)
    scores_TE = reference(rows_TD, vectors_ED, mean_D, True)
    assert scores_TE.dtype == torch.float32
    assert_close(scores_TE.double(), reference(rows_TD.double(), vectors_ED, mean_D, True), rel=1e-5, abs=1e-6)


def test_auto_takes_torch_on_a_cpu() -> None:
    assert ROUTER_SCORES.choose("auto", torch.device("cpu"), torch.float32).name == "reference"
