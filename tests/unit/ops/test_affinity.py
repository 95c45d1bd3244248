"""The fast affinity against the specification, the specification against the formula: values and gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megamoe.ops import affinity
from megamoe.ops.affinity import GRAP_AFFINITY, GrapAffinity, reference, sliced
from megamoe.ops.affinity_kernels import compiled, unavailable, with_choice
from megamoe.ops.slices import slice_owners
from megamoe.testing import assert_close, assert_equal_bits

# Width and experts: equal slices in one group, uneven slices, groups of 8, one expert, one feature per expert.
SIZES = {"equal": (24, 4), "uneven": (26, 4), "groups": (96, 24), "one expert": (8, 1), "one feature": (16, 16)}
ALL_SIZES = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
WITHOUT = unavailable(torch.device("cpu"), torch.float32)
COMPILED = pytest.param(compiled, marks=pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT))
ALL = pytest.mark.parametrize("op", [reference, sliced, COMPILED], ids=lambda f: f.__name__)
FAST = pytest.mark.parametrize("op", [sliced, COMPILED], ids=lambda f: f.__name__)


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


@ALL
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


@ALL
def test_without_values_it_is_grouped_average_pooling(op: GrapAffinity) -> None:
    rows_TD, _, _ = case((24, 4), torch.float32)
    affinity_TE = op(rows_TD, None, None, 4)
    pooled_TE = rows_TD.unflatten(1, (4, 6)).sum(-1) / (rows_TD.norm(dim=-1, keepdim=True) * math.sqrt(6))
    assert_close(affinity_TE.detach(), pooled_TE.detach(), rel=2e-6)
    (own,) = torch.autograd.grad(affinity_TE.square().sum(), rows_TD)
    (plain,) = torch.autograd.grad(pooled_TE.square().sum(), rows_TD)
    assert_close(own, plain, rel=5e-6)


@FAST
@ALL_SIZES
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "as is"])
def test_values_and_gradients_are_the_references(op: GrapAffinity, size: tuple[int, int], centred: bool) -> None:
    rows_TD, mean_D, values_D = case(size, torch.float32)
    inputs = (rows_TD, mean_D if centred else None, values_D, size[1])
    for name, value, expected in zip(NAMES, results(op, *inputs), results(reference, *inputs), strict=True):
        assert value.dtype == expected.dtype
        assert_close(value, expected, rel=1e-5, abs=1e-6, name=name)


@FAST
@ALL_SIZES
def test_bf16_rows_are_computed_in_fp32(op: GrapAffinity, size: tuple[int, int]) -> None:
    rows_TD, mean_D, values_D = case(size, torch.bfloat16)
    inputs = (rows_TD, mean_D, values_D, size[1])
    own, expected = results(op, *inputs), results(reference, *inputs)
    assert [value.dtype for value in own] == [value.dtype for value in expected]
    assert [value.dtype for value in own] == [torch.float32, torch.bfloat16, torch.float32]
    for name, value, other in zip(NAMES, own, expected, strict=True):
        # A gradient in bf16 may round to the other neighbour.
        assert_close(value, other, rel=2**-8 if value.dtype == torch.bfloat16 else 1e-5, abs=1e-6, name=name)


@ALL
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


@ALL
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


@ALL
def test_rows_of_zeros_without_a_mean(op: GrapAffinity) -> None:
    rows_TD, _, values_D = case((24, 4), torch.float32)
    zeros_TD = torch.zeros_like(rows_TD, requires_grad=True)
    for value in results(op, zeros_TD, None, values_D, 4):
        assert not value.any()


@FAST
def test_rows_close_to_a_long_mean_keep_their_digits(op: GrapAffinity) -> None:
    # |x - m| is a ten-thousandth of |m|: expanding |x - m|^2 in fp32 would leave nothing of it.
    rows_TD, _, values_D = case((24, 4), torch.float32)
    mean_D = torch.full((24,), 1024.0)
    near_TD = (mean_D + 0.125 * rows_TD.detach().mul(8).round().div(8)).requires_grad_()
    exact = results(reference, near_TD.detach().double().requires_grad_(), mean_D, values_D, 4)
    for name, value, expected in zip(NAMES, results(op, near_TD, mean_D, values_D, 4), exact, strict=True):
        assert_close(value, expected, rel=1e-5, abs=1e-6, name=name)


@ALL
def test_no_tokens(op: GrapAffinity) -> None:
    rows_TD, mean_D, values_D = case((24, 4), torch.float32, tokens=0)
    affinity_TE, d_rows_TD, d_values_D = results(op, rows_TD, mean_D, values_D, 4)
    assert affinity_TE.shape == (0, 4)
    assert d_rows_TD.shape == (0, 24)
    assert not d_values_D.any()


@FAST
def test_it_repeats_bit_for_bit_also_under_recomputation_and_leaves_its_inputs_alone(op: GrapAffinity) -> None:
    inputs = case((96, 24), torch.float32)
    before = [tensor.detach().clone() for tensor in inputs]

    def recomputed(*args: object) -> Tensor:
        return checkpoint(op, *args, use_reentrant=False)

    first, again, later = (results(way, *inputs, 24) for way in (op, op, recomputed))
    for name, value, second, third in zip(NAMES, first, again, later, strict=True):
        assert_equal_bits(second, value, name=name)
        assert_equal_bits(third, value, name=name)
    for tensor, copy in zip(inputs, before, strict=True):
        assert_equal_bits(tensor.detach(), copy)


@FAST
def test_values_that_are_not_learned_cost_no_gradient(op: GrapAffinity) -> None:
    rows_TD, mean_D, values_D = case((24, 4), torch.float32)
    learned = results(op, rows_TD, mean_D, values_D, 4)
    affinity_TE = op(rows_TD, mean_D, values_D.detach(), 4)
    probe_TE = torch.randn(affinity_TE.shape, generator=torch.Generator().manual_seed(9))
    (d_rows_TD,) = torch.autograd.grad(affinity_TE, rows_TD, probe_TE)
    assert_equal_bits(d_rows_TD, learned[1])


def test_the_first_slices_are_the_longer_ones() -> None:
    assert slice_owners(10, 4, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT)
def test_the_choice_from_the_same_pass_is_that_of_the_largest_affinities() -> None:
    rows_TD, mean_D, values_D = case((96, 24), torch.bfloat16)
    affinity_TE, experts_TK = with_choice(rows_TD, mean_D, values_D, 24, 3)
    assert_equal_bits(affinity_TE.detach(), compiled(rows_TD, mean_D, values_D, 24).detach())
    assert experts_TK.dtype == torch.int32
    assert experts_TK.tolist() == affinity_TE.topk(3).indices.tolist()
    affinity_TE.sum().backward()
    assert rows_TD.grad is not None


@pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT)
def test_rows_that_are_a_view_of_wider_ones_or_transposed() -> None:
    rows_TD, mean_D, values_D = case((24, 4), torch.float32)
    wanted = results(compiled, rows_TD, mean_D, values_D, 4)
    wide_TD = torch.cat([rows_TD.detach(), rows_TD.detach()], dim=1)[:, :24].requires_grad_()
    transposed_TD = rows_TD.detach().t().contiguous().t().requires_grad_()
    for view_TD in (wide_TD, transposed_TD):
        for name, value, expected in zip(NAMES, results(compiled, view_TD, mean_D, values_D, 4), wanted, strict=True):
            assert_equal_bits(value, expected, name=name)


def test_auto_on_a_cpu_takes_the_compiled_op_where_there_is_one() -> None:
    choice = GRAP_AFFINITY.choose("auto", torch.device("cpu"), torch.float32)
    assert choice.name == ("sliced" if WITHOUT else "kernels")
    assert choice.reason == (f"kernels: {WITHOUT}" if WITHOUT else "preferred")


def test_auto_on_a_gpu_takes_nothing_that_waits_for_it() -> None:
    device = torch.device("cuda")
    choice = GRAP_AFFINITY.choose("auto", device, torch.bfloat16)
    without = unavailable(device, torch.bfloat16)
    assert choice.name == ("reference" if without else "kernels")
    assert not without or "wait" in choice.reason
