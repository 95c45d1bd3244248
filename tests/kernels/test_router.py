"""grap_fwd, grap_bwd, router_fwd, router_bwd: against the formulas in float64, choices against sorting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.ops.slices import slice_owners, unit_values
from megamoe.testing import assert_equal_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
SIZES = [  # tokens, width, experts, choices
    (0, 64, 8, 2),
    (1, 64, 1, 1),
    (33, 64, 64, 4),
    (1000, 72, 8, 2),
    (33, 4096, 64, 8),
    (5, 4104, 256, 2),
    (7, 37, 5, 3),
    (3, 3, 8, 8),
    (300, 96, 24, 0),
]
ALL_SIZES = pytest.mark.parametrize("size", SIZES, ids=str)
CENTRED = pytest.mark.parametrize("centred", [True, False], ids=["centred", "as is"])
NORMALIZE = pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "product"])


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Torch fills new memory with NaN, or the largest integer, so an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Case:
    """Rows with a shared direction, and what the ops of the router take beside them."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, centred: bool = True) -> None:
        tokens, width, self.experts, self.choices = size
        seed = torch.seed() % 2**31
        print("seed", seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self.numbers(tokens, width, shift=0.5).to(device, dtype)
        self.unit = unit_values(self.numbers(width), self.experts)[0].to(device, wide(dtype))
        self.mean = torch.full((width,), 0.5 if centred else 0.0).to(self.unit)
        self.vectors = self.numbers(self.experts, width).to(self.unit)
        self.grad = self.numbers(tokens, self.experts).to(self.unit)

    def numbers(self, *shape: int, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) + shift

    def grap(self, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x if x is None else x
        return torch.ops.megamoe.grap_fwd(x, self.unit, self.mean, self.experts, self.choices)

    def grap_backward(self, affinity: Tensor, inverse: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.x if x is None else x
        return torch.ops.megamoe.grap_bwd(self.grad, x, self.unit, self.mean, affinity, inverse)

    def slice_vectors(self) -> Tensor:
        """[E, D] in float64: the unit vectors with their zeros."""
        owner_D = slice_owners(len(self.unit), self.experts, self.unit.device)
        vectors_ED = torch.zeros(self.experts, len(self.unit), dtype=torch.float64, device=self.unit.device)
        return vectors_ED.scatter_(0, owner_D[None], self.unit.double()[None])


def exact_scores(x: Tensor, vectors: Tensor, mean: Tensor | None, normalize: bool) -> Tensor:
    """In float64, by the formula; rows equal to the mean give 0."""
    centred = x.double() if mean is None else x.double() - mean.double()
    scores = centred @ vectors.double().t()
    if not normalize:
        return scores
    length = (centred.square().sum(-1, keepdim=True) + (centred == 0).all(-1, keepdim=True)).sqrt()
    return scores / length


def exact_gradients(
    x: Tensor, vectors: Tensor, mean: Tensor | None, normalize: bool, grad: Tensor
) -> tuple[Tensor, Tensor]:
    x, vectors = x.double().requires_grad_(), vectors.double().requires_grad_()
    d_x, d_vectors = torch.autograd.grad(exact_scores(x, vectors, mean, normalize), (x, vectors), grad.double())
    return d_x, d_vectors


def error(got: Tensor, exact: Tensor, typical: float = 1e-300) -> float:
    """Relative to the exact result, or to its typical size: a single product may come out as nearly nothing."""
    assert got.shape == exact.shape
    return float((got.double() - exact).norm() / exact.norm().clamp(min=typical)) if exact.numel() else 0.0


def score_error(got: Tensor, x: Tensor, vectors: Tensor, mean: Tensor | None, normalize: bool) -> float:
    rows = x.double() if mean is None else x.double() - mean.double()
    length = len(x) ** 0.5 if normalize else float(rows.norm())
    typical = length * float(vectors.double().norm()) / x.shape[1] ** 0.5
    return error(got, exact_scores(x, vectors, mean, normalize), typical)


def allowed(dtype: torch.dtype) -> float:
    """Of results in the rows' dtype: the rounding of one number."""
    return {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * 1.01


def largest(scores: Tensor, choices: int) -> Tensor:
    """The specification of the choice: of equal scores the lower expert first, int32 [T, K]."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :choices].int()


def same_choice(experts: Tensor, exact: Tensor) -> bool:
    """Whether each token's set is that of its exact scores. Not asked, for at most one token in a thousand, where fp32
    cannot tell the last one that is in from the first one that is out."""
    choices = experts.shape[1]
    last, first_out = exact.topk(choices + 1).values[:, -2:].unbind(1)
    clear = last - first_out > 2e-7
    wanted = largest(exact, choices)
    assert clear.double().mean() > 0.999
    return torch.equal(experts[clear].sort().values, wanted[clear].sort().values)


def wider_apart(rows: Tensor, columns: int = 3) -> Tensor:
    """The same rows inside wider ones of NaN: not at multiples of 16 bytes."""
    inside = rows.new_full((rows.shape[0], rows.shape[1] + columns), torch.nan)
    inside[:, 1 : 1 + rows.shape[1]] = rows
    return inside[:, 1 : 1 + rows.shape[1]]


@DTYPES
@ALL_SIZES
@CENTRED
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_grap_is_the_cosine_with_the_slices(
    backend: torch.device, dtype: torch.dtype, size: tuple[int, ...], centred: bool, misaligned: bool
) -> None:
    case = Case(size, dtype, backend, centred)
    x = wider_apart(case.x) if misaligned else case.x
    affinity, inverse, experts = case.grap(x)
    vectors_ED = case.slice_vectors()
    assert score_error(affinity, case.x, vectors_ED, case.mean, True) < 1e-6
    assert error(inverse, (case.x.double() - case.mean.double()).norm(dim=-1).reciprocal()) < 1e-6
    assert torch.equal(experts, largest(affinity, case.choices))
    d_x, d_unit = case.grap_backward(affinity, inverse, x)
    exact_d_x, exact_d_vectors = exact_gradients(case.x, vectors_ED, case.mean, True, case.grad)
    owner_D = slice_owners(len(case.unit), case.experts, backend)
    assert error(d_x, exact_d_x) < allowed(dtype)
    assert error(d_unit, exact_d_vectors.gather(0, owner_D[None])[0]) < 1e-6


@DTYPES
@ALL_SIZES
@CENTRED
@NORMALIZE
def test_scores_are_products_with_the_vectors(
    backend: torch.device, dtype: torch.dtype, size: tuple[int, ...], centred: bool, normalize: bool
) -> None:
    case = Case(size, dtype, backend)
    mean = case.mean if centred else None
    scores, inverse, experts = torch.ops.megamoe.router_fwd(case.x, case.vectors, mean, normalize, case.choices)
    assert score_error(scores, case.x, case.vectors, mean, normalize) < 1e-6
    assert inverse.shape == ((len(case.x),) if normalize else (0,))
    assert torch.equal(experts, largest(scores, case.choices))
    gradients = torch.ops.megamoe.router_bwd(case.grad, case.x, case.vectors, mean, normalize, scores, inverse)
    exact = exact_gradients(case.x, case.vectors, mean, normalize, case.grad)
    assert error(gradients[0], exact[0]) < allowed(dtype)
    assert error(gradients[1], exact[1]) < 1e-6


def test_misaligned_rows_have_right_scores(backend: torch.device) -> None:
    case = Case((70, 40, 9, 2), torch.bfloat16, backend)
    scores, _, _ = torch.ops.megamoe.router_fwd(wider_apart(case.x), case.vectors, case.mean, True, 2)
    assert score_error(scores, case.x, case.vectors, case.mean, True) < 1e-6


def test_scores_of_bf16_rows_choose_as_float64_does(backend: torch.device) -> None:
    case = Case((4096, 512, 64, 2), torch.bfloat16, backend)
    vectors_ED = case.vectors / case.vectors.norm(dim=1, keepdim=True)
    scores, _, experts = torch.ops.megamoe.router_fwd(case.x, vectors_ED, None, True, 2)
    exact = exact_scores(case.x, vectors_ED, None, True)
    assert error(scores, exact) < 1e-6
    assert same_choice(experts, exact)
    _, _, experts = case.grap()
    assert same_choice(experts, exact_scores(case.x, case.slice_vectors(), case.mean, True))


def test_of_equal_scores_the_lower_expert_is_first(backend: torch.device) -> None:
    signs = torch.tensor([[1.0, -1, 1, 0, -0.0, 1, -1, 0], [0, -0.0, 0, -0.0, 0, 0, -0.0, 0]], device=backend)
    one, zero = torch.ones(8, device=backend), torch.zeros(8, device=backend)
    _, _, experts = torch.ops.megamoe.grap_fwd(signs, one, zero, 8, 8)
    assert experts.tolist() == [[0, 2, 5, 3, 4, 7, 1, 6], [0, 1, 2, 3, 4, 5, 6, 7]]
    _, _, experts = torch.ops.megamoe.router_fwd(signs, torch.eye(8, device=backend), None, False, 8)
    assert experts.tolist() == [[0, 2, 5, 3, 4, 7, 1, 6], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_rows_with_nan_and_infinity_choose_different_experts_that_exist(backend: torch.device) -> None:
    case = Case((6, 40, 8, 3), torch.float32, backend)
    case.x[1, 7], case.x[2], case.x[4, 0] = torch.nan, torch.nan, torch.inf
    affinity, _, experts = case.grap()
    assert affinity[[1, 2, 4]].isnan().any(1).all()
    assert affinity[[0, 3, 5]].isfinite().all()
    assert [len({int(e) for e in row if 0 <= e < 8}) for row in experts] == [3] * 6
    assert torch.equal(experts[1], torch.tensor([0, 1, 2], dtype=torch.int32, device=backend))


@pytest.mark.parametrize("op", ["grap", "router"])
def test_rows_at_the_mean_are_zero_with_finite_gradients(backend: torch.device, op: str) -> None:
    case = Case((9, 24, 4, 2), torch.float32, backend)
    case.x[3] = case.mean
    if op == "grap":
        scores, inverse, _ = case.grap()
        d_x, d_vectors = case.grap_backward(scores, inverse)
    else:
        inputs = (case.x, case.vectors, case.mean, True)
        scores, inverse, _ = torch.ops.megamoe.router_fwd(*inputs, 2)
        d_x, d_vectors = torch.ops.megamoe.router_bwd(case.grad, *inputs, scores, inverse)
    assert not scores[3].any()
    assert inverse[3] == 0
    assert not d_x[3].any()
    assert d_x.isfinite().all()
    assert d_vectors.isfinite().all()


def test_rows_close_to_a_long_mean_keep_their_digits(backend: torch.device) -> None:
    case = Case((50, 64, 8, 2), torch.float32, backend)
    case.mean += 1024
    near = case.mean + (case.x - 0.5).mul(8).round().div(64)
    affinity, _, _ = case.grap(near)
    assert score_error(affinity, near, case.slice_vectors(), case.mean, True) < 1e-6


def all_results(case: Case) -> list[Tensor]:
    grap = case.grap()
    router = torch.ops.megamoe.router_fwd(case.x, case.vectors, case.mean, True, case.choices)
    inputs = (case.grad, case.x, case.vectors, case.mean, True)
    return [*grap, *case.grap_backward(*grap[:2]), *router, *torch.ops.megamoe.router_bwd(*inputs, *router[:2])]


def test_results_repeat_bit_by_bit_with_any_number_of_threads(backend: torch.device) -> None:
    case = Case((1000, 136, 12, 2), torch.bfloat16, backend)
    threads = torch.get_num_threads()
    try:
        runs = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            runs.append(all_results(case))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for value, expected in zip(run, runs[0], strict=True):
            assert_equal_bits(value, expected)


def grap_of(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, unit: torch.ops.megamoe.grap_fwd(x, unit, case.mean, case.experts, 2)[0]


def router_of(case: Case, normalize: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, vectors: torch.ops.megamoe.router_fwd(x, vectors, case.mean, normalize, 2)[0]


@pytest.mark.usefixtures("kernels")
def test_backward_passes_are_the_derivatives_of_the_forward_passes() -> None:
    case = Case((5, 26, 4, 2), torch.float64, torch.device("cpu"))
    x, unit, vectors = (tensor.requires_grad_() for tensor in (case.x, case.unit, case.vectors))
    assert torch.autograd.gradcheck(grap_of(case), (x, unit))
    assert torch.autograd.gradcheck(router_of(case), (x, vectors))
    assert torch.autograd.gradcheck(router_of(case, normalize=False), (x, vectors))


@pytest.mark.parametrize("op", ["grap", "router"])
def test_gradients_that_are_views_of_one_number_are_taken(backend: torch.device, op: str) -> None:
    case = Case((9, 24, 4, 2), torch.float32, backend)
    function, weights = (grap_of(case), case.unit) if op == "grap" else (router_of(case), case.vectors)
    x, weights = case.x.requires_grad_(), weights.requires_grad_()
    summed = torch.autograd.grad(function(x, weights).sum(), (x, weights))
    scores = function(x, weights)
    for value, expected in zip(summed, torch.autograd.grad(scores, (x, weights), torch.ones_like(scores)), strict=True):
        assert_equal_bits(value, expected)


def test_torch_accepts_the_ops(backend: torch.device) -> None:
    case = Case((9, 24, 4, 2), torch.float32, backend)
    ops = torch.ops.megamoe
    affinity, inverse, _ = case.grap()
    saved = (case.grad, case.x, case.unit, case.mean, affinity, inverse)
    x, unit, vectors = (tensor.clone().requires_grad_() for tensor in (case.x, case.unit, case.vectors))
    torch.library.opcheck(ops.grap_fwd.default, (x, unit, case.mean, 4, 2))
    torch.library.opcheck(ops.grap_bwd.default, saved)
    for mean, normalize in ((case.mean, True), (None, False)):
        inputs = (vectors.detach(), mean, normalize)
        scores, inverse, _ = ops.router_fwd(case.x, *inputs, 2)
        torch.library.opcheck(ops.router_fwd.default, (x, vectors, mean, normalize, 2))
        torch.library.opcheck(ops.router_bwd.default, (case.grad, case.x, *inputs, scores, inverse))


def test_compiled_models_have_the_same_results(backend: torch.device) -> None:
    case = Case((9, 24, 4, 2), torch.float32, backend)

    def loss(x: Tensor, unit: Tensor, vectors: Tensor) -> Tensor:
        return grap_of(case)(x, unit).square().sum() + router_of(case)(x, vectors).sin().sum()

    inputs = [tensor.requires_grad_() for tensor in (case.x, case.unit, case.vectors)]
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value, expected in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        assert_equal_bits(value, expected)


def test_the_mean_has_no_gradient_and_says_so(backend: torch.device) -> None:
    case = Case((9, 24, 4, 2), torch.float32, backend)
    case.mean.requires_grad_()
    with pytest.raises(RuntimeError, match="argument mean has no gradient"):
        torch.ops.megamoe.grap_fwd(case.x.requires_grad_(), case.unit, case.mean, 4, 2)
    with pytest.raises(RuntimeError, match="argument mean has no gradient"):
        torch.ops.megamoe.router_fwd(case.x, case.vectors, case.mean, True, 2)


BAD_GRAP: list[tuple[dict[int, Any], str]] = [
    ({0: torch.zeros(9, 24, dtype=torch.int32)}, "argument x"),
    ({0: torch.zeros(9)}, "argument x"),
    ({0: torch.zeros(24, 9).t()}, "call .contiguous()"),
    ({1: torch.zeros(23)}, "argument unit"),
    ({1: torch.zeros(24, dtype=torch.float64)}, "got: float64"),
    ({2: torch.zeros(48)[::2]}, "argument mean"),
    ({3: 0}, "argument num_experts"),
    ({4: 5}, "argument top_k"),
    ({4: -1}, "argument top_k"),
]


@pytest.mark.parametrize("change, words", BAD_GRAP, ids=[str(i) for i in range(len(BAD_GRAP))])
def test_what_cannot_be_used_is_named(backend: torch.device, change: dict[int, Any], words: str) -> None:
    good = [torch.zeros(9, 24), torch.zeros(24), torch.zeros(24), 4, 2]
    bad = [change.get(i, value) for i, value in enumerate(good)]
    on_device = [value.to(backend) if isinstance(value, Tensor) else value for value in bad]
    with pytest.raises(RuntimeError, match="megamoe::grap_fwd") as caught:
        torch.ops.megamoe.grap_fwd(*on_device)
    assert words in str(caught.value)
    assert "expected" in str(caught.value)


def test_shapes_that_do_not_fit_together_are_named(backend: torch.device) -> None:
    x, vectors, scores = (torch.zeros(*shape, device=backend) for shape in ((9, 24), (4, 24), (9, 4)))
    inverse = torch.zeros(9, device=backend)
    ops = torch.ops.megamoe
    with pytest.raises(RuntimeError, match="router_fwd: argument vectors"):
        ops.router_fwd(x, vectors[:, :8].contiguous(), None, True, 2)
    with pytest.raises(RuntimeError, match="router_bwd: argument inverse"):
        ops.router_bwd(scores, x, vectors, None, False, scores, inverse)
    with pytest.raises(RuntimeError, match="router_bwd: argument grad"):
        ops.router_bwd(scores[:8], x, vectors, None, True, scores, inverse)
    with pytest.raises(RuntimeError, match="grap_bwd: argument affinity"):
        ops.grap_bwd(scores, x, inverse.new_zeros(24), inverse.new_zeros(24), scores[:, :3], inverse)
