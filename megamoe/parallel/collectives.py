"""Collectives over plain values and small dictionaries of tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.common.errors import MegamoeError, PeerError
from megamoe.parallel.groups import ProcessGroup

Result = TypeVar("Result")


def world_size(group: ProcessGroup | None = None) -> int:
    """Ranks of a group (None: the default one); 1 where none was made."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank() -> int:
    """This rank in the default group."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks, at most as long as the group's timeout."""
    if dist.is_initialized():
        dist.barrier()


def together(step: Callable[[], Result]) -> Result:
    """Run `step` on every rank; if it fails on any, it fails on all.

    Rank 0 raises the error of the lowest rank that failed, the others a :class:`PeerError`, so that a user reads the
    reason once and no rank waits for one that left. A defect (any other exception) is raised where it happened, with
    its traceback, and is a PeerError everywhere else.
    """
    result, error = None, None
    try:
        result = step()
    except Exception as caught:
        error = caught
    first = next((e for e in gather_objects(_for_peers(error)) if e is not None), None)
    if first is None:
        return result  # type: ignore[return-value]
    if error is not None and not isinstance(error, MegamoeError):
        raise error
    if rank() == 0:
        raise first
    raise PeerError(f"another rank failed: {first.what}")


def together_at_length(step: Callable[[Callable[[], None]], Result], tick: Callable[[], None]) -> Result:
    """As `together`, for a step that may take long: whoever watches over the ranks hears that they get on.

    Args:
        step: calls what it is given whenever it has got somewhere, in pieces of a second or less.
        tick: called on every rank, about once a second, as long as each rank has either got somewhere since or is done.
    """
    last, result, error = time.monotonic(), None, None

    def progress() -> None:
        nonlocal last
        if time.monotonic() - last >= 1.0:
            gather_objects(False)  # with those of ranks that are done, below: in this order on all
            tick()
            last = time.monotonic()

    try:
        result = step(progress)
    except Exception as caught:
        error = caught
    while not all(gather_objects(True)):
        tick()
    return together(lambda: _outcome(result, error))  # type: ignore[return-value]


def _outcome(result: Result, error: Exception | None) -> Result:
    if error is not None:
        raise error
    return result


def _for_peers(error: Exception | None) -> MegamoeError | None:
    """The error as other ranks get it: one of ours as it is; a defect, which may not even pickle, as its text."""
    if error is None or isinstance(error, MegamoeError):
        return error
    return PeerError(f"{type(error).__name__}: {error}")


def gather_objects(value: Result, group: ProcessGroup | None = None) -> list[Result]:
    """The value of every rank of a group (None: all), in its order, on every one of them."""
    if world_size(group) == 1:
        return [value]
    values: list[Result] = [value] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def reduce_dict(
    values: Mapping[str, Tensor], group: ProcessGroup | None, how: Literal["sum", "max"] = "sum"
) -> dict[str, Tensor]:
    """All-reduce a dictionary of tensors as one message, in fp64 if any of them is, else in fp32.

    Every rank passes the same names, shapes and dtypes; the results have these dtypes, as on one rank.
    """
    names = sorted(values)
    if not names or world_size(group) == 1:
        return dict(values)
    # Not at_least_fp32: ops/ stands beside this room.
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values.values()) else torch.float32
    flat = torch.cat([values[name].reshape(-1).to(dtype) for name in names])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
    pieces = flat.split([values[name].numel() for name in names])
    return {name: piece.view_as(values[name]).to(values[name].dtype) for name, piece in zip(names, pieces, strict=True)}


def all_reduce_max(value: Tensor) -> Tensor:
    """Element-wise maximum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def all_reduce_sum(value: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks of a group (None: all), in place."""
    if dist.is_initialized():
        dist.all_reduce(value, group=group)
    return value


def all_gather(value: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """The tensor of every rank of a group, in its order; all of one shape."""
    parts = [torch.empty_like(value) for _ in range(world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return parts
