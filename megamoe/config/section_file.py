"""A file that holds one section and is read as strictly as a configuration: a cluster's rates, a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from megamoe.config.base import Section
from megamoe.config.problems import Problem, nearest, raise_all
from megamoe.config.sources import Source, read_file

Kind = TypeVar("Kind", bound=Section)


def read_section(
    path: str | Path,
    kind: type[Kind],
    check: Callable[[Kind, Source], Sequence[Problem]],
    *,
    what: str,
    todo: str,
) -> Kind:
    """Read a file.

    Args:
        kind: the section.
        check: what its fields, each right by itself, get wrong together.
        what: the file's name in errors, as in "The study".
        todo: how to go on.

    Raises:
        ConfigError: listing everything that is wrong with it.
    """
    source = read_file(path)
    raise_all(source.problems, todo=todo, title=f"{what} cannot be read:")
    try:
        section = kind.model_validate(source.values)
    except ValidationError as error:
        keys = list(_keys(kind))
        problems = [_problem(dict(entry), source, keys) for entry in error.errors()]
        raise_all(problems, todo=todo, title=f"{what} has {len(problems)} problem(s):")
        raise
    raise_all(check(section, source), todo=todo, title=f"{what} contradicts itself:")
    return section


def _problem(entry: dict[str, Any], source: Source, known: Sequence[str]) -> Problem:
    keys = tuple(str(key) for key in entry["loc"] if key != "[key]")
    what = f"{entry['msg']}, got {entry['input']!r}"
    if entry["type"] == "extra_forbidden":
        guess = nearest(keys[-1], known)
        what = f"unknown key{f'; did you mean {guess}?' if guess else ''}"
    elif entry["type"] == "missing":
        what = "is required and not given"
    return Problem(".".join(keys), what, source=source.place(keys))


def _keys(kind: Any) -> Iterator[str]:
    """Names of the fields of a section and of all below it."""
    if isinstance(kind, type) and issubclass(kind, Section):
        for name, field in kind.model_fields.items():
            yield name
            yield from _keys(field.annotation)
    for part in get_args(kind):
        yield from _keys(part)
