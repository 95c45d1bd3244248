"""What a schedule spends its time on, how much of its exchange is hidden, and what limits it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megamoe.plan.events import Interval, Placed, length, makespan, union, without
from megamoe.plan.rates import BETWEEN, COMPUTE, HOST, INSIDE, LINKS

EXPERT_KINDS = ("experts", "gradients of rows", "gradients of weights")
SMALL = 0.05
"""Share of the time that is not worth calling a limit."""


@dataclass(frozen=True)
class Verdict:
    """Of one schedule, or of several one after the other; all in seconds.

    Attributes:
        total: from the first task's start to the last one's end.
        computing: something is computed.
        exchanging: something is under way between ranks.
        edges: of the exposed exchange, what lies before the first pass of experts, and after the last one the last
            exchange, without those that it had to queue behind.
        on_link: the other exposed exchange, by class of links; both at once counts as between nodes.
        launching: nothing is computed or under way, and the host is at work.
    """

    total: float
    computing: float
    exchanging: float
    edges: float
    on_link: dict[str, float]
    launching: float

    @property
    def exposed(self) -> float:
        """Something is under way and nothing is computed."""
        return self.edges + sum(self.on_link.values())

    @property
    def hidden(self) -> float:
        """Something is under way and something is computed."""
        return self.exchanging - self.exposed

    @property
    def hidden_share(self) -> float:
        """Of the exchange; 1 where there is none."""
        return self.hidden / self.exchanging if self.exchanging else 1.0

    @property
    def limit(self) -> str:
        """What takes most of the time that computation does not; computation, where that is little."""
        causes = {
            "the exchange before the first and after the last expert": self.edges,
            "the link inside a node": self.on_link[INSIDE],
            "the link between nodes": self.on_link[BETWEEN],
            "launch gaps: the host issues operations more slowly than they run": self.launching,
        }
        cause, seconds = max(causes.items(), key=lambda item: item[1])
        return cause if seconds > SMALL * self.total else "computation"

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.total + other.total,
            self.computing + other.computing,
            self.exchanging + other.exchanging,
            self.edges + other.edges,
            {link: self.on_link[link] + other.on_link[link] for link in LINKS},
            self.launching + other.launching,
        )

    def times(self, number: float) -> Verdict:
        """Of so many such schedules."""
        return Verdict(
            self.total * number,
            self.computing * number,
            self.exchanging * number,
            self.edges * number,
            {link: seconds * number for link, seconds in self.on_link.items()},
            self.launching * number,
        )


NOTHING = Verdict(0.0, 0.0, 0.0, 0.0, dict.fromkeys(LINKS, 0.0), 0.0)


def exposed(placed: Sequence[Placed]) -> list[Interval]:
    """When something is under way between ranks and nothing is computed."""
    return without(_when(placed, LINKS), _when(placed, (COMPUTE,)))


def judge(placed: Sequence[Placed]) -> Verdict:
    """What a schedule spends its time on."""
    computing, exchanging = _when(placed, (COMPUTE,)), _when(placed, LINKS)
    open_link = exposed(placed)
    between = _overlap(open_link, _when(placed, (BETWEEN,)))
    inside = without(open_link, between)
    middle = without([(0.0, makespan(placed))], _ends(placed))
    on_link = {INSIDE: length(_overlap(inside, middle)), BETWEEN: length(_overlap(between, middle))}
    idle = without(_when(placed, (HOST,)), union([*computing, *exchanging]))
    edges = length(open_link) - sum(on_link.values())
    return Verdict(makespan(placed), length(computing), length(exchanging), edges, on_link, length(idle))


def _when(placed: Iterable[Placed], resources: Iterable[str]) -> list[Interval]:
    names = set(resources)
    return union((each.start, each.end) for each in placed if each.task.resource in names)


def _overlap(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    return without(intervals, without(intervals, others))


def _ends(placed: Sequence[Placed]) -> list[Interval]:
    """Before the first pass of experts; and after the last one, the exchange that ends last, in all its steps."""
    work = [each for each in placed if each.task.kind in EXPERT_KINDS]
    links = [each for each in placed if each.task.resource in LINKS]
    if not work or not links:
        return [(0.0, makespan(placed))]
    first, last = min(each.start for each in work), max(each.end for each in work)
    name = max(links, key=lambda each: each.end).task.name
    steps = ((max(last, each.start), each.end) for each in links if each.task.name == name and each.end > last)
    return union([(0.0, first), *steps])
