"""Where the experts of a layer are."""

from __future__ import annotations

from typing import NamedTuple

from megamoe.parallel.groups import ProcessGroup


class ExpertParallel(NamedTuple):
    """This rank's place in its expert-parallel group. Rank p of the group holds the experts p*L ... (p+1)*L - 1."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    node: tuple[int, ...] | None = None
    """Places in the group that are on this rank's node; None: all of them."""

    def on_node(self, num_experts: int) -> list[bool]:
        """For each of E experts, whether its rank is on this node."""
        held = num_experts // self.size
        return [self.node is None or expert // held in self.node for expert in range(num_experts)]


ALONE = ExpertParallel()
"""All experts on this rank."""
