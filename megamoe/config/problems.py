"""A finding about a configuration, and the one error that reports all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megamoe.common.errors import ConfigError, MegamoeError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: dotted field to look at first; empty where the problem is a file's, not a field's.
        what: one sentence, with the offending values in it.
        related: other fields the verdict rests on. A rule is not reported while one of its fields is itself
            invalid, because it would then be judging a default that the user never chose.
        source: file and line or override that set the field, for the reader; empty if a default.
    """

    path: str
    what: str
    related: tuple[str, ...] = ()
    source: str = ""

    def render(self) -> str:
        """The problem as one line: `path: what (source)`."""
        head = f"{self.path}: " if self.path else ""
        tail = f" ({self.source})" if self.source else ""
        return f"{head}{self.what}{tail}"


def raise_all(
    problems: Sequence[Problem], *, todo: str, kind: type[MegamoeError] = ConfigError, title: str = ""
) -> None:
    """Raise one error of type `kind` with every problem, numbered, under `title`; return if there is none."""
    if not problems:
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"  {number}. {problem.render()}" for number, problem in enumerate(problems, start=1)]
    raise kind("\n".join([title or f"The configuration has {count}:", *lines]), todo=todo)


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None where nothing is close enough to be a likely slip."""
    matches = difflib.get_close_matches(name.lower(), list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def nearest_divisor(whole: int, wanted: int) -> int:
    """The divisor of `whole` closest to `wanted`, the smaller one of two."""
    divisors = (part for part in range(1, whole + 1) if whole % part == 0)
    return min(divisors, key=lambda part: (abs(part - wanted), part))


def nearest_multiple(part: int, wanted: int) -> int:
    """The multiple of `part` closest to `wanted` and not 0, the larger one of two."""
    return max(1, (2 * wanted + part) // (2 * part)) * part
