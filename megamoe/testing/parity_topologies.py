"""Names of layouts such as `tp2-ep4-pp2`, and the ladder of layouts that `python -m megamoe parity` climbs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm, prod

from megamoe.common.errors import TopologyError
from megamoe.config.problems import nearest
from megamoe.parallel.topology import Topology

AXES = ("dp", "tp", "pp", "cp", "ep", "etp", "edp")
LADDER = (
    "dp2",
    "ep2",
    "ep4",
    "ep2-edp2",
    "tp2",
    "tp2-ep4",
    "tp2-ep2-etp2",
    "pp2",
    "pp2-ep2",
    "pp2-tp2-ep2",
    "cp2-ep2",
)
"""Every kind of parallelism alone and the ways in which they meet, on few ranks."""
LARGE = ("etp2", "cp2", "cp2-etp2-ep2", "cp2-tp2-ep4", "pp2-cp2-ep2", "pp2-etp2", "pp2-tp2-dp2-ep4")
"""Besides, where time does not matter."""
RULES = """\
A layout is named by its degrees, in any order: tp2-ep4-pp2. Axes: dp, tp, pp, cp, ep, etp, edp; those left out are 1,
but for dp and edp, which follow from the number of ranks:
  dp given    pp * dp * cp * tp ranks
  edp given   pp * edp * ep * etp ranks (with dp given as well, both must be the same)
  neither     the fewest that fit: pp * lcm(cp * tp, ep * etp)
so tp2-ep4 is 4 ranks (dp 2, folded), ep2-edp2 is 4, and tp2-ep2-etp2 is 4."""


@dataclass(frozen=True)
class Layout:
    """A topology by the name that the user gave it."""

    name: str
    topology: Topology

    @property
    def ranks(self) -> int:
        """World size."""
        return self.topology.world_size


def parse(name: str) -> Layout:
    """The layout that a name means, by `RULES`.

    Raises:
        TopologyError: an unknown or repeated axis, a word that is none, degrees that do not go together.
    """
    degrees: dict[str, int] = {}
    for word in name.split("-"):
        axis, degree = _axis(name, word)
        if axis in degrees:
            raise TopologyError(f"The layout {name} gives {axis} twice.", got=word, expected="each axis once")
        degrees[axis] = degree
    return Layout(name, _topology(name, degrees))


def _axis(name: str, word: str) -> tuple[str, int]:
    matched = re.fullmatch(r"([a-z]+)([1-9]\d*)", word.lower())
    if matched is not None and matched[1] in AXES:
        return matched[1], int(matched[2])
    like = nearest(matched[1], AXES) if matched is not None else None
    raise TopologyError(
        f"The layout {name or repr(name)} cannot be read.",
        got=repr(word),
        expected=f"one of {', '.join(AXES)} with a number of at least 1, as in tp2-ep4-pp2",
        todo=f"did you mean {like}?" if like else "python -m megamoe parity --help shows the rules of these names",
    )


def _topology(name: str, degrees: dict[str, int]) -> Topology:
    parts = {axis: degree for axis, degree in degrees.items() if axis not in ("dp", "edp")}
    worlds = {
        " * ".join(f"{axis} {degrees.get(axis, 1)}" for axis in grid): prod(degrees.get(axis, 1) for axis in grid)
        for free, grid in (("dp", ("pp", "dp", "cp", "tp")), ("edp", ("pp", "edp", "ep", "etp")))
        if free in degrees
    }
    if len(set(worlds.values())) > 1:
        raise TopologyError(
            f"The layout {name} contradicts itself.",
            got="; ".join(f"{product} = {ranks}" for product, ranks in worlds.items()),
            expected="the same number of ranks by both",
            todo="leave out dp or edp: each follows from the other",
        )
    try:
        return Topology(next(iter(worlds.values()), _fewest(parts)), **parts)
    except TopologyError as error:
        raise TopologyError(
            f"The layout {name} does not fit together: {error.what}.",
            got=error.got,
            expected=error.expected,
            todo="change its degrees, or leave out dp and edp for the fewest ranks that fit",
        ) from error


def _fewest(degrees: dict[str, int]) -> int:
    pp, cp, tp, ep, etp = (degrees.get(axis, 1) for axis in ("pp", "cp", "tp", "ep", "etp"))
    return pp * lcm(cp * tp, ep * etp)


def name_of(topology: Topology) -> str:
    """The shortest name, which `parse` reads back."""
    degrees = {axis: getattr(topology, axis) for axis in ("pp", "cp", "tp", "ep", "etp")}
    words = [f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1]
    if topology.world_size != _fewest(degrees) or not words:
        words.append(f"dp{topology.dp}")
    return "-".join(words)


def degree_words(topology: Topology) -> tuple[str, ...]:
    """The degrees as overrides of a configuration; dp and edp follow from the number of ranks."""
    return tuple(f"parallel.{axis}={getattr(topology, axis)}" for axis in ("tp", "pp", "ep", "etp", "cp"))


def filling(world_size: int, names: Iterable[str] = (*LADDER, *LARGE)) -> list[Layout]:
    """The ladder on exactly so many ranks: dp fills what a rung leaves; and ep over all of them."""
    found = [Topology(world_size), Topology(world_size, ep=world_size)]
    if world_size % 2 == 0:
        found.append(Topology(world_size, tp=2, ep=world_size))
    for rung in (parse(name).topology for name in names):
        if world_size % rung.world_size == 0:
            found.append(Topology(world_size, tp=rung.tp, pp=rung.pp, ep=rung.ep, etp=rung.etp, cp=rung.cp))
    return [Layout(name_of(topology), topology) for topology in dict.fromkeys(found)]
