"""Parameters of which this rank holds a part: which part, how the whole is put together, how a part is cut out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megamoe.parallel import collectives
from megamoe.parallel.axis import SINGLE, Axis
from megamoe.parallel.groups import Groups, RankGroup


class Shard(NamedTuple):
    """A dim that is cut into equal consecutive parts, one for each rank of an axis."""

    dim: int
    axis: str
    """Field of :class:`Groups`."""


def mark(parameter: nn.Parameter, *shards: Shard) -> None:
    """Say which part of its whole the parameter is. No dim is cut twice; no shards: it is whole."""
    parameter.shards = shards  # type: ignore[attr-defined]


def shards_of(parameter: Tensor) -> tuple[Shard, ...]:
    """The cuts; none for a parameter that every rank holds whole."""
    shards: tuple[Shard, ...] = getattr(parameter, "shards", ())
    return shards


def whole(part: Tensor, shards: tuple[Shard, ...], groups: Groups) -> Tensor:
    """Put together what the ranks hold. Collective over the groups of the axes; the parts have equal shapes."""
    for shard in shards:
        group: RankGroup = getattr(groups, shard.axis)
        if group.size > 1:
            part = torch.cat(collectives.all_gather(part, group.handle), dim=shard.dim)
    return part


def part(tensor: Tensor, shards: tuple[Shard, ...], axes: Mapping[str, Axis]) -> Tensor:
    """The part of a whole tensor that belongs to the rank of these axes, a view."""
    for shard in shards:
        axis = axes.get(shard.axis, SINGLE)
        tensor = tensor.chunk(axis.size, dim=shard.dim)[axis.rank]
    return tensor


def place_of(
    parameter: Tensor, shape: tuple[int, ...], axes: Mapping[str, Axis]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of the whole, and where the part that a rank of these axes holds begins in it.

    Args:
        shape: of the part, which under ZeRO-3 the parameter itself does not have.
    """
    whole, offsets = list(shape), [0] * len(shape)
    for shard in shards_of(parameter):
        axis = axes.get(shard.axis, SINGLE)
        offsets[shard.dim] = axis.rank * shape[shard.dim]
        whole[shard.dim] *= axis.size
    return tuple(whole), tuple(offsets)


def whole_shape(parameter: Tensor, axes: Mapping[str, Axis]) -> torch.Size:
    """Shape of the whole that the parameter is a part of."""
    return torch.Size(place_of(parameter, tuple(parameter.shape), axes)[0])
