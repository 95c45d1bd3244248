"""A small discrete-event engine: tasks on resources, each resource in program order.

Tasks that run side by side on different resources may slow each other down: each proceeds at the product of the shares
of its speed that the others leave it, and shares change only where a task begins or ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Interval = tuple[float, float]
Kept = Mapping[tuple[str, str], float]
"""(resource, other resource): share of its speed that the first keeps while the other is at work; 1 where not given."""


@dataclass(frozen=True)
class Task:
    """A piece of work.

    Attributes:
        seconds: that it takes with nothing beside it.
        after: places in the program of tasks that must have ended, all before this one.
        kind: what it is, for colours and sums, as "experts" or "dispatch".
        hint: more for the reader.
    """

    name: str
    resource: str
    seconds: float
    after: tuple[int, ...] = ()
    kind: str = ""
    hint: str = ""


class Placed(NamedTuple):
    """A task and when it ran, in seconds from the start."""

    task: Task
    start: float
    end: float


def run(program: Sequence[Task], kept: Kept | None = None) -> list[Placed]:
    """Start every task as soon as those before it on its resource, and those in `after`, have ended.

    Returns:
        In the order of the program.

    Raises:
        ValueError: a task waits for a later one, or takes less than no time.
    """
    _check(program)
    queues: dict[str, list[int]] = defaultdict(list)
    for place in reversed(range(len(program))):
        queues[program[place].resource].append(place)
    started, ended, left = dict[int, float](), dict[int, float](), dict[int, float]()
    now = 0.0
    while len(ended) < len(program):
        if _begin(program, queues, started, ended, left, now):
            continue  # tasks of no length let others begin at the same moment
        speeds = {place: _speed(program[place].resource, left, program, kept or {}) for place in left}
        step = min(left[place] / speeds[place] for place in left)
        now += step
        for place, speed in speeds.items():
            left[place] -= step * speed
        # Whatever rounding leaves of the first to end, it has ended.
        done = [p for p in left if left[p] <= 1e-12 * max(program[p].seconds, 1e-9)]
        for place in done:
            del left[place]
            ended[place] = now
    return [Placed(task, started[place], ended[place]) for place, task in enumerate(program)]


def _begin(
    program: Sequence[Task],
    queues: dict[str, list[int]],
    started: dict[int, float],
    ended: dict[int, float],
    left: dict[int, float],
    now: float,
) -> bool:
    """Begin what can begin now; whether any of it has ended at once."""
    busy, at_once = {program[place].resource for place in left}, False
    for resource, queue in queues.items():
        if not queue or resource in busy or any(other not in ended for other in program[queue[-1]].after):
            continue
        place = queue.pop()
        started[place] = now
        if program[place].seconds > 0:
            left[place] = program[place].seconds
        else:
            ended[place] = now
            at_once = True
    return at_once


def _speed(resource: str, left: Iterable[int], program: Sequence[Task], kept: Kept) -> float:
    speed = 1.0
    for other in {program[place].resource for place in left} - {resource}:
        speed *= kept.get((resource, other), 1.0)
    return speed


def _check(program: Sequence[Task]) -> None:
    for place, task in enumerate(program):
        if any(not 0 <= other < place for other in task.after):
            raise ValueError(f"task {place} ({task.name}) waits for a task that is not before it: {task.after}")
        if not task.seconds >= 0:
            raise ValueError(f"task {place} ({task.name}) takes {task.seconds} seconds")


def makespan(placed: Iterable[Placed]) -> float:
    """When all have ended, in seconds."""
    return max((each.end for each in placed), default=0.0)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The time that they cover together, as intervals that do not touch, ascending."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Of intervals as `union` gives them, the time that others, likewise, do not cover."""
    left: list[Interval] = []
    for start, end in intervals:
        for begin, finish in others:
            if finish <= start or begin >= end:
                continue
            if begin > start:
                left.append((start, begin))
            start = finish
            if start >= end:
                break
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    """Seconds."""
    return sum(end - start for start, end in intervals)
