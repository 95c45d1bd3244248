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
    """The group of one axis, or of several together, that this rank belongs to."""

    ranks: Group
    """Global ranks, ascending; a rank's place in it is its coordinate, the last axis fastest."""
    place: int
    """This rank's coordinate."""
    handle: ProcessGroup

    @property
    def size(self) -> int:
        """Ranks in the group, P."""
        return len(self.ranks)


AXES: dict[str, tuple[str, ...]] = {
    **{axis: (axis,) for axis in ("dp", "cp", "tp", "pp", "ep", "edp", "etp")},
    "replica": ("dp", "cp"),
    "micro_batch": ("cp", "tp"),
    "model": ("pp", "tp"),
    "stage": ("dp", "cp", "tp"),
    "experts": ("ep", "etp"),
}
"""The fields of :class:`Groups` and the axes along which their ranks differ."""


@dataclass(frozen=True)
class Groups:
    """This rank's groups."""

    topology: Topology
    rank: int
    dp: RankGroup
    """Ranks that read different samples."""
    cp: RankGroup
    """Ranks that hold different parts of the same sequences, and the same weights."""
    tp: RankGroup
    """Ranks that hold different parts of the same matrices."""
    pp: RankGroup
    """Ranks that hold different blocks."""
    ep: RankGroup
    """Ranks that hold different experts."""
    edp: RankGroup
    """Ranks that hold the same experts (the same parts of them)."""
    etp: RankGroup
    """Ranks that hold different parts of the same experts."""
    replica: RankGroup
    """dp x cp: ranks that hold the same dense weights; what DeepSpeed takes for data parallel."""
    micro_batch: RankGroup
    """cp x tp: ranks over which the tokens of one micro-batch are spread."""
    model: RankGroup
    """pp x tp: ranks that together hold the dense weights once."""
    stage: RankGroup
    """dp x cp x tp: all ranks of a pipeline stage."""
    experts: RankGroup
    """ep x etp: ranks that together hold a stage's experts once."""
    ends: RankGroup
    """First and last stage of a pipeline, which share a tied embedding; and the stages between them."""


def build_groups(topology: Topology, timeout: timedelta | None = None) -> Groups:
    """Make every group. Collective: all ranks of the default group call it once, in the same order.

    Args:
        timeout: limit of every collective of these groups; they do not inherit the default group's. None: torch's.
    """
    rank, made = dist.get_rank(), dict[tuple[Group, ...], RankGroup]()
    fields = {name: _build(topology.groups(*axes), rank, timeout, made) for name, axes in AXES.items()}
    fields["ends"] = _build(_ends(topology), rank, timeout, made)
    return Groups(topology, rank, **fields)


def _ends(topology: Topology) -> tuple[Group, ...]:
    """Every pipeline in two: its first and last rank, and those between them."""
    pipelines = topology.groups("pp")
    if topology.pp <= 2:
        return pipelines
    return tuple(part for ranks in pipelines for part in ((ranks[0], ranks[-1]), ranks[1:-1]))


def _build(
    groups: tuple[Group, ...], rank: int, timeout: timedelta | None, made: dict[tuple[Group, ...], RankGroup]
) -> RankGroup:
    """This rank's group of those; made once for all axes along which the same ranks meet."""
    if groups not in made:
        made[groups] = make_group(groups, rank, timeout)
    return made[groups]


def make_group(groups: tuple[Group, ...], rank: int, timeout: timedelta | None) -> RankGroup:
    """This rank's group of those. Collective: every rank makes all of them."""
    handles = {ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in groups}
    mine = next(ranks for ranks in groups if rank in ranks)
    return RankGroup(mine, mine.index(rank), handles[mine])
