"""Collectives over plain values and small dictionaries of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.common.errors import MegamoeError, PeerError

Result = TypeVar("Result")


def world_size() -> int:
    """Ranks of the default group; 1 where none was made."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank in the default group."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks, at most as long as the group's timeout."""
    if dist.is_initialized():
        dist.barrier()


def together(step: Callable[[], Result]) -> Result:
    """Run `step` on every rank; if it fails on any, it fails on all.

    The lowest rank that failed raises its own error, the others a :class:`PeerError`, so that a user reads the reason
    once and no rank waits for one that left. Rank 0 takes over an error that it did not have itself.
    """
    result, error = None, None
    try:
        result = step()
    except MegamoeError as caught:
        error = caught
    first = next((e for e in gather_objects(error) if e is not None), None)
    if first is None:
        return result  # type: ignore[return-value]
    if rank() == 0:
        raise first
    raise PeerError(f"another rank failed: {first.what}")


def gather_objects(value: Result) -> list[Result]:
    """The value of every rank, rank 0 first, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Result] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_dict(
    values: Mapping[str, Tensor], group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> dict[str, Tensor]:
    """All-reduce a dictionary of fp32 tensors as one message. Every rank passes the same names and shapes."""
    names = sorted(values)
    if not names or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return dict(values)
    flat = torch.cat([values[name].reshape(-1).float() for name in names])
    dist.all_reduce(flat, op=op, group=group)
    pieces = flat.split([values[name].numel() for name in names])
    return {name: piece.view(values[name].shape) for name, piece in zip(names, pieces, strict=True)}
