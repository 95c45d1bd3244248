"""Which rank does what: arithmetic on world size and degrees, without torch.

The ranks 0 .. world size - 1 are one range, read in two shapes (last axis fastest):

- dense grid (pp, dp, cp, tp) for everything that is not a routed expert;
- expert grid (pp, edp, ep, etp) for routed experts.

A stage's ranks are therefore the same in both, tp neighbours are neighbours on the machine, and an
expert-parallel group is a block of consecutive ranks (for etp 1), inside one node where it fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod

from megamoe.common.errors import TopologyError

DENSE_AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "etp")
MAX_LISTED = 16  # ranks or groups that `describe` lists

Group = tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """World size and degrees; dp = world size / (pp * cp * tp) and edp = world size / (pp * ep * etp) follow.

    Raises:
        TopologyError: where a degree is below 1 or does not divide, with the arithmetic.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("world_size", "tp", "pp", "ep", "etp", "cp"):
            if getattr(self, name) < 1:
                raise TopologyError(f"{name} must be at least 1", got=str(getattr(self, name)))
        for names in (("pp", "cp", "tp"), ("pp", "ep", "etp")):
            self._must_divide(names)

    def _must_divide(self, names: tuple[str, ...]) -> None:
        needed = prod(getattr(self, name) for name in names)
        if self.world_size % needed:
            product = " * ".join(f"{name} {getattr(self, name)}" for name in names)
            raise TopologyError(
                f"world size {self.world_size} does not divide into {product}",
                got=f"{self.world_size} % {needed} = {self.world_size % needed}",
                expected=f"a multiple of {needed}",
                todo="start another number of ranks or change parallel.*",
            )

    @property
    def dp(self) -> int:
        """Data-parallel degree of the dense grid."""
        return self.world_size // (self.pp * self.cp * self.tp)

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.pp * self.ep * self.etp)

    def degree(self, axis: str) -> int:
        """Size of one axis of either grid."""
        self._grid((axis,))
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinates of `rank` on every axis of both grids."""
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"there is no rank {rank}", expected=f"0 to {self.world_size - 1}")
        return {**self._unravel(rank, EXPERT_AXES), **self._unravel(rank, DENSE_AXES)}

    def groups(self, *axes: str) -> tuple[Group, ...]:
        """All groups of ranks that differ only on `axes` (of one grid), ordered by their first rank.

        Together they hold each rank once. Inside a group ranks ascend, so a rank's place in its group is its
        coordinate: `groups("ep")`, `groups("dp", "cp")`.
        """
        others = [axis for axis in self._grid(axes) if axis not in axes]
        members: dict[Group, list[int]] = {}
        for rank in range(self.world_size):
            place = self._unravel(rank, self._grid(axes))
            members.setdefault(tuple(place[axis] for axis in others), []).append(rank)
        return tuple(sorted(map(tuple, members.values())))

    def group_of(self, rank: int, *axes: str) -> Group:
        """The group of `groups(*axes)` that holds `rank`."""
        return next(group for group in self.groups(*axes) if rank in group)

    def stride(self, axis: str) -> int:
        """Distance between neighbours on an axis: the ranks of its groups are that far apart."""
        grid = self._grid((axis,))
        return prod(self.degree(faster) for faster in grid[grid.index(axis) + 1 :])

    def describe(self, per_node: int = 8) -> str:
        """The map as text: both factorisations, the groups of every axis, and coordinates of the first ranks.

        Args:
            per_node: consecutive ranks on one node, as launchers place them.
        """
        return "\n".join(self._lines(per_node))

    def _grid(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        for grid in (DENSE_AXES, EXPERT_AXES):
            if set(axes) <= set(grid):
                return grid
        raise ValueError(f"axes {axes} are not of one grid: {DENSE_AXES} or {EXPERT_AXES}")

    def _unravel(self, rank: int, grid: tuple[str, ...]) -> dict[str, int]:
        place: dict[str, int] = {}
        for axis in reversed(grid):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return {axis: place[axis] for axis in grid}

    def _lines(self, per_node: int) -> Iterator[str]:
        for title, grid in (("dense", DENSE_AXES), ("expert", EXPERT_AXES)):
            product = " x ".join(f"{axis} {getattr(self, axis)}" for axis in grid)
            yield f"{title:<6} grid: {self.world_size} ranks = {product} (last fastest)"
        yield _nodes(self.world_size, per_node)
        for axis in ("tp", "cp", "etp", "ep", "dp", "edp", "pp"):
            if self.degree(axis) > 1:
                yield f"{axis} groups: {self._shape(axis)}, {self._reach(axis, per_node)}: {self._first_groups(axis)}"
        columns = (*DENSE_AXES, *EXPERT_AXES[1:])
        yield "rank |" + "".join(f"{axis:>5}" for axis in columns)
        for rank in range(min(self.world_size, MAX_LISTED)):
            place = self.coordinates(rank)
            yield f"{rank:>4} |" + "".join(f"{place[axis]:>5}" for axis in columns)
        if self.world_size > MAX_LISTED:
            yield f" ... | {self.world_size - MAX_LISTED} more ranks"

    def _shape(self, axis: str) -> str:
        size, stride = self.degree(axis), self.stride(axis)
        return f"{size} neighbours" if stride == 1 else f"{size} ranks, {stride} apart"

    def _reach(self, axis: str, per_node: int) -> str:
        """Over how many nodes the groups of an axis go."""
        nodes = [_nodes_of(group, per_node) for group in self._groups_of(axis)]
        crossing = [count for count in nodes if count > 1]
        if not crossing:
            return "inside a node"
        some = "" if len(crossing) == len(nodes) else f"{len(crossing)} of {len(nodes)} groups "
        return f"{some}across {'' if min(crossing) == max(crossing) else 'up to '}{max(crossing)} nodes"

    def _groups_of(self, axis: str) -> Iterator[range]:
        """The groups of one axis as ranges, for large worlds; `groups` holds the same."""
        stride = self.stride(axis)
        span = stride * self.degree(axis)
        for block in range(0, self.world_size, span):
            for first in range(block, block + stride):
                yield range(first, first + span, stride)

    def _first_groups(self, axis: str) -> str:
        """Groups on one line: at most 4 of them, of each at most 8 ranks."""
        shown = [" ".join(map(str, group[:8])) for group in islice(self._groups_of(axis), 4)]
        rest = " ..." if self.degree(axis) > 8 else ""
        number = self.world_size // self.degree(axis)
        return " ".join(f"[{text}{rest}]" for text in shown) + (f" and {number - 4} more" if number > 4 else "")


def _nodes(world_size: int, per_node: int) -> str:
    """The nodes that hold so many ranks, as a line."""
    full, rest = divmod(world_size, per_node)
    if full == 0 or (full == 1 and not rest):
        return f"1 node of {per_node} ranks" + ("" if full else f", {rest} in use")
    return f"{full + bool(rest)} nodes of {per_node} ranks" + (f", {rest} in use on the last" if rest else "")


def _nodes_of(group: range, per_node: int) -> int:
    """Nodes on which the ranks of a group are."""
    if group.step >= per_node:  # never two of them on one
        return len(group)
    return group[-1] // per_node - group[0] // per_node + 1  # and here it leaves out none in between
