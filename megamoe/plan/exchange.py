"""How many bytes one rank sends over each class of links, for every way of bringing rows to their experts.

What a token costs is counted as in `config/exchange_bytes.py`, here for a chunk of the experts of every rank as well:
rows that travel once for several experts do so only if these are in one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.config.exchange_bytes import CODE, reached
from megamoe.plan.rates import BETWEEN, INSIDE

Moves = list[dict[str, float]]
"""Steps one after the other; in each, bytes by class of links, sent side by side."""
WAYS = ("all_to_all", "deduplicated", "hierarchical")
"""What is compared."""
IN_CHUNKS = ("all_to_all",)
"""What can be cut into chunks, padded or not; of the others it is predicted what that would bring."""
WEIGHT = 4
"""Bytes of a gate weight, at least."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of an expert-parallel group are.

    Attributes:
        ranks: P of the group.
        on_node: of them, those on the node of the rank that is looked at, itself included.
    """

    ranks: int
    on_node: int

    @property
    def nodes(self) -> int:
        """Nodes that hold the group; as many ranks on each."""
        return -(-self.ranks // self.on_node)


@dataclass(frozen=True)
class Rows:
    """What one rank sends to experts, if every choice of K experts is as likely as any other.

    Attributes:
        tokens: T of this rank.
        choices: rows of all_to_all, empty slots included: T * K without capacity and padding.
        experts, chosen: E, K.
        held: experts of every rank that take part: a chunk of them, or all.
    """

    tokens: float
    choices: float
    experts: int
    chosen: int
    held: int

    def moves(self, way: str, place: Place, row_bytes: float, entry_bytes: float, *, home: bool) -> Moves:
        """Bytes of one direction of an exchange.

        Args:
            row_bytes: of a row.
            entry_bytes: of what comes with every choice of an expert: gate weight, expert, or their gradients.
            home: the way back, step by step the opposite of the way there.
        """
        others, elsewhere = place.on_node - 1, place.ranks - place.on_node
        if way == "hierarchical" and place.nodes > 1:
            to_node = self._once(self.held * place.on_node, row_bytes, entry_bytes)
            # Every rank passes on what the ranks at its place of all nodes have for its own node.
            to_rank = place.nodes * self._once(self.held, row_bytes, entry_bytes)
            steps = [{BETWEEN: to_node * (place.nodes - 1)}, {INSIDE: to_rank * others}]
            return steps[::-1] if home else steps
        if way == "all_to_all":
            each = self.choices * self.held / self.experts * (row_bytes + entry_bytes)
        else:
            each = self._once(self.held, row_bytes, entry_bytes)
        return [{INSIDE: each * others, BETWEEN: each * elsewhere}]

    def _once(self, held: int, row_bytes: float, entry_bytes: float) -> float:
        """Bytes to one rank, or node, with so many experts: a row for each token that chose any, and all choices."""
        entries = self.chosen * held / self.experts
        return self.tokens * (reached(held, self.experts, self.chosen) * row_bytes + entries * entry_bytes)


def entry_bytes(way: str, phase: str, value_bytes: int) -> int:
    """Of a choice in the phases "dispatch", "combine", "combine backward" and "dispatch backward"."""
    weight = max(WEIGHT, value_bytes)
    codes = 0 if way == "all_to_all" else CODE
    return {"dispatch": weight + codes, "dispatch backward": weight}.get(phase, 0)
