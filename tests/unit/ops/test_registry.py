"""Which implementation is taken, what the log says about it, and what a refusal says."""

import pytest
import torch

from megamoe.common.errors import KernelUnavailable
from megamoe.ops.expert_ffn import EXPERT_FFN
from megamoe.ops.registry import Implementation, Op

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def add_one(x: int) -> int:
    return x + 1


def plus_one(x: int) -> int:
    return 1 + x


def needs_cuda(device: torch.device, dtype: torch.dtype) -> str:
    return "" if device.type == "cuda" else "needs a GPU"


def slow_in_fp32(device: torch.device, dtype: torch.dtype) -> str:
    return "slow in fp32" if dtype == torch.float32 else ""


OP = Op(
    "increment",
    Implementation("kernel", add_one, unavailable=needs_cuda),
    Implementation("half", add_one, not_preferred=slow_in_fp32),
    Implementation("plain", plus_one),
)


@pytest.mark.parametrize(
    "device, dtype, name, reason",
    [
        (CUDA, torch.float32, "kernel", "preferred"),
        (CPU, torch.bfloat16, "half", "kernel: needs a GPU"),
        (CPU, torch.float32, "plain", "kernel: needs a GPU; half: slow in fp32"),
    ],
)
def test_auto_takes_the_first_that_nothing_speaks_against(
    device: torch.device, dtype: torch.dtype, name: str, reason: str
) -> None:
    choice = OP.choose("auto", device, dtype)
    assert (choice.name, choice.reason) == (name, reason)
    assert str(choice) == f"op increment: {name} ({reason})"


def test_a_named_one_is_taken_even_if_auto_would_not() -> None:
    choice = OP.choose("half", CPU, torch.float32)
    assert (choice.function, choice.reason) == (add_one, "asked for")
    assert OP.choose("plain", CUDA, torch.bfloat16).function is plus_one


def test_a_named_one_that_cannot_run_is_refused_with_the_reason() -> None:
    with pytest.raises(KernelUnavailable) as refusal:
        OP.choose("kernel", CPU, torch.bfloat16)
    message = str(refusal.value)
    for part in (
        "increment",
        "ops.increment=kernel",
        "cpu",
        "bfloat16",
        "kernel: needs a GPU",
        "auto, kernel, half",
    ):
        assert part in message
    assert "ops.increment: auto" in refusal.value.todo


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KernelUnavailable, match="one of: auto, kernel, half, plain"):
        OP.choose("kernle", CPU, torch.float32)


def test_the_experts_always_have_an_implementation() -> None:
    names = [implementation.name for implementation in EXPERT_FFN.implementations]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert EXPERT_FFN.choose("auto", CPU, dtype).name in names
        assert EXPERT_FFN.choose("reference", CPU, dtype).name == "reference"
    with pytest.raises(KernelUnavailable, match=r"grouped_mm.*float64"):
        EXPERT_FFN.choose("grouped_mm", CPU, torch.float64)
