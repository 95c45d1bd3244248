"""Which implementation of an op runs here, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from megamoe.common.errors import KernelUnavailable

Fn = TypeVar("Fn", bound=Callable[..., object])


@dataclass(frozen=True)
class Implementation(Generic[Fn]):
    """One way to compute an op.

    `unavailable(device, dtype)` returns the reason why it cannot run there, `not_preferred` the reason why `auto`
    leaves it although it could; an empty string means that nothing speaks against it.
    """

    name: str
    function: Fn
    unavailable: Callable[[torch.device, torch.dtype], str] = lambda device, dtype: ""
    not_preferred: Callable[[torch.device, torch.dtype], str] = lambda device, dtype: ""


@dataclass(frozen=True)
class Choice(Generic[Fn]):
    """What was chosen for an op, for one line in the log."""

    op: str
    name: str
    function: Fn
    reason: str

    def __str__(self) -> str:
        return f"op {self.op}: {self.name} ({self.reason})"


class Op(Generic[Fn]):
    """The implementations of one op, in order of preference for `auto`.

    Args:
        key: what chooses in section `ops` of the configuration, where that is not called as the op.
    """

    def __init__(self, name: str, *implementations: Implementation[Fn], key: str = "") -> None:
        self.name, self.key = name, key or name
        self.implementations = implementations

    def choose(self, wanted: str, device: torch.device, dtype: torch.dtype) -> Choice[Fn]:
        """The implementation called `wanted`, or with `auto` the first available one.

        Raises:
            KernelUnavailable: a named implementation cannot run on this device and dtype, or does not exist.
        """
        passed_over: list[str] = []
        for implementation in self.implementations:
            if wanted not in ("auto", implementation.name):
                continue
            reason = implementation.unavailable(device, dtype)
            if not reason and wanted == "auto":
                reason = implementation.not_preferred(device, dtype)
            if not reason:
                why = "asked for" if wanted != "auto" else "; ".join(passed_over) or "preferred"
                return Choice(self.name, implementation.name, implementation.function, why)
            passed_over.append(f"{implementation.name}: {reason}")
        raise KernelUnavailable(
            f"no implementation of op {self.name} can run",
            got=f"ops.{self.key}={wanted} on {device.type} in {dtype}; " + "; ".join(passed_over),
            expected="one of: auto, " + ", ".join(i.name for i in self.implementations),
            todo=f"set ops.{self.key}: auto",
        )
