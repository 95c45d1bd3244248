"""What a user wrote: YAML and JSON files and dotted overrides, each read into a mapping with its problems.

YAML is read by the 1.2 core schema, not PyYAML's 1.1: there `3e-4` is a string, `no` is false, `010` is eight
and `1:30` is ninety, none of which a person writing a training configuration means.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megamoe.config.problems import Problem

KeyPath = tuple[str, ...]


@dataclass
class Source:
    """One layer of a configuration.

    Attributes:
        name: file name or the override itself, as shown to the user.
        values: nested mapping of what was set.
        lines: 1-based line of every key in the file, by dotted path; empty for overrides and JSON.
        problems: what could not be read.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """Where this source set `path`: `file:line`, at the nearest key above where it has no line itself."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines[path]}" if path else self.name


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader restricted to the scalars of YAML 1.2's core schema."""


_CoreLoader.yaml_implicit_resolvers = {}  # inherit none


def _construct_int(loader: _CoreLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text, 10)


def _construct_float(loader: _CoreLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _walk(node: yaml.Node | None, path: KeyPath, source: Source, above: tuple[yaml.Node, ...] = ()) -> None:
    """Note the line of every key, and report keys given twice and aliases that contain themselves."""
    if not isinstance(node, yaml.MappingNode):
        return
    if node in above:
        source.problems.append(Problem(".".join(path), "a YAML alias refers to itself", source=source.name))
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in seen:
            place = f"{source.name}:{line}"
            source.problems.append(Problem(".".join((*path, key)), "this key is given twice", source=place))
        seen.add(key)
        source.lines[(*path, key)] = line
        _walk(value_node, (*path, key), source, (*above, node))


def _read_yaml(text: str, source: Source) -> Any:
    loader = _CoreLoader(text)
    try:
        node = loader.get_single_node()
        _walk(node, (), source)
        if source.problems or node is None:
            return {}
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _read_json(text: str, source: Source) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) < len(items):
            twice = sorted({key for key, _ in items if [k for k, _ in items].count(key) > 1})
            what = f"these keys are given twice: {', '.join(twice)}"
            source.problems.append(Problem("", what, source=source.name))
        return values

    return json.loads(text, object_pairs_hook=pairs)


def read_file(path: str | Path) -> Source:
    """Read one YAML or (`.json`) JSON file. Never raises for what a user can write; see `Source.problems`."""
    path = Path(path)
    source = Source(str(path))
    try:
        text = path.read_text(encoding="utf-8")
        values = _read_json(text, source) if path.suffix == ".json" else _read_yaml(text, source)
    except FileNotFoundError:
        source.problems.append(Problem("", f"there is no file {path}"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        source.problems.append(Problem("", f"cannot read {path}: {what}"))
    else:
        if isinstance(values, dict):
            source.values = values
        else:
            what = f"{path} holds {type(values).__name__} {values!r}, not a mapping of sections"
            source.problems.append(Problem("", what))
    return source


def read_override(text: str) -> Source:
    """Read one `a.b.c=value`; the value is YAML, so `[1, 2]`, `{type: topk}` and `null` work."""
    source = Source(text)
    dotted, equals, value_text = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        what = f"the override {text!r} is not of the form section.field=value"
        source.problems.append(Problem("", what))
        return source
    try:
        value = _read_yaml(value_text, source) if value_text.strip() else None
    except yaml.YAMLError as error:
        what = f"cannot read the value of {text!r}: {' '.join(str(error).split())}"
        source.problems.append(Problem("", what))
        return source
    source.lines.clear()
    for key in reversed(keys[1:]):
        value = {key: value}
    source.values = {keys[0]: value}
    return source
