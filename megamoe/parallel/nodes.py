"""Which ranks of a group share a node, and the groups of an exchange that goes between nodes and then inside them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megamoe.common.errors import TopologyError
from megamoe.parallel.groups import RankGroup, make_group
from megamoe.parallel.topology import Group, Topology

NodeMap = Sequence[Hashable]
"""Of each global rank the name of what it shares with others: a node's number, a host name."""


@dataclass(frozen=True)
class NodeGroups:
    """How a group of ranks that this rank belongs to lies on nodes, M of Q ranks each."""

    nodes: tuple[Group, ...]
    """Of each node the places in the group of its ranks; nodes by their first rank, ranks ascending."""
    between: RankGroup
    """The M ranks whose place in their node is this rank's in its own, by node."""
    inside: RankGroup
    """The Q ranks on this rank's node."""


def node_map(sizes: Sequence[int], hosts: Sequence[str]) -> NodeMap:
    """By what every rank knows of itself.

    Launchers place the ranks of a node one after the other, so the first ranks are on one node, as many as there are,
    and so on; several nodes may be simulated on one machine. Where that does not fit: by the names of the machines.

    Args:
        sizes: of every rank, how many ranks there are on its node.
        hosts: name of every rank's machine.
    """
    node_of: list[int] = []
    while len(node_of) < len(sizes):
        first = len(node_of)
        ranks = range(first, min(first + sizes[first], len(sizes)))
        if len({(sizes[rank], hosts[rank]) for rank in ranks}) > 1 or len(ranks) < sizes[first]:
            return tuple(hosts)
        node_of += [first] * len(ranks)
    return tuple(node_of)


def tensor_parallel_groups(topology: Topology) -> tuple[int, ...]:
    """The map by tensor-parallel group instead of node."""
    number_of = {rank: number for number, ranks in enumerate(topology.groups("tp")) for rank in ranks}
    return tuple(number_of[rank] for rank in range(topology.world_size))


def on_nodes(ranks: Group, node_of: NodeMap) -> tuple[Group, ...]:
    """The ranks of a group by node, nodes by their first rank: [M][Q].

    Raises:
        TopologyError: nodes do not hold equally many of them, or nodes overlap so that ranks of equal place in their
            nodes do not ascend with the nodes.
    """
    found: dict[Hashable, list[int]] = {}
    for rank in ranks:
        found.setdefault(node_of[rank], []).append(rank)
    nodes = tuple(map(tuple, found.values()))
    listed = "; ".join(f"{name}: {' '.join(map(str, members))}" for name, members in found.items())
    if len({len(node) for node in nodes}) > 1:
        raise TopologyError(
            "An exchange between nodes and then inside them needs equally many ranks of an expert-parallel group on "
            "each node.",
            got=f"ranks by node: {listed}",
            expected=f"{len(ranks)} ranks in equal parts",
            todo="change parallel.ep or the number of ranks per node, or take moe.dispatcher: deduplicated",
        )
    if any(list(across) != sorted(across) for across in zip(*nodes, strict=True)):
        raise TopologyError(
            "The ranks of an expert-parallel group lie on nodes in no order that an exchange between nodes could use.",
            got=f"ranks by node: {listed}",
            expected="consecutive ranks on a node, or ranks dealt to the nodes in turn",
            todo="change how the launcher places ranks, or take moe.dispatcher: deduplicated",
        )
    return nodes


def build_node_groups(groups: tuple[Group, ...], node_of: NodeMap, timeout: timedelta | None = None) -> NodeGroups:
    """Make the groups between nodes and inside them. Collective: all ranks of the default group call it once, in the
    same order, before the engine starts.

    Args:
        groups: that together hold each rank once, such as `topology.groups("ep")`.
        timeout: limit of every collective; None: torch's.

    Raises:
        TopologyError: as :func:`on_nodes`, on all ranks alike and before any group is made.
    """
    rank, by_group = dist.get_rank(), {ranks: on_nodes(ranks, node_of) for ranks in groups}
    inside = tuple(node for nodes in by_group.values() for node in nodes)
    between = tuple(across for nodes in by_group.values() for across in zip(*nodes, strict=True))
    mine = next(ranks for ranks in groups if rank in ranks)
    places = tuple(tuple(map(mine.index, node)) for node in by_group[mine])
    return NodeGroups(places, make_group(between, rank, timeout), make_group(inside, rank, timeout))
