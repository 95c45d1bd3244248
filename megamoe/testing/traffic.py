"""Bytes that this rank really sends, by axis: of our own communication and DeepSpeed's, in both passes.

All of torch.distributed's collectives are operators of the namespace c10d, which a dispatch mode sees: whoever calls
them, from Python or from the autograd engine. The convention of what counts is that of `config/traffic.py`.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.parallel.groups import Groups, RankGroup

CONTROL_BYTES = 16
"""What DeepSpeed adds up or broadcasts in messages of at most this size is control: norms, flags, losses."""
CONTROL, METRICS, OTHER = "control", "metrics", "other"
"""Besides the axes: small messages, the reduction of metrics, and what no rule below knows."""


class _Origin(NamedTuple):
    """Code that communicates, and over which groups: one with the ranks of the message's group gives its name."""

    path: str
    function: str
    """Beginning of its qualified name."""
    axes: tuple[str, ...]


# Groups of different axes often have the same ranks, and then are the same; so the code that calls decides.
_ORIGINS = (
    _Origin("megamoe/parallel/regions.py", "_GatherShared", ("micro_batch",)),
    _Origin("megamoe/parallel/regions.py", "_GatherSequence", ("tp",)),
    _Origin("megamoe/parallel/regions.py", "_ReduceScatterSequence", ("tp",)),
    _Origin("megamoe/parallel/regions.py", "_Sum", ("tp",)),
    _Origin("megamoe/parallel/regions.py", "sum_replicated_gradients", ("tp",)),
    _Origin("megamoe/parallel/vocab.py", "", ("tp",)),
    _Origin("megamoe/moe/dispatch/", "", ("ep", "etp")),
    _Origin("megamoe/moe/routers/", "", ("ep",)),
    _Origin("megamoe/training/grad_norm.py", "", (CONTROL,)),
    _Origin("megamoe/training/metrics.py", "", (METRICS,)),
    _Origin("deepspeed/sequence/", "", ("cp",)),
    _Origin("deepspeed/runtime/pipe/", "", ("pp",)),
    _Origin("deepspeed/runtime/", "", ("replica", "edp")),
)
_NAMES = {"replica": "dp"}
"""Fields of Groups that `config/traffic.py` calls otherwise."""


class Message(NamedTuple):
    """One operation of torch.distributed on this rank."""

    axis: str
    kind: str
    """all_reduce, all_gather, ..."""
    ranks: int
    """P."""
    sent: float
    """Bytes."""
    worked: float
    """CPU seconds of this thread since the message before, or since counting began."""
    again: Callable[[], None]
    """Does it once more with tensors of the same sizes, and waits for it."""


class Traffic(TorchDispatchMode):
    """Context manager that collects what this rank sends.

    Args:
        groups: the process groups of the run.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        self.messages: list[Message] = []
        self._free_since = 0.0

    def __enter__(self) -> Self:
        self._free_since = time.thread_time()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, time.thread_time() - self._free_since)
        result = func(*args, **(kwargs or {}))
        self._free_since = time.thread_time()
        return result

    def sent(self) -> dict[str, float]:
        """Bytes by axis, without axes over which nothing was sent; of small messages under `control`."""
        found: dict[str, float] = defaultdict(float)
        for message in self.messages:
            found[message.axis] += message.sent
        return {axis: size for axis, size in found.items() if size}

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], worked: float) -> None:
        kind, measure = _KINDS[func._schema.name.partition("::")[2]]
        arguments = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        group = dist.ProcessGroup.unbox(arguments["process_group"])
        size = float(measure(arguments, group.size(), group.rank()))
        axis = self._axis(kind, size, tuple(dist.get_process_group_ranks(group)))
        self.messages.append(Message(axis, kind, group.size(), size, worked, _repetition(func, args, kwargs)))

    def _axis(self, kind: str, size: float, ranks: tuple[int, ...]) -> str:
        origin = _origin(sys._getframe(3))
        if origin is None:
            return OTHER
        if "deepspeed" in origin.path and kind in ("all_reduce", "broadcast") and size <= CONTROL_BYTES * len(ranks):
            return CONTROL
        if len(origin.axes) == 1 and not isinstance(getattr(self.groups, origin.axes[0], None), RankGroup):
            return origin.axes[0]
        if origin.axes == ("pp",):  # sent through the default group, and tied weights through one of their own
            return "pp"
        if "ep" in origin.axes and set(ranks) < set(self.groups.ep.ranks):  # between its nodes, or inside one
            return "ep"
        fitting = [axis for axis in origin.axes if getattr(self.groups, axis).ranks == ranks]
        return _NAMES.get(fitting[0], fitting[0]) if fitting else OTHER


def replay(messages: list[Message], work: Callable[[float], None] | None = None) -> dict[tuple[str, str], float]:
    """Do all of it again, one after the other. Collective.

    Args:
        work: done before each message, with the share of all work that came before it when it was counted.

    Returns:
        Seconds that this rank spent with messages, by axis and kind.
    """
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    worked = sum(message.worked for message in messages)
    for message in messages:
        if work is not None:
            work(message.worked / worked)
        began = time.perf_counter()
        message.again()
        seconds[message.axis, message.kind] += time.perf_counter() - began
    return dict(seconds)


def _origin(frame: FrameType | None) -> _Origin | None:
    """The innermost code that is in the table."""
    while frame is not None:
        code = frame.f_code
        path = code.co_filename.replace("\\", "/")
        for origin in _ORIGINS:
            if f"/{origin.path}" in path and code.co_qualname.startswith(origin.function):
                return origin
        frame = frame.f_back
    return None


def _repetition(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    # Made once: allocating and clearing them is not the messages' time, and differs between layouts.
    blank, named = pytree.tree_map_only(Tensor, torch.zeros_like, (args, kwargs))

    def again() -> None:
        for result in pytree.tree_leaves(func(*blank, **named)):
            if isinstance(result, torch.ScriptObject):
                dist.Work.unbox(result).wait()

    return again


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _input(arguments: dict[str, Any]) -> int:
    return next(_bytes(v) for name, v in arguments.items() if name.startswith(("input", "tensors")))


Measure = Callable[[dict[str, Any], int, int], float]
"""Arguments of the operator, P and this rank's place in the group, to bytes."""


def _all_to_all(arguments: dict[str, Any], size: int, place: int) -> float:
    rows, splits = arguments["input"], arguments["input_split_sizes"]
    if not splits:
        return _bytes(rows) * (size - 1) / size
    return _bytes(rows) * (sum(splits) - splits[place]) / max(1, sum(splits))


def _all_to_all_list(arguments: dict[str, Any], size: int, place: int) -> float:
    return sum(_bytes(tensor) for number, tensor in enumerate(arguments["input_tensors"]) if number != place)


def _from_root(arguments: dict[str, Any], size: int, place: int) -> float:
    return (size - 1) * _bytes(arguments.get("tensors", ())) if place == arguments["root_rank"] else 0.0


def _to_root(arguments: dict[str, Any], size: int, place: int) -> float:
    return _input(arguments) if place != arguments["root_rank"] else 0.0


def _scatter(arguments: dict[str, Any], size: int, place: int) -> float:
    return _bytes(arguments["input_tensors"]) * (size - 1) / size if place == arguments["root_rank"] else 0.0


def _reduce(arguments: dict[str, Any], size: int, place: int) -> float:
    return 2 * (size - 1) / size * _input(arguments)


def _gather(arguments: dict[str, Any], size: int, place: int) -> float:
    return (size - 1) * _input(arguments)


def _reduce_scatter(arguments: dict[str, Any], size: int, place: int) -> float:
    return _input(arguments) * (size - 1) / size


def _all(arguments: dict[str, Any], size: int, place: int) -> float:
    return _input(arguments)


def _nothing(arguments: dict[str, Any], size: int, place: int) -> float:
    return 0.0


# An operator that is not here fails as a missing key: nothing goes uncounted.
_KINDS: dict[str, tuple[str, Measure]] = {
    "allreduce_": ("all_reduce", _reduce),
    "allreduce_coalesced_": ("all_reduce", _reduce),
    "allgather_": ("all_gather", _gather),
    "_allgather_base_": ("all_gather", _gather),
    "allgather_coalesced_": ("all_gather", _gather),
    "allgather_into_tensor_coalesced_": ("all_gather", _gather),
    "reduce_scatter_": ("reduce_scatter", _reduce_scatter),
    "_reduce_scatter_base_": ("reduce_scatter", _reduce_scatter),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _reduce_scatter),
    "alltoall_base_": ("all_to_all", _all_to_all),
    "alltoall_": ("all_to_all", _all_to_all_list),
    "broadcast_": ("broadcast", _from_root),
    "reduce_": ("reduce", _to_root),
    "gather_": ("gather", _to_root),
    "scatter_": ("scatter", _scatter),
    "send": ("send", _all),
    "recv_": ("receive", _nothing),
    "recv_any_source_": ("receive", _nothing),
    "barrier": ("barrier", _nothing),
    "monitored_barrier_": ("barrier", _nothing),
}
