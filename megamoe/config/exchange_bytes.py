"""Bytes that one MoE layer's exchange sends, by kind of link, where tokens choose experts evenly. No torch.

A token chooses K of E experts, each set of K as likely as any other. It then has none on a rank that holds L of them
with probability C(E - L, K) / C(E, K), so on average it reaches 1 - C(E - L, K) / C(E, K) of the ranks. By all_to_all
it costs K rows, deduplicated one for each rank that it reaches: 32 % fewer at E 64, K 8 over 8 ranks, 6 % at K 2.
Routers that keep a token's experts together save more. A token that is broadcast is one with K = E.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import Literal, NamedTuple

Exchange = Literal["all_to_all", "deduplicated", "hierarchical", "groupwise"]
COUNT = 8
"""Bytes of a number of rows."""
CODE = 2
"""Bytes that say which expert an entry of a list is for (`moe/dispatch/once.py`)."""


class ByLink(NamedTuple):
    """Of what a rank hands out."""

    between: float = 0.0
    """To ranks on other nodes."""
    inside: float = 0.0
    """To other ranks on its node."""
    itself: float = 0.0
    """Stays on the rank, and is not sent."""

    @property
    def sent(self) -> float:
        """To other ranks."""
        return self.between + self.inside


@dataclass(frozen=True)
class Spread:
    """Experts over the ranks of an expert-parallel group, in order, as many on each.

    Attributes:
        num_experts, top_k: E, K.
        ranks: P.
        per_node: ranks of the group on a node, consecutive ones.
        together: ranks that the second of two exchanges goes over, consecutive ones; hierarchical: `per_node`,
            groupwise: those of a tensor-parallel group.
    """

    num_experts: int
    top_k: int
    ranks: int
    per_node: int
    together: int = 1

    def __post_init__(self) -> None:
        if self.num_experts % self.ranks or self.ranks % self.per_node or self.ranks % self.together:
            raise ValueError(f"{self} does not divide")


class _Message(NamedTuple):
    """To one rank, on average: rows and entries per token of a rank, and numbers of rows."""

    rows: float
    entries: float
    numbers: int


def reached(held: int, num_experts: int, top_k: int) -> float:
    """Probability that a token has at least one of K experts, chosen evenly of E, among `held` certain ones."""
    return 1 - comb(num_experts - held, top_k) / comb(num_experts, top_k)


def rows_per_token(exchange: Exchange, spread: Spread) -> ByLink:
    """Rows that a rank hands out for each of its tokens on the way there, and gets for it on the way back. Of two
    exchanges, those of both."""
    return _by_link(exchange, spread, lambda message: message.rows)


def forward_bytes(exchange: Exchange, spread: Spread, tokens: int, row: int, weight: int = 4) -> ByLink:
    """What a rank hands out for a layer's forward pass: rows with their weights, results, and numbers of rows.

    Args:
        tokens: of each rank, all alike.
        row: bytes of a row, D elements.
        weight: bytes of a gate weight.
    """
    entry = weight if exchange == "all_to_all" else weight + CODE
    return _by_link(
        exchange,
        spread,
        lambda message: tokens * (2 * message.rows * row + message.entries * entry) + message.numbers * COUNT,
    )


def backward_bytes(exchange: Exchange, spread: Spread, tokens: int, row: int, weight: int = 4) -> ByLink:
    """The same of its backward pass: gradients of results, of rows and of weights."""
    return _by_link(exchange, spread, lambda message: tokens * (2 * message.rows * row + message.entries * weight))


def _by_link(exchange: Exchange, spread: Spread, size: Callable[[_Message], float]) -> ByLink:
    """Sum of all messages of the first rank; of every rank, as they are all alike."""
    found = {"between": 0.0, "inside": 0.0, "itself": 0.0}
    for peer, message in _messages(exchange, spread):
        link = "itself" if peer == 0 else "inside" if peer < spread.per_node else "between"
        found[link] += size(message)
    return ByLink(**found)


def _messages(exchange: Exchange, spread: Spread) -> list[tuple[int, _Message]]:
    """What the first rank hands to whom, itself included."""
    experts, top_k, ranks = spread.num_experts, spread.top_k, spread.ranks
    held = experts // ranks
    if exchange == "all_to_all":
        message = _Message(top_k / ranks, top_k / ranks, held)
        return [(peer, message) for peer in range(ranks)]
    if exchange == "deduplicated":
        message = _Message(reached(held, experts, top_k), top_k / ranks, 3)
        return [(peer, message) for peer in range(ranks)]
    together = spread.together
    groups = ranks // together
    across = _Message(reached(held * together, experts, top_k), top_k / groups, 3)
    # A rank hands on inside its group what as many tokens as it has itself bring there from each group.
    within = _Message(groups * reached(held, experts, top_k), top_k / together, groups + 2)
    return [(group * together, across) for group in range(groups)] + [(peer, within) for peer in range(together)]
