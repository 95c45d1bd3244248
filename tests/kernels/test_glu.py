"""glu_fwd and glu_bwd against the plain implementation in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megamoe.ops.glu import KINDS, backward_reference, reference
from megamoe.testing import assert_equal_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
SIZES = {  # rows, width, counts
    "no rows": (0, 64, [0, 0]),
    "no experts": (3, 64, []),
    "one": (1, 64, None),
    "tail": (33, 72, [5, 0, 20]),
    "odd": (33, 37, None),
    "nothing counts": (9, 40, [0, 0, 0]),
    "many experts": (300, 48, [1] * 256),
    "wide": (5, 4104, [3]),
    "no width": (5, 0, [3]),
}
ALL_SIZES = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Torch fills new memory with NaN, so an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case(rows: int, width: int, counts: list[int] | None, dtype: torch.dtype, device: torch.device) -> Inputs:
    """d_act, h1, h3, weights, counts; NaN in the rows that do not count."""
    generator = torch.Generator().manual_seed(rows + width)
    d_act, h1, h3 = (torch.randn(rows, width, generator=generator).mul(3).to(dtype) for _ in range(3))
    weights = torch.randn(rows, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if counts is not None:
        for tensor in (d_act, h1, h3, weights):
            tensor[sum(counts) :] = torch.nan
    tensors = [tensor.to(device) for tensor in (d_act, h1, h3, weights)]
    return *tensors, None if counts is None else torch.tensor(counts, dtype=torch.int64, device=device)


def doubled(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in tensors)


def wider_apart(rows: Tensor) -> Tensor:
    """The same rows inside wider ones of NaN: not at multiples of 16 bytes."""
    wide = rows.new_full((rows.shape[0], rows.shape[1] + 3), torch.nan)
    wide[:, 1:-2] = rows
    return wide[:, 1:-2]


def assert_exact(got: Tensor, exact: Tensor, dtype: torch.dtype, name: str) -> None:
    """fp32 to 1e-6; of half precisions the one rounding at the end, by its largest possible error."""
    assert got.shape == exact.shape
    error = float((got.double() - exact).norm() / exact.norm().clamp(min=1e-300)) if exact.numel() else 0.0
    limit = {torch.float32: 1e-6, torch.bfloat16: 2**-8.4, torch.float16: 2**-11.4}[dtype]
    assert error <= limit, f"{name}: {error:.2e}"


@DTYPES
@ALL_KINDS
@ALL_SIZES
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "plain"])
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_values_and_gradients_are_exact(
    backend: torch.device,
    dtype: torch.dtype,
    kind: str,
    size: tuple[int, int, list[int] | None],
    weighted: bool,
    misaligned: bool,
) -> None:
    *rowwise, weights, counts = case(*size, dtype, backend)
    weights = weights if weighted else None
    inputs = [wider_apart(t) if misaligned else t for t in rowwise]
    act = torch.ops.megamoe.glu_fwd(*inputs[1:], weights, counts, kind)
    gradients = torch.ops.megamoe.glu_bwd(*inputs, weights, counts, kind)
    exact = backward_reference(*doubled(*rowwise, weights, counts), kind)
    assert act.dtype == dtype
    assert_exact(act, exact[3], dtype, "act")
    for name, got, right in zip(("d_h1", "d_h3"), gradients, exact, strict=False):
        assert got.dtype == dtype
        assert_exact(got, right, dtype, name)
    assert gradients[2].dtype == torch.float32
    assert_exact(gradients[2], exact[2], torch.float32, "d_weights")
    assert_equal_bits(gradients[3], act, name="act again")


@ALL_KINDS
def test_far_from_zero_nothing_overflows(backend: torch.device, kind: str) -> None:
    h1 = torch.tensor([[-1e30, -1e4, -90.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 90.0, 1e4, 1e18]], device=backend)
    one = torch.ones_like(h1)
    act = torch.ops.megamoe.glu_fwd(h1, one, None, None, kind)
    d_h1, *_ = torch.ops.megamoe.glu_bwd(one, h1, one, None, None, kind)
    exact_h1, _, _, exact = backward_reference(*doubled(one, h1, one), None, None, kind)
    assert torch.allclose(act.double(), exact, rtol=3e-6, atol=1e-35)
    assert torch.allclose(d_h1.double(), exact_h1, rtol=3e-6, atol=1e-35)
    assert torch.ops.megamoe.glu_fwd(one * torch.inf, one, None, None, kind).isposinf().all()
    assert torch.ops.megamoe.glu_fwd(one * torch.nan, one, None, None, kind).isnan().all()


@pytest.mark.usefixtures("kernels")
@ALL_KINDS
def test_every_float_between_is_right_to_three_units_in_the_last_place(kind: str) -> None:
    h1 = torch.linspace(-30, 30, 1_000_003)[None]
    one = torch.ones_like(h1)
    got = torch.ops.megamoe.glu_fwd(h1, one, None, None, kind).double()
    exact = reference(h1.double(), one.double(), None, None, kind)
    # exp(-x^2 / 2) of a rounded square: its own relative error grows with it, where the value itself vanishes.
    inherited = (0.5 * h1.double().square() * 2**-24 * (h1 < 0)) * (kind == "geglu")
    assert ((got - exact).abs() <= (3 * 2**-23 + inherited) * exact.abs() + 1e-35).all()


@pytest.mark.usefixtures("kernels")
def test_an_element_does_not_depend_on_where_it_stands() -> None:
    h1, h3 = torch.randn(2, 1, 103, generator=torch.Generator().manual_seed(0)).unbind(0)
    whole = torch.ops.megamoe.glu_fwd(h1, h3, None, None, "swiglu")
    for begin, end in ((0, 1), (3, 8), (5, 102), (96, 103)):
        part = torch.ops.megamoe.glu_fwd(h1[:, begin:end], h3[:, begin:end], None, None, "swiglu")
        assert_equal_bits(part, whole[:, begin:end].contiguous())


@DTYPES
@ALL_KINDS
def test_results_repeat_bit_by_bit_with_any_number_of_threads(
    backend: torch.device, dtype: torch.dtype, kind: str
) -> None:
    d_act, h1, h3, weights, counts = case(500, 203, [300, 150], dtype, backend)
    before, first = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results = torch.ops.megamoe.glu_bwd(d_act, h1, h3, weights, counts, kind)
            first = first or results
            for one, again in zip(first, results, strict=True):
                assert_equal_bits(again, one)
    finally:
        torch.set_num_threads(before)


def small(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, h1, h3, weights, _ = case(5, 7, None, dtype, torch.device("cpu"))
    return h1.requires_grad_(), h3.requires_grad_(), weights.requires_grad_(), torch.tensor([1, 0, 3])


@pytest.mark.usefixtures("kernels")
@ALL_KINDS
def test_gradients_are_derivatives(kind: str) -> None:
    h1, h3, weights, counts = small(torch.float64)
    op = torch.ops.megamoe.glu_fwd
    assert torch.autograd.gradcheck(lambda *t: op(*t, counts, kind), (h1, h3, weights))
    assert torch.autograd.gradcheck(lambda *t: op(*t, None, None, kind), (h1, h3))


@pytest.mark.usefixtures("kernels")
def test_torch_library_finds_nothing_wrong() -> None:
    h1, h3, weights, counts = small(torch.float32)
    plain = h1.detach()
    for op, arguments in (
        (torch.ops.megamoe.glu_fwd, (h1, h3, weights, counts, "swiglu")),
        (torch.ops.megamoe.glu_fwd, (h1, h3)),
        (torch.ops.megamoe.glu_bwd, (plain, plain, plain, weights.detach(), counts, "geglu")),
    ):
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("kernels")
def test_it_compiles_as_one_graph() -> None:
    h1, h3, weights, counts = small(torch.float32)

    def twice(h1: Tensor, h3: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.megamoe.glu_fwd(h1.tanh(), h3, weights, counts, "geglu").sin()

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    inputs = (h1, h3, weights)
    assert_equal_bits(compiled(*inputs).detach(), twice(*inputs).detach())
    expected = torch.autograd.grad(twice(*inputs).sum(), inputs)
    for got, right in zip(torch.autograd.grad(compiled(*inputs).sum(), inputs), expected, strict=True):
        assert_equal_bits(got, right)


@pytest.mark.usefixtures("kernels")
def test_a_gradient_of_the_gradient_is_an_error() -> None:
    h1, h3, weights, counts = small(torch.float64)
    d_h1, *_ = torch.ops.megamoe.glu_bwd(h1, h1, h3, weights, counts, "swiglu")
    with pytest.raises(NotImplementedError, match="none of its own"):
        d_h1.sum().backward()


BAD: dict[str, tuple[Callable[..., object], str]] = {
    "dtype": (lambda o, h1, h3, w, c: o.glu_fwd(h1.int(), h3), "argument h1.*got: int32"),
    "two dtypes": (lambda o, h1, h3, w, c: o.glu_fwd(h1, h3.half()), "argument h3.*got: float16"),
    "two shapes": (lambda o, h1, h3, w, c: o.glu_fwd(h1, h3[:, 1:]), r"argument h3.*\[5, 7\]"),
    "columns": (lambda o, h1, h3, w, c: o.glu_fwd(h1.t().contiguous().t(), h3), "argument h1.*call .contiguous"),
    "weights": (lambda o, h1, h3, w, c: o.glu_fwd(h1, h3, w[1:]), r"argument weights.*\[5\]"),
    "counts": (lambda o, h1, h3, w, c: o.glu_fwd(h1, h3, w, c.int()), "argument counts.*got: int32"),
    "kind": (lambda o, h1, h3, w, c: o.glu_fwd(h1, h3, w, c, "relu"), "argument kind.*got: relu"),
    "gradient": (lambda o, h1, h3, w, c: o.glu_bwd(h1[1:], h1, h3), "argument dact"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(backend: torch.device, bad: tuple[Callable[..., object], str]) -> None:
    arguments = [tensor.detach().to(backend) for tensor in small(torch.float32)]
    with pytest.raises(RuntimeError, match=f"(?s)megamoe::.*{bad[1]}"):
        bad[0](torch.ops.megamoe, *arguments)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("counts", [[6], [3, -1]], ids=["more than there are", "negative"])
def test_counts_that_cannot_be_are_refused_on_the_cpu(counts: list[int]) -> None:
    h1, h3, weights, _ = (tensor.detach() for tensor in small(torch.float32))
    with pytest.raises(RuntimeError, match="argument counts"):
        torch.ops.megamoe.glu_fwd(h1, h3, weights, torch.tensor(counts))
