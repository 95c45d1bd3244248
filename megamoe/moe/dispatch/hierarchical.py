"""Dispatch over an expert-parallel group on several nodes: a token travels once to a node, and there once to a rank."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.base import DEFAULT
from megamoe.moe.dispatch.deduplicated import DeduplicatedDispatcher
from megamoe.moe.dispatch.once import Load
from megamoe.parallel.groups import Group
from megamoe.parallel.link import Link


class HierarchicalDispatcher(DeduplicatedDispatcher):
    """Two deduplicated exchanges, one after the other.

    A row goes once to each node that has experts for it, to the rank whose place in that node is this rank's in its
    own, and from there once to each rank of the node that has them. Results are added up at the experts' rank, then at
    the rank through which the row entered the node, then at home, so that one row of a token and node returns. The
    experts see their rows in the same order as without nodes.

    Args:
        nodes: of each node the places in the group of its ranks, equally many everywhere, ascending.
        between: the ranks of this rank's place in all nodes, in the order of `nodes`.
        inside: the ranks of this rank's node.
    """

    name = "hierarchical"
    where = (" between nodes", " inside the node")
    """What phases of the two exchanges are called, after what they are."""

    def __init__(self, nodes: tuple[Group, ...], between: Link, inside: Link, ops: OpsConfig = DEFAULT) -> None:
        super().__init__(inside, ops)
        if (len(nodes), len(nodes[0])) != (between.num_ranks, inside.num_ranks):
            raise ValueError(f"{nodes} are not {between.num_ranks} nodes of {inside.num_ranks} ranks")
        self.nodes = nodes
        self.stops = tuple(zip((between, inside), self.where, strict=True))

    def numbered(self, load: Load) -> Load:
        if self._ascend():
            return load
        places = self._places(load.row_A.device).flatten()
        held, nobody = load.num_experts // len(places), places.new_full((1,), len(places))
        ranks_A = torch.cat([places.argsort(), nobody])[load.experts_A // held]
        return load._replace(experts_A=ranks_A * held + load.experts_A % held)

    def sources(self, load: Load) -> Tensor | None:
        # Rows came by their place in a node first, and of each place by node.
        return self._places(load.row_A.device).t().reshape(-1)

    def _ascend(self) -> bool:
        """Whether ranks are on the nodes in their order."""
        places = [place for node in self.nodes for place in node]
        return places == sorted(places)

    def _places(self, device: torch.device) -> Tensor:
        """The nodes, [M, Q]. Made on the device where it can be: for a list the host would wait."""
        if self._ascend():
            return torch.arange(sum(map(len, self.nodes)), device=device).view(len(self.nodes), -1)
        return torch.tensor(self.nodes, device=device)
