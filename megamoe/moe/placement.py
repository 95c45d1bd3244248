"""Where the parts of a model are."""

from __future__ import annotations

from typing import NamedTuple

from megamoe.parallel.axis import SINGLE, Axis
from megamoe.parallel.groups import ProcessGroup
from megamoe.parallel.nodes import NodeGroups


class ExpertParallel(NamedTuple):
    """This rank's place in its expert-parallel group. Rank p of the group holds the experts p*L ... (p+1)*L - 1."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    node: tuple[int, ...] | None = None
    """Places in the group that are on the node of this rank's micro-batch; None: all of them."""
    etp: Axis = SINGLE
    """Ranks that hold parts of the same experts, and different tokens."""
    tokens: Axis = SINGLE
    """Ranks over which the tokens of one micro-batch are spread, in the order of their positions."""
    nodes: NodeGroups | None = None
    """How the group lies on nodes (or on tensor-parallel groups), for dispatchers that go between and then inside."""
    chunks: int = 1
    """In how many chunks of experts rows are exchanged."""

    def on_node(self, num_experts: int) -> list[bool]:
        """For each of E experts, whether its rank is on this node."""
        held = num_experts // self.size
        return [self.node is None or expert // held in self.node for expert in range(num_experts)]


class Placement(NamedTuple):
    """This rank's place on every axis that a model is spread over inside one pipeline stage."""

    experts: ExpertParallel = ExpertParallel()
    tp: Axis = SINGLE
    cp: Axis = SINGLE

    def axes(self) -> dict[str, Axis]:
        """The axes along which parameters are cut, by name."""
        experts = self.experts
        return {"tp": self.tp, "ep": Axis(experts.size, experts.rank, experts.group), "etp": experts.etp}


ALONE = ExpertParallel()
"""All experts on this rank."""
WHOLE = Placement()
"""The whole model on this rank."""
