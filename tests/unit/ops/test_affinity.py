"""The fast affinity against the specification, the specification against the formula: values and gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megamoe.ops import affinity
from megamoe.ops.affinity import GRAP_AFFINITY, GrapAffinity, reference, slice_owners, sliced
from megamoe.testing import assert_close, assert_equal_bits

# Width and experts: equal slices in one group, uneven slices, groups of 8, one expert, one feature per expert.
SIZES = {"equal": (24, 4), "uneven": (26, 4), "groups": (96, 24), "one expert": (8, 1), "one feature": (16, 16)}
ALL_SIZES = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
BOTH = pytest.mark.parametrize("op", [reference, sliced], ids=lambda f: f.__name__)


def case(size: tuple[int, int], dtype: torch.dtype, tokens: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a shared direction, their mean, values; the mean and the values at least in fp32."""
    generator = torch.Generator().manual_seed(sum(size) + tokens)
    rows_TD = torch.randn(tokens, size[0], generator=generator) + 0.7
    mean_D = rows_TD.mean(0) if tokens else torch.zeros(size[0])
    values_D = torch.randn(size[0], generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return rows_TD.to(dtype).requires_grad_(), mean_D.to(wide), values_D.to(wide).requires_grad_()


def results(op: GrapAffinity, rows_TD: Tensor, mean_D: Tensor | None, values_D: Tensor, experts: int) -> list[Tensor]:
    """Affinity, and gradients to rows and values of a weighted sum of the affinity."""
    affinity_TE = op(rows_TD, mean_D, values_D, experts)
    probe_TE = torch.randn(affinity_TE.shape, generator=torch.Generator().manual_seed(9)).to(affinity_TE.dtype)
    return [affinity_TE.detach(), *torch.autograd.grad(affinity_TE, (rows_TD, values_D), probe_TE)]


NAMES = ("affinity", "gradient to rows", "gradient to values")


@BOTH
def test_it_is_the_cosine_with_the_slices(op: GrapAffinity) -> None:
    rows_TD, mean_D, values_D = case((26, 4), torch.float64)
    affinity_TE = op(rows_TD, mean_D, values_D, 4)
    begin = 0
    for expert, width in enumerate((7, 7, 6, 6)):
        vector_D = torch.zeros(26, dtype=torch.float64)
        vector_D[begin : begin + width] = values_D[begin : begin + width].detach()
        begin += width
        expected_T = torch.cosine_similarity(rows_TD - mean_D, vector_D[None], dim=1)
        assert_close(affinity_TE[:, expert].detach(), expected_T.detach(), rel=1e-12)


@BOTH
def test_without_values_it_is_grouped_average_pooling(op: GrapAffinity) -> None:
    rows_TD, _, _ = case((24, 4), torch.float32)
    affinity_TE = op(rows_TD, None, None, 4)
    pooled_TE = rows_TD.unflatten(1, (4, 6)).sum(-1) / (rows_TD.norm(dim=-1, keepdim=True) * math.sqrt(6))
    assert_close(affinity_TE.detach(), pooled_TE.detach(), rel=2e-6)
    (own,) = torch.autograd.grad(affinity_TE.square().sum(), rows_TD)
    (plain,) = torch.autograd.grad(pooled_TE.square().sum(), rows_TD)
    assert_close(own, plain, rel=5e-6)


@ALL_SIZES
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "as is"])
def test_values_and_gradients_are_the_references(size: tuple[int, int], centred: bool) -> None:
    rows_TD, mean_D, values_D = case(size, torch.float32)
    inputs = (rows_TD, mean_D if centred else None, values_D, size[1])
    for name, value, expected in zip(NAMES, results(sliced, *inputs), results(reference, *inputs), strict=True):
        assert value.dtype == expected.dtype
        assert_close(value, expected, rel=1e-5, abs=1e-6, name=name)


@ALL_SIZES
def test_bf16_rows_are_computed_in_fp32(size: tuple[int, int]) -> None:
    rows_TD, mean_D, values_D = case(size, torch.bfloat16)
    inputs = (rows_TD, mean_D, values_D, size[1])
    own, expected = results(sliced, *inputs), results(reference, *inputs)
    assert [value.dtype for value in own] == [value.dtype for value in expected]
    assert [value.dtype for value in own] == [torch.float32, torch.bfloat16, torch.float32]
    for name, value, other in zip(NAMES, own, expected, strict=True):
        # A gradient in bf16 may round to the other neighbour.
        assert_close(value, other, rel=2**-8 if value.dtype == torch.bfloat16 else 1e-5, abs=1e-6, name=name)


@BOTH
@ALL_SIZES
def test_the_backward_pass_is_the_derivative_of_the_forward_pass(op: GrapAffinity, size: tuple[int, int]) -> None:
    rows_TD, mean_D, values_D = case(size, torch.float64, tokens=5)
    assert torch.autograd.gradcheck(lambda x, v: op(x, mean_D, v, size[1]), (rows_TD, values_D))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case((96, 24), torch.float64)
    whole = results(sliced, *inputs, 24)
    monkeypatch.setattr(affinity, "CHUNK_ELEMENTS", 4 * 96)
    for name, value, expected in zip(NAMES, results(sliced, *inputs, 24), whole, strict=True):
        assert_close(value, expected, rel=1e-12, abs=1e-12, name=name)


@BOTH
def test_a_row_at_the_mean_and_a_slice_of_zeros_are_zero_with_finite_gradients(op: GrapAffinity) -> None:
    rows_TD, mean_D, values_D = case((24, 4), torch.float32)
    with torch.no_grad():
        rows_TD[3] = mean_D
        values_D[6:12] = 0
    affinity_TE, d_rows_TD, d_values_D = results(op, rows_TD, mean_D, values_D, 4)
    assert not affinity_TE[3].any()
    assert not affinity_TE[:, 1].any()
    assert affinity_TE[0, 0] != 0
    assert not d_rows_TD[3].any()
    assert not d_values_D[6:12].any()
    assert d_rows_TD.isfinite().all()
    assert d_values_D.isfinite().all()


@BOTH
def test_rows_of_zeros_without_a_mean(op: GrapAffinity) -> None:
    rows_TD, _, values_D = case((24, 4), torch.float32)
    zeros_TD = torch.zeros_like(rows_TD, requires_grad=True)
    for value in results(op, zeros_TD, None, values_D, 4):
        assert not value.any()


def test_rows_close_to_a_long_mean_keep_their_digits() -> None:
    # |x - m| is a ten-thousandth of |m|: expanding |x - m|^2 in fp32 would leave nothing of it.
    rows_TD, _, values_D = case((24, 4), torch.float32)
    mean_D = torch.full((24,), 1024.0)
    near_TD = (mean_D + 0.125 * rows_TD.detach().mul(8).round().div(8)).requires_grad_()
    exact = results(reference, near_TD.detach().double().requires_grad_(), mean_D, values_D, 4)
    for name, value, expected in zip(NAMES, results(sliced, near_TD, mean_D, values_D, 4), exact, strict=True):
        assert_close(value, expected, rel=1e-5, abs=1e-6, name=name)


@BOTH
def test_no_tokens(op: GrapAffinity) -> None:
    rows_TD, mean_D, values_D = case((24, 4), torch.float32, tokens=0)
    affinity_TE, d_rows_TD, d_values_D = results(op, rows_TD, mean_D, values_D, 4)
    assert affinity_TE.shape == (0, 4)
    assert d_rows_TD.shape == (0, 24)
    assert not d_values_D.any()


def test_it_repeats_bit_for_bit_also_under_recomputation_and_leaves_its_inputs_alone() -> None:
    inputs = case((96, 24), torch.float32)
    before = [tensor.detach().clone() for tensor in inputs]

    def recomputed(*args: object) -> Tensor:
        return checkpoint(sliced, *args, use_reentrant=False)

    first, again, later = (results(op, *inputs, 24) for op in (sliced, sliced, recomputed))
    for name, value, second, third in zip(NAMES, first, again, later, strict=True):
        assert_equal_bits(second, value, name=name)
        assert_equal_bits(third, value, name=name)
    for tensor, copy in zip(inputs, before, strict=True):
        assert_equal_bits(tensor.detach(), copy)


def test_values_that_are_not_learned_cost_no_gradient() -> None:
    rows_TD, mean_D, values_D = case((24, 4), torch.float32)
    learned = results(sliced, rows_TD, mean_D, values_D, 4)
    affinity_TE = sliced(rows_TD, mean_D, values_D.detach(), 4)
    probe_TE = torch.randn(affinity_TE.shape, generator=torch.Generator().manual_seed(9))
    (d_rows_TD,) = torch.autograd.grad(affinity_TE, rows_TD, probe_TE)
    assert_equal_bits(d_rows_TD, learned[1])


def test_the_first_slices_are_the_longer_ones() -> None:
    assert slice_owners(10, 4, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]


def test_auto_takes_sliced_on_a_cpu_and_the_reference_with_its_reason_on_a_gpu() -> None:
    assert GRAP_AFFINITY.choose("auto", torch.device("cpu"), torch.float32).name == "sliced"
    choice = GRAP_AFFINITY.choose("auto", torch.device("cuda"), torch.bfloat16)
    assert choice.name == "reference"
    assert "wait" in choice.reason
