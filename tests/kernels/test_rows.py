"""permute_rows, unpermute_rows and unpermute_bwd: against the plain implementation, bit by bit where rows only move."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megamoe.ops.movement import (
    permute_rows_reference,
    unpermute_backward_reference,
    unpermute_rows_reference,
)
from megamoe.testing import assert_equal_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
SIZES = [  # tokens, choices, holes, width
    (0, 2, 0, 64),
    (0, 2, 5, 64),
    (1, 1, 0, 64),
    (33, 2, 40, 64),
    (33, 8, 3, 4104),
    (1000, 4, 100, 72),
    (20, 2, 0, 4096),
    (33, 3, 1, 37),
    (5, 40, 2, 16),
    (3, 2, 1, 10001),
    (4, 2, 1, 0),
]
ALL_SIZES = pytest.mark.parametrize("size", SIZES, ids=str)
WEIGHTED = pytest.mark.parametrize("weighted", [True, False], ids=["weights", "plain"])


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Torch fills new memory with NaN, or the largest integer, so an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def plan(tokens: int, choices: int, holes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """place and source of a random plan: a fifth of the choices has no row, and there are holes between the rows."""
    generator = torch.Generator().manual_seed(tokens + choices + holes)
    taken = (torch.rand(tokens * choices, generator=generator) > 0.2).nonzero().flatten()
    rows = torch.randperm(len(taken) + holes, generator=generator)[: len(taken)]
    place = torch.full((tokens * choices,), -1, dtype=torch.int32)
    source = torch.full((len(taken) + holes,), -1, dtype=torch.int32)
    place[taken], source[rows] = rows.int(), taken.int()
    return place.view(tokens, choices).to(device), source.to(device)


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def wider_apart(rows: Tensor, columns: int = 3) -> Tensor:
    """The same rows inside wider ones of NaN: not at multiples of 16 bytes."""
    wide = rows.new_full((rows.shape[0], rows.shape[1] + columns), torch.nan)
    wide[:, 1 : 1 + rows.shape[1]] = rows
    return wide[:, 1 : 1 + rows.shape[1]]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-300)) if exact.numel() else 0.0


def allowed(dtype: torch.dtype, plain: Tensor, exact: Tensor) -> float:
    """fp32: 1e-6. Half precisions: twice the error of plain arithmetic in that dtype, and never 5e-3."""
    return 1e-6 if dtype == torch.float32 else min(5e-3, 2 * max(error(plain, exact), 2**-10))


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_rows_move_bit_by_bit(
    backend: torch.device, dtype: torch.dtype, size: tuple[int, ...], misaligned: bool
) -> None:
    tokens, choices, holes, width = size
    place, source = plan(tokens, choices, holes, backend)
    x = numbers(tokens, width, dtype=dtype, device=backend)
    expected = permute_rows_reference(x, source, place)
    y = torch.ops.megamoe.permute_rows(wider_apart(x) if misaligned else x, source, place)
    assert_equal_bits(y, expected)


@DTYPES
@ALL_SIZES
def test_values_travel_with_their_rows(backend: torch.device, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    tokens, choices, holes, width = size
    place, source = plan(tokens, choices, holes, backend)
    x = numbers(tokens, width, dtype=dtype, device=backend)
    values = numbers(tokens, choices, dtype=torch.float32, device=backend, seed=1)
    y = torch.ops.megamoe.permute_rows(x, source, place, values, -7.5)
    assert_equal_bits(y.view(torch.uint8), permute_rows_reference(x, source, place, values, -7.5).view(torch.uint8))
    arrived = y[:, width:].contiguous().view(torch.float32).flatten()
    assert (arrived[source < 0] == -7.5).all()
    assert_equal_bits(arrived[source >= 0], values.flatten()[source[source >= 0].long()])


@DTYPES
@ALL_SIZES
@WEIGHTED
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_sums_are_exact(
    backend: torch.device, dtype: torch.dtype, size: tuple[int, ...], weighted: bool, misaligned: bool
) -> None:
    tokens, choices, holes, width = size
    place, source = plan(tokens, choices, holes, backend)
    y = numbers(len(source), width, dtype=dtype, device=backend)
    y[source < 0] = torch.nan  # a hole is not read
    weights = numbers(tokens, choices, dtype=torch.float32, device=backend, seed=1) if weighted else None
    exact = unpermute_rows_reference(y.double(), place, source, None if weights is None else weights.double())
    plain = (y.new_ones(tokens, choices, 1) if weights is None else weights[:, :, None].to(dtype)) * torch.where(
        (place >= 0)[:, :, None], y[place.clamp(min=0).long()] if len(y) else y.new_zeros(tokens, choices, width), 0.0
    )
    out = torch.ops.megamoe.unpermute_rows(wider_apart(y) if misaligned else y, place, source, weights)
    assert out.dtype == dtype
    assert error(out, exact) <= allowed(dtype, plain.sum(1, dtype=dtype), exact)


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_gradients_of_the_weighted_sum(
    backend: torch.device, dtype: torch.dtype, size: tuple[int, ...], misaligned: bool
) -> None:
    tokens, choices, holes, width = size
    place, source = plan(tokens, choices, holes, backend)
    y = numbers(len(source), width, dtype=dtype, device=backend)
    d_out = numbers(tokens, width, dtype=dtype, device=backend, seed=1)
    weights = numbers(tokens, choices, dtype=torch.float32, device=backend, seed=2)
    exact_weights = unpermute_backward_reference(d_out.double(), y.double(), place, source, weights.double())[1]
    inputs = (wider_apart(d_out), wider_apart(y)) if misaligned else (d_out, y)
    d_y, d_weights = torch.ops.megamoe.unpermute_bwd(*inputs, place, source, weights)
    assert_equal_bits(d_y, unpermute_backward_reference(d_out, y, place, source, weights)[0])
    assert d_weights.dtype == torch.float32
    assert error(d_weights, exact_weights) <= 1e-6
    assert not d_weights[place < 0].any()


def test_choices_are_added_in_their_order(backend: torch.device) -> None:
    y = torch.tensor([[1e8], [3.0], [-1e8]], device=backend).repeat(1, 16)
    place = torch.tensor([[0, 1, 2], [0, 2, 1]], dtype=torch.int32, device=backend)
    source = torch.tensor([0, 1, 2], dtype=torch.int32, device=backend)
    assert torch.ops.megamoe.unpermute_rows(y, place, source)[:, 0].tolist() == [0.0, 3.0]


def all_three(threads: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    place, source = plan(1000, 4, 100, device)
    x = numbers(1000, 203, dtype=dtype, device=device)
    weights = numbers(1000, 4, dtype=torch.float32, device=device, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = torch.ops.megamoe.permute_rows(x, source, place)
        out = torch.ops.megamoe.unpermute_rows(y, place, source, weights)
        return [y, out, *torch.ops.megamoe.unpermute_bwd(out, y, place, source, weights)]
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_results_repeat_bit_by_bit_with_any_number_of_threads(backend: torch.device, dtype: torch.dtype) -> None:
    first = all_three(1, backend, dtype)
    for threads in (1, 2, 3):
        for one, again in zip(first, all_three(threads, backend, dtype), strict=True):
            assert_equal_bits(again, one)


def small(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, y, place, source, weights on the CPU, all of which want gradients."""
    place, source = plan(5, 3, 2, torch.device("cpu"))
    x, y = (numbers(n, 6, dtype=dtype, device=torch.device("cpu")) for n in (5, len(source)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = numbers(5, 3, dtype=wide, device=torch.device("cpu"), seed=3)
    return x.requires_grad_(), y.requires_grad_(), place, source, weights.requires_grad_()


@pytest.mark.usefixtures("kernels")
def test_gradients_are_derivatives() -> None:
    x, y, place, source, weights = small()
    ops = torch.ops.megamoe
    assert torch.autograd.gradcheck(lambda x: ops.permute_rows(x, source, place), x)
    assert torch.autograd.gradcheck(lambda y: ops.unpermute_rows(y, place, source), y)
    assert torch.autograd.gradcheck(lambda y, w: ops.unpermute_rows(y, place, source, w), (y, weights))
    assert torch.autograd.gradgradcheck(lambda x: ops.permute_rows(x, source, place), x)


@pytest.mark.usefixtures("kernels")
def test_torch_library_finds_nothing_wrong() -> None:
    x, y, place, source, weights = small(torch.float32)
    ops = torch.ops.megamoe
    for op, arguments in (
        (ops.permute_rows, (x, source, place)),
        (ops.permute_rows, (x.detach(), source, place, weights.detach(), 0.5)),
        (ops.unpermute_rows, (y, place, source)),
        (ops.unpermute_rows, (y, place, source, weights)),
        (ops.unpermute_bwd, (x.detach(), y.detach(), place, source, weights.detach())),
    ):
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("kernels")
def test_it_compiles_as_one_graph() -> None:
    x, _, place, source, weights = small(torch.float32)

    def there_and_back(x: Tensor, weights: Tensor) -> Tensor:
        y = torch.ops.megamoe.permute_rows(x, source, place)
        return torch.ops.megamoe.unpermute_rows(y.tanh(), place, source, weights)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    probe = torch.ones_like(x)
    assert_equal_bits(compiled(x, weights).detach(), there_and_back(x, weights).detach())
    expected = torch.autograd.grad(there_and_back(x, weights), (x, weights), probe)
    for got, right in zip(torch.autograd.grad(compiled(x, weights), (x, weights), probe), expected, strict=True):
        assert_equal_bits(got, right)


@pytest.mark.usefixtures("kernels")
def test_a_gradient_that_there_is_not_is_an_error() -> None:
    x, y, place, source, weights = small()
    with pytest.raises(NotImplementedError, match="values travel"):
        torch.ops.megamoe.permute_rows(x, source, place, weights.detach())
    d_y, _ = torch.ops.megamoe.unpermute_bwd(x, y, place, source, weights)
    with pytest.raises(NotImplementedError, match="none of its own"):
        d_y.sum().backward()


BAD: dict[str, tuple[Callable[..., object], str]] = {
    "dtype of rows": (lambda o, x, y, p, s, w: o.permute_rows(x.int(), s, p), "argument x.*got: int32"),
    "dtype of indices": (lambda o, x, y, p, s, w: o.permute_rows(x, s.long(), p), "argument source.*got: int64"),
    "one dimension": (lambda o, x, y, p, s, w: o.permute_rows(x[0], s, p), "argument x.*shape"),
    "too few tokens": (lambda o, x, y, p, s, w: o.permute_rows(x[:4], s, p), r"argument x.*\[5, any\]"),
    "columns": (lambda o, x, y, p, s, w: o.permute_rows(x.t().contiguous().t(), s, p), "call .contiguous"),
    "no choices": (lambda o, x, y, p, s, w: o.permute_rows(x, s, p[:, :0].contiguous()), "at least one"),
    "values": (lambda o, x, y, p, s, w: o.permute_rows(x, s, p, w[:4]), r"argument values.*\[5, 3\]"),
    "too few rows": (lambda o, x, y, p, s, w: o.unpermute_rows(y[:-1], p, s), "argument y"),
    "weights": (lambda o, x, y, p, s, w: o.unpermute_rows(y, p, s, w.half()), "argument weights.*got: float16"),
    "two dtypes": (lambda o, x, y, p, s, w: o.unpermute_bwd(x.half(), y, p, s, w), "argument y.*float32"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(backend: torch.device, bad: tuple[Callable[..., object], str]) -> None:
    arguments = [tensor.detach().to(backend) for tensor in small(torch.float32)]
    with pytest.raises(RuntimeError, match=f"(?s)megamoe::.*{bad[1]}"):
        bad[0](torch.ops.megamoe, *arguments)


@pytest.mark.usefixtures("kernels")
def test_an_index_beyond_the_end_is_refused_on_the_cpu() -> None:
    x, y, place, source, weights = (tensor.detach() for tensor in small())
    far, beyond = place.clone(), source.clone()
    far[0, 0], beyond[0] = len(source), place.numel()
    with pytest.raises(RuntimeError, match="the number 15"):
        torch.ops.megamoe.permute_rows(x, beyond, place)
    with pytest.raises(RuntimeError, match="argument place"):
        torch.ops.megamoe.unpermute_rows(y, far, source)
    with pytest.raises(RuntimeError, match="argument source"):
        torch.ops.megamoe.unpermute_bwd(x, y, place, beyond, weights)
