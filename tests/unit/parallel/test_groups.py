"""The groups that ranks really make are those of the rank map, and each carries only its own ranks."""

import pytest
import torch
import torch.distributed as dist

from megamoe.parallel.groups import build_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import run_ranks

AXES = ("dp", "ep", "edp")


def places_and_sums(ep: int) -> dict[str, tuple[tuple[int, ...], int, int, int]]:
    """Per axis: ranks, place, size, and the sum of 2^rank that the group itself adds up."""
    groups = build_groups(Topology(dist.get_world_size(), ep=ep))
    assert groups.rank == dist.get_rank()
    found = {}
    for axis in AXES:
        group = getattr(groups, axis)
        value = torch.tensor(2**groups.rank)
        dist.all_reduce(value, group=group.handle)
        found[axis] = (group.ranks, group.place, group.size, int(value))
    return found


@pytest.mark.parametrize("world_size, ep", [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_groups_are_those_of_the_rank_map(world_size: int, ep: int) -> None:
    topology = Topology(world_size, ep=ep)
    for rank, found in enumerate(run_ranks(places_and_sums, world_size, ep)):
        for axis in AXES:
            ranks = topology.group_of(rank, axis)
            assert found[axis] == (ranks, ranks.index(rank), len(ranks), sum(2**r for r in ranks)), (
                axis,
                rank,
            )
