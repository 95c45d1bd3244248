"""The rank map against nested loops, up to 4,096 ranks."""

from itertools import pairwise, product

import pytest

from megamoe.common.errors import TopologyError
from megamoe.parallel.topology import DENSE_AXES, EXPERT_AXES, Topology, _nodes_of

CASES = [
    Topology(1),
    Topology(2, ep=2),
    Topology(4, ep=2),
    Topology(8, tp=2, pp=2, ep=4),
    Topology(16, tp=2, cp=2, ep=2, etp=2),
    Topology(48, tp=2, pp=3, ep=8),
    Topology(4096, tp=8, pp=4, cp=2, ep=64, etp=2),
]


def grid(topology: Topology, axes: tuple[str, ...]) -> dict[tuple[int, ...], int]:
    """Coordinates to rank, counted off with the last axis fastest."""
    places = product(*(range(topology.degree(axis)) for axis in axes))
    return {place: rank for rank, place in enumerate(places)}


@pytest.mark.parametrize("topology", CASES, ids=str)
def test_coordinates_count_off_both_grids(topology: Topology) -> None:
    for axes in (DENSE_AXES, EXPERT_AXES):
        ranks = grid(topology, axes)
        assert len(ranks) == topology.world_size
        for place, rank in ranks.items():
            coordinates = topology.coordinates(rank)
            assert tuple(coordinates[axis] for axis in axes) == place


@pytest.mark.parametrize("topology", CASES, ids=str)
@pytest.mark.parametrize("axes", [("tp",), ("pp",), ("dp",), ("cp",), ("ep",), ("edp",), ("etp",), ("dp", "cp")])
def test_groups_vary_only_their_axes(topology: Topology, axes: tuple[str, ...]) -> None:
    all_axes = DENSE_AXES if set(axes) <= set(DENSE_AXES) else EXPERT_AXES
    fixed = [index for index, axis in enumerate(all_axes) if axis not in axes]
    expected: dict[tuple[int, ...], list[int]] = {}
    for place, rank in grid(topology, all_axes).items():
        expected.setdefault(tuple(place[index] for index in fixed), []).append(rank)
    groups = topology.groups(*axes)
    assert sorted(map(list, groups)) == sorted(expected.values())
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    assert list(groups) == sorted(groups)


def test_a_rank_finds_its_place_in_its_group() -> None:
    topology = CASES[-1]
    for rank in (0, 777, 4095):
        for axis in (*DENSE_AXES, *EXPERT_AXES):
            assert topology.group_of(rank, axis).index(rank) == topology.coordinates(rank)[axis]


def test_known_layout() -> None:
    topology = Topology(8, tp=2, pp=2, ep=2)
    assert (topology.dp, topology.edp) == (2, 2)
    assert topology.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert topology.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert topology.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert topology.groups("ep") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert topology.groups("edp") == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_expert_groups_stay_inside_a_stage() -> None:
    topology = CASES[-1]
    for group in topology.groups("ep"):
        assert len({topology.coordinates(rank)["pp"] for rank in group}) == 1


@pytest.mark.parametrize(
    "degrees, arithmetic",
    [
        ({"world_size": 6, "tp": 4}, "6 % 4 = 2"),
        ({"world_size": 3, "ep": 2}, "3 % 2 = 1"),
        ({"world_size": 8, "pp": 2, "ep": 3}, "8 % 6 = 2"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"world_size": 2, "ep": 0}, "ep must be at least 1"),
    ],
)
def test_misfits_show_the_arithmetic(degrees: dict[str, int], arithmetic: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Topology(**degrees)
    assert arithmetic in str(caught.value)


def test_ranks_and_axes_that_do_not_exist() -> None:
    with pytest.raises(TopologyError, match="no rank 2"):
        Topology(2).coordinates(2)
    with pytest.raises(ValueError, match="not of one grid"):
        Topology(2).groups("dp", "ep")


def test_description_of_a_small_world() -> None:
    text = Topology(4, ep=2).describe()
    assert "4 ranks = pp 1 x dp 4 x cp 1 x tp 1" in text
    assert "4 ranks = pp 1 x edp 2 x ep 2 x etp 1" in text
    assert "1 node of 8 ranks, 4 in use" in text
    assert "dp groups: 4 neighbours, inside a node: [0 1 2 3]" in text
    assert "ep groups: 2 neighbours, inside a node: [0 1] [2 3]" in text
    assert "edp groups: 2 ranks, 2 apart, inside a node: [0 2] [1 3]" in text
    assert "tp groups" not in text
    assert "   3 |    0    3    0    0    1    1    0" in text


def test_description_of_a_large_world_stays_short() -> None:
    text = CASES[-1].describe()
    assert len(text.splitlines()) < 30
    assert "4080 more ranks" in text
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize("topology", CASES, ids=str)
@pytest.mark.parametrize("axis", [*DENSE_AXES, *EXPERT_AXES[1:]])
def test_groups_are_as_far_apart_as_the_stride_says(topology: Topology, axis: str) -> None:
    for group in topology.groups(axis):
        assert {after - before for before, after in pairwise(group)} <= {topology.stride(axis)}
    assert sorted(map(tuple, topology._groups_of(axis))) == list(topology.groups(axis))


@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("topology", CASES[:-1], ids=str)
def test_nodes_are_counted_right(topology: Topology, per_node: int) -> None:
    for axis in (*DENSE_AXES, *EXPERT_AXES[1:]):
        for group in topology._groups_of(axis):
            assert _nodes_of(group, per_node) == len({rank // per_node for rank in group})


@pytest.mark.parametrize(
    "topology, per_node, line",
    [
        (Topology(64, tp=4, pp=2, ep=8), 8, "8 nodes of 8 ranks"),
        (Topology(64, tp=4, pp=2, ep=8), 8, "tp groups: 4 neighbours, inside a node: [0 1 2 3] [4 5 6 7]"),
        (Topology(64, tp=4, pp=2, ep=8), 4, "ep groups: 8 neighbours, across 2 nodes: [0 1 2 3 4 5 6 7]"),
        (Topology(64, tp=4, pp=2, ep=8), 8, "dp groups: 8 ranks, 4 apart, across 4 nodes: [0 4 8 12"),
        (Topology(64, tp=4, pp=2, ep=8), 8, "pp groups: 2 ranks, 32 apart, across 2 nodes: [0 32]"),
        (Topology(32, ep=2, etp=4), 8, "ep groups: 2 ranks, 4 apart, inside a node: [0 4] [1 5]"),
        (Topology(12, tp=4), 6, "tp groups: 4 neighbours, 1 of 3 groups across 2 nodes: [0 1 2 3]"),
        (Topology(20), 8, "3 nodes of 8 ranks, 4 in use on the last"),
        (Topology(8), 8, "1 node of 8 ranks"),
    ],
)
def test_the_map_says_what_crosses_nodes(topology: Topology, per_node: int, line: str) -> None:
    lines = topology.describe(per_node).splitlines()
    assert any(text == line if "groups" not in line else text.startswith(line) for text in lines), "\n".join(lines)
