"""pydantic's errors in the words of a configuration: dotted path, what was given, the nearest valid name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megamoe.config.fields import KnownField, known_fields, siblings, variant_sections
from megamoe.config.problems import Problem, nearest

MAX_SHOWN = 80  # characters of an offending value


@dataclass(frozen=True)
class Finding:
    """A problem with the keys of its entry in the merged values."""

    problem: Problem
    keys: tuple[str, ...]


def explain(error: ValidationError, values: dict[str, Any]) -> list[Finding]:
    """The findings in what pydantic says of `values`."""
    items = error.errors(include_url=False)
    places = [item["loc"] for item in items]

    def follows(item: ErrorDetails) -> bool:
        """A list that is too short only because pydantic left out its faulty elements."""
        loc = item["loc"]
        return item["type"] == "too_short" and any(p[: len(loc)] == loc != p for p in places)

    return [_explain_one(item, values) for item in items if not follows(item)]


def _explain_one(error: ErrorDetails, values: dict[str, Any]) -> Finding:
    keys = _keys(error["loc"], values)
    if error["type"] == "extra_forbidden":
        return Finding(_unknown_key(keys, values), keys)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_variant(keys, error)
    shown = f"{_sentence(error)}, got {_shown(error['input'])}"
    if error["type"] == "missing":
        shown = "is required and not given"
    return Finding(Problem(".".join(keys), shown), keys)


def _keys(loc: tuple[int | str, ...], values: Any) -> tuple[str, ...]:
    """pydantic's location without the variant names that it inserts, which are no keys of ours."""
    keys: list[str] = []
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        if part == "[key]":  # the key itself is at fault; its path says so
            continue
        if isinstance(values, dict) and part not in values and not is_last:
            continue
        keys.append(str(part))
        if isinstance(values, dict):
            values = values.get(part)
        else:
            values = values[part] if isinstance(values, list) and isinstance(part, int) else None
    return tuple(keys)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _sentence(error: ErrorDetails) -> str:
    """The requirement, as a predicate of the field."""
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a section with keys of its own"
    text = error["msg"].replace("Input should be", "must be").replace("Input should", "must")
    close = None
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        close = nearest(error["input"], str(error.get("ctx", {}).get("expected", "")).split("'")[1::2])
    return f"{text} (did you mean {close!r}?)" if close else text


def _unknown_variant(keys: tuple[str, ...], error: ErrorDetails) -> Finding:
    path = ".".join(keys)
    discriminator = variant_sections()[path][0]
    tags = sorted({f.owner for f in known_fields() if f.path == f"{path}.{discriminator}"})
    given = error["input"].get(discriminator) if isinstance(error["input"], dict) else error["input"]
    close = nearest(given, tags) if isinstance(given, str) else None
    hint = f" (did you mean {close!r}?)" if close else ""
    what = f"must be one of {', '.join(map(repr, tags))}{hint}, got {_shown(given)}"
    # The whole section is doubtful: its other keys may belong to any variant.
    return Finding(Problem(f"{path}.{discriminator}", what, (path,)), keys)


def _unknown_key(keys: tuple[str, ...], values: dict[str, Any]) -> Problem:
    """What to say of a key that no field has, best guess first."""
    path, name = ".".join(keys), keys[-1]
    general = ".".join("*" if key.isdecimal() else key for key in keys)
    section = general.rpartition(".")[0]
    other_variant = next((f for f in known_fields() if f.path == general and f.owner), None)
    if other_variant is not None:
        discriminator = variant_sections()[section][0]
        what = f"unknown key here: it belongs to {section}.{discriminator}: {other_variant.owner}"
        return Problem(path, what)
    if close := nearest(name, siblings(general)):
        likely = ".".join((*keys[:-1], close))
        return Problem(path, f"unknown key; did you mean {likely}?", (likely,))
    if elsewhere := _elsewhere(name):
        return Problem(path, f"unknown key here; did you mean {elsewhere.path}?", (elsewhere.path,))
    known = ", ".join(siblings(general))
    return Problem(path, f"unknown key; {section or 'a configuration'} has: {known}")


def _elsewhere(name: str) -> KnownField | None:
    """The field of that name, or nearest to it, in another section."""
    by_name: dict[str, KnownField] = {}
    for field in known_fields():
        by_name.setdefault(field.path.rpartition(".")[2], field)
    return by_name.get(name) or by_name.get(nearest(name, by_name) or "")
