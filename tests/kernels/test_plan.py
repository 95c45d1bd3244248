"""The compiled op `plan`: exactly what the reference gives, in every case, on every backend."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.ops.plan import Plan, reference
from megamoe.ops.plan import kernels as compiled

Keys = Callable[[tuple[int, int], torch.Generator], Tensor]
ODD = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan])


def _random(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _close(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Affinities of one order of magnitude, many of them equal."""
    return 0.25 + torch.randint(0, 100, shape, generator=generator) * 1e-6


def _odd(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return ODD[torch.randint(0, len(ODD), shape, generator=generator)]


def _equal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.full(shape, -0.5)


def _integers(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


KEYS: dict[str, Keys | None] = {
    "arrival": None,
    "random": _random,
    "close": _close,
    "odd": _odd,
    "equal": _equal,
    "integers": _integers,
}
SIZES = [(0, 2, 4), (1, 1, 1), (33, 3, 8), (1000, 2, 64), (1000, 8, 256), (257, 4, 1024), (9000, 1, 1), (40000, 2, 8)]


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Torch fills new memory with the largest integer, so an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def choices(size: tuple[int, int, int], dtype: torch.dtype = torch.int64) -> tuple[Tensor, torch.Generator]:
    """Every seventh choice or so is nobody's."""
    tokens, top_k, experts = size
    generator = torch.Generator().manual_seed(sum(size))
    chosen = torch.randint(0, experts, (tokens, top_k), generator=generator)
    nobody = torch.randint(0, 14, (tokens, top_k), generator=generator)
    return chosen.where(nobody > 1, torch.where(nobody == 0, -1, experts)).to(dtype), generator


def check(backend: torch.device, *given: Any) -> None:
    """`given`, on the CPU, as for the reference. Twice, for the same bits."""
    moved = [value.to(backend) if isinstance(value, Tensor) else value for value in given]
    for _ in range(2):
        for name, got, expected in zip(Plan._fields, compiled(*moved), reference(*given), strict=True):
            assert got.dtype == expected.dtype, name
            assert torch.equal(got.cpu(), expected), name


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_reference(backend: torch.device, size: tuple[int, int, int], keys: str) -> None:
    experts_TK, generator = choices(size, torch.int32 if keys == "odd" else torch.int64)
    make = KEYS[keys]
    keys_TK = None if make is None else make((size[0], size[1]), generator)
    fair = experts_TK.numel() // size[2] + 1
    capacity_E = torch.randint(-1, 2 * fair, (size[2],), generator=generator)
    for capacity in (None, capacity_E):
        for slots, max_rows in ((0, 0), (0, fair), (0, experts_TK.numel() + 7), (1, 0), (fair, 0)):
            check(backend, experts_TK, size[2], keys_TK, capacity, slots, max_rows)


@pytest.mark.parametrize("everyone", [-1, 0, 7, 8, 2**40])
def test_all_choose_the_same(backend: torch.device, everyone: int) -> None:
    experts_TK = torch.full((700, 2), everyone)
    keys_TK = torch.randn(700, 2, generator=torch.Generator().manual_seed(0))
    for capacity in (0, 1, 699, 1400, 2**50):
        check(backend, experts_TK, 8, keys_TK, torch.full((8,), capacity))
    check(backend, experts_TK, 8)


def test_keys_without_a_limit_change_nothing(backend: torch.device) -> None:
    experts_TK, generator = choices((100, 2, 8))
    with_keys = compiled(experts_TK.to(backend), 8, torch.randn(100, 2, generator=generator).to(backend))
    for got, expected in zip(with_keys, reference(experts_TK, 8), strict=True):
        assert torch.equal(got.cpu(), expected)


def test_choices_need_not_lie_side_by_side(backend: torch.device) -> None:
    wide, generator = choices((50, 6, 8))
    keys = torch.randn(6, 50, generator=generator)
    check(backend, wide[:, 1:3], 8, keys.t()[:, 1:3], torch.full((8,), 5))


def test_opcheck(backend: torch.device) -> None:
    experts_TK, generator = choices((20, 2, 4))
    keys_TK = torch.randn(20, 2, generator=generator).to(backend)
    capacity_E = torch.full((4,), 3, device=backend)
    for given in ((keys_TK, capacity_E), (None, None, 3), (keys_TK, None, 0, 11)):
        torch.library.opcheck(torch.ops.megamoe.plan.default, (experts_TK.to(backend), 4, *given))


def test_compiles_without_a_break(backend: torch.device) -> None:
    experts_TK, generator = choices((30, 2, 4))
    given = (experts_TK.to(backend), 4, torch.randn(30, 2, generator=generator).to(backend))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def rows(experts_TK: Tensor, keys_TK: Tensor) -> Tensor:
        plan = compiled(experts_TK, 4, keys_TK, None, 5, 0)
        return plan.source_R + plan.rows_per_expert_E.sum()

    plan = compiled(*given, None, 5, 0)
    assert torch.equal(rows(given[0], given[2]), plan.source_R + plan.rows_per_expert_E.sum())


INT64, FLOATS = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
BAD: list[tuple[tuple[Any, ...], str]] = [
    ((FLOATS, 4), "argument experts cannot be used.\n  got: float32\n  expected: int64, int32"),
    ((INT64[0], 4), r"argument experts .*shape \[2\].*shape \[any, any\]"),
    ((INT64.t(), 4), "argument experts .*strides .*contiguous"),
    ((INT64, 0), "argument num_experts .*got: 0"),
    ((INT64, 4, FLOATS.double()), "argument keys .*float64.*float32, int32"),
    ((INT64, 4, FLOATS[:2]), r"argument keys .*shape \[2, 2\].*shape \[3, 2\]"),
    ((INT64, 4, None, torch.zeros(3, dtype=torch.int64)), r"argument capacity .*shape \[3\].*shape \[4\]"),
    ((INT64, 4, None, torch.zeros(4, dtype=torch.int32)), "argument capacity .*int32.*int64"),
    ((INT64, 4, None, None, -1), "argument slots .*got: -1"),
    ((INT64, 4, None, None, 2**30), "argument slots .*2\\^31"),
    ((INT64, 4, None, None, 0, -1), "argument max_rows .*got: -1"),
    ((INT64, 4, None, None, 2, 5), "argument max_rows .*with slots"),
]


@pytest.mark.parametrize(
    "given, message", BAD, ids=[message.split(" ")[1] + f"-{i}" for i, (_, message) in enumerate(BAD)]
)
def test_bad_input_is_named(backend: torch.device, given: tuple[Any, ...], message: str) -> None:
    moved = [value.to(backend) if isinstance(value, Tensor) else value for value in given]
    with pytest.raises(RuntimeError, match=f"(?s)megamoe::plan: {message}"):
        torch.ops.megamoe.plan(*moved)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_more_experts_than_a_gpu_counts() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU that this torch can use")
    with pytest.raises(RuntimeError, match="at most 1024 on CUDA"):
        torch.ops.megamoe.plan(INT64.cuda(), 1025)


# As many cases as a build runs in some seconds; each has seed 50, which is large.
@pytest.mark.parametrize("suffix, first, cases", [("", 1, 200), (".asan", 41, 40), (".tsan", 46, 5)])
def test_kernels_for_gpus_are_right_in_the_emulator(
    tmp_path: Path, build_tool: ModuleType, cxx: str, suffix: str, first: int, cases: int
) -> None:
    target = "emu" + suffix.replace(".", "-")
    record = build_tool.build(tmp_path, only=("plan",), targets=(target,))
    assert not record["left_out"].get(target), record["left_out"]
    command = [tmp_path / f"emu_plan{suffix}", str(first), str(cases)]
    environment = os.environ | {"MM_EMU_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"plan: 0 of {cases} cases wrong\n"
