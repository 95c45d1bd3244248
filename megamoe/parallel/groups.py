"""The process groups of a run: one object, made once on all ranks, passed to whoever communicates."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megamoe.parallel.topology import Group, Topology

ProcessGroup = dist.ProcessGroup
"""torch's handle, named here so that rooms which only pass it on need not import torch.distributed."""


@dataclass(frozen=True)
class RankGroup:
    """The group of one axis that this rank belongs to."""

    ranks: Group
    """Global ranks, ascending; a rank's place in it is its coordinate on the axis."""
    place: int
    """This rank's coordinate."""
    handle: ProcessGroup

    @property
    def size(self) -> int:
        """Ranks in the group, P."""
        return len(self.ranks)


@dataclass(frozen=True)
class Groups:
    """This rank's groups."""

    topology: Topology
    rank: int
    dp: RankGroup
    ep: RankGroup
    edp: RankGroup


def build_groups(topology: Topology, timeout: timedelta | None = None) -> Groups:
    """Make every group of every axis. Collective: all ranks of the default group call it once, in the same order.

    Args:
        timeout: limit of every collective of these groups; they do not inherit the default group's. None: torch's.
    """
    rank = dist.get_rank()
    return Groups(topology, rank, *(_build_axis(topology, axis, rank, timeout) for axis in ("dp", "ep", "edp")))


def _build_axis(topology: Topology, axis: str, rank: int, timeout: timedelta | None) -> RankGroup:
    mine: RankGroup | None = None
    for ranks in topology.groups(axis):
        handle = dist.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            mine = RankGroup(ranks, ranks.index(rank), handle)
    assert mine is not None, "the groups of an axis hold every rank"
    return mine
