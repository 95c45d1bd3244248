"""One axis of parallelism as a module sees it."""

from __future__ import annotations

from typing import NamedTuple

from megamoe.parallel.groups import ProcessGroup, RankGroup


class Axis(NamedTuple):
    """This rank's place among the ranks that share something. The default is alone: nothing is communicated."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


SINGLE = Axis()
"""No other ranks."""


def axis_of(group: RankGroup) -> Axis:
    """The axis of a group of the run."""
    return Axis(group.size, group.place, group.handle) if group.size > 1 else SINGLE
