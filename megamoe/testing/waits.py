"""What a host waits for, seen on any device."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
)
"""Ops whose result, or the shape of it, the host has to know before it goes on."""
METHODS = ("tolist", "numpy", "cpu", "__iter__", "allclose")
"""Of tensors, which a CPU tensor answers without an op."""


class Waits(AbstractContextManager["Waits"]):
    """While it is entered, writes down what would make the host wait for a GPU.

    Attributes:
        found: names of ops and methods, in order. What happens inside compiled ops and collectives is not seen.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = ExitStack()

    def __enter__(self) -> Waits:
        self._modes.enter_context(_Methods(self.found))
        self._modes.enter_context(_Ops(self.found))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()


class _Ops(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in OPS:
            self.found.append(name)
        elif name in ("index", "index_put", "index_put_") and any(_is_mask(index) for index in args[1]):
            self.found.append(f"{name} by a mask")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.found.append(name)
        return func(*args, **kwargs)


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, goes_to = getattr(func, "__name__", ""), [*args[1:2], (kwargs or {}).get("device")]
        if name in METHODS or (name == "to" and any(str(place) == "cpu" for place in goes_to)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
