"""Which ranks share a node; tests/dist/test_fewer_bytes.py makes the groups and sends over them."""

from __future__ import annotations

import pytest

from megamoe.common.errors import TopologyError
from megamoe.parallel.nodes import node_map, on_nodes, tensor_parallel_groups
from megamoe.parallel.topology import Topology


def test_maps() -> None:
    assert node_map([2] * 6, ["a"] * 6) == (0, 0, 2, 2, 4, 4)
    assert node_map([2, 2, 1], ["a", "a", "b"]) == (0, 0, 2), "uneven nodes"
    assert node_map([2, 2, 2, 2], ["a", "b", "a", "b"]) == ("a", "b", "a", "b"), "dealt in turn"
    assert node_map([2, 2, 2], ["a", "a", "a"]) == ("a", "a", "a"), "a rank is missing"
    assert tensor_parallel_groups(Topology(8, tp=2, ep=4)) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert tensor_parallel_groups(Topology(4, ep=4)) == (0, 1, 2, 3)


def test_ranks_by_node() -> None:
    assert on_nodes((4, 5, 6, 7), (0, 0, 1, 1, 2, 2, 3, 3)) == ((4, 5), (6, 7))
    assert on_nodes((0, 2, 4, 6), (0, 0, 0, 0, 1, 1, 1, 1)) == ((0, 2), (4, 6))
    assert on_nodes((0, 1, 2, 3), ("a", "b", "a", "b")) == ((0, 2), (1, 3))
    assert on_nodes((0, 1), "aa") == ((0, 1),)


def test_experts_cut_over_ranks_leave_fewer_of_a_tensor_parallel_group() -> None:
    topology = Topology(8, tp=4, ep=4, etp=2)
    assert topology.groups("ep") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert on_nodes((1, 3, 5, 7), tensor_parallel_groups(topology)) == ((1, 3), (5, 7))


def test_uneven_nodes_are_refused() -> None:
    with pytest.raises(TopologyError, match="equally many") as error:
        on_nodes((0, 1, 2), (0, 0, 1, 1))
    assert "0: 0 1; 1: 2" in str(error.value)
    assert "deduplicated" in str(error.value)


def test_nodes_in_no_order_are_refused() -> None:
    with pytest.raises(TopologyError, match="no order"):
        on_nodes((0, 1, 2, 3), "abba")
