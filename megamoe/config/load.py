"""From files and overrides to one checked RunConfig, with every problem reported at once.

Order: defaults < files from left to right < dotted overrides. Mappings merge, lists and values are replaced.
Where a section has variants (`moe.router`), naming another variant starts from that variant's defaults.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megamoe.config.explain import explain
from megamoe.config.fields import variant_sections
from megamoe.config.problems import Problem, raise_all
from megamoe.config.rules import RULES, Rule
from megamoe.config.run import RunConfig
from megamoe.config.sources import KeyPath, Source, read_file, read_override

Values = dict[str, Any]


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = (), base: Values | None = None) -> RunConfig:
    """The configuration that these files and overrides describe.

    Args:
        paths: YAML or JSON files, later ones win.
        overrides: `section.field=value` with YAML values; they win over files.
        base: values below all files, in place of the defaults.

    Raises:
        ConfigError: listing every unreadable file, unknown key, wrong value and broken cross-section rule.
    """
    sources = [*map(read_file, paths), *map(read_override, overrides)]
    unread = [problem for source in sources for problem in source.problems]
    values = merge(base or {}, _merged(sources[: len(paths)], sources[len(paths) :]))
    # Without what could not be read, rules would judge defaults that the user never chose.
    config, found = check(values, sources, rules=() if unread else RULES)
    raise_all([*unread, *found], todo=_advice(paths, overrides, base is not None))
    assert config is not None
    return config


def given_value(paths: Sequence[str | Path], overrides: Sequence[str], dotted: str) -> Any:
    """What files and overrides say about one field, unchecked; None where they say nothing."""
    return _get(_merged([*map(read_file, paths)], [*map(read_override, overrides)]), tuple(dotted.split(".")))


def changed(config: RunConfig, **fields: Any) -> RunConfig:
    """A copy with other values in `training`, checked as a whole.

    Raises:
        ConfigError: a rule does not hold with them.
    """
    values = config.model_dump(mode="json", exclude_unset=True)
    values["training"] = {**values.get("training", {}), **fields}
    copy, found = check(values)
    raise_all(found, todo="correct these settings")
    assert copy is not None
    return copy


def _merged(files: Sequence[Source], given: Sequence[Source]) -> Values:
    # Overrides are one layer: else the first of `moe.router.affinity=grap moe.router.type=resonance` is lost.
    layer: Values = reduce(_deep, (source.values for source in given), {})
    values: Values = reduce(merge, (*(file.values for file in files), layer), {})
    return values


def dump_config(config: RunConfig) -> Values:
    """`config` as JSON-able values, complete with defaults; loading them gives an equal configuration."""
    return config.model_dump(mode="json")


def _advice(paths: Sequence[str | Path], overrides: Sequence[str], on_base: bool) -> str:
    words = ["python", "-m", "megamoe", "check", *map(str, paths), *overrides]
    if on_base:  # which `check` does not know
        words = ["python", "launch/finetune.py", "--dry-run", "--config", *map(str, paths), *overrides]
    command = shlex.join(words)
    return f"correct them and look at the result with: {command}"


def _deep(base: Any, top: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(top, dict):
        return top
    return {**base, **{key: _deep(base[key], value) if key in base else value for key, value in top.items()}}


def merge(base: Values, top: Values) -> Values:
    """`top` laid over `base`, as a copy. A section whose variant changes drops the old variant's keys."""
    base = dict(base)
    for dotted, (discriminator, default) in variant_sections().items():
        keys = tuple(dotted.split("."))
        old, new = _get(base, keys), _get(top, keys)
        if not isinstance(new, dict):
            continue
        old_variant = old.get(discriminator, default) if isinstance(old, dict) else default
        new_variant = new.get(discriminator, old_variant)
        kept = old if isinstance(old, dict) and new_variant == old_variant else {}
        base = _put(base, keys, {**kept, discriminator: new_variant})
    return _deep(base, top)


def _get(values: Any, keys: KeyPath) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _put(values: Values, keys: KeyPath, value: Any) -> Values:
    """A copy of `values` with `value` at `keys`, through new sections; unchanged if one is a plain value."""
    inner = values.get(keys[0], {}) if len(keys) > 1 else None
    if len(keys) > 1 and not isinstance(inner, dict):
        return values
    return {**values, keys[0]: _put(inner or {}, keys[1:], value) if len(keys) > 1 else value}


def _without(values: Any, keys: KeyPath) -> Any:
    """A copy of `values` without the entry at `keys`, so that its default applies; a list goes as a whole."""
    if not isinstance(values, dict) or keys[0] not in values:
        return values
    inner = values[keys[0]]
    rest = {key: value for key, value in values.items() if key != keys[0]}
    if len(keys) == 1 or not isinstance(inner, dict):
        return rest
    return {**rest, keys[0]: _without(inner, keys[1:])}


def check(
    values: Values, sources: Sequence[Source] = (), rules: Sequence[Rule] = RULES
) -> tuple[RunConfig | None, list[Problem]]:
    """Validate merged values: the configuration (None if it has problems) and all problems.

    The rules across sections are judged even where single fields are wrong: those fields are set aside for
    their defaults, and rules that rest on one of them are left out.
    """
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        findings = explain(error, values)
    else:
        problems = [_placed(problem, sources) for rule in rules for problem in rule(config)]
        return (None if problems else config), problems
    problems = [_placed(finding.problem, sources) for finding in findings]
    rest: Any = values
    for finding in findings:
        rest = _without(rest, finding.keys)
    doubtful = {path for finding in findings for path in (finding.problem.path, *finding.problem.related)}
    beside = [_placed(problem, sources) for problem in _rules_beside(rest, doubtful, rules)]
    return None, [*problems, *beside]


def _rules_beside(values: Values, doubtful: set[str], rules: Sequence[Rule]) -> list[Problem]:
    """Problems of the rules that rest on none of the `doubtful` paths, nor on anything inside them."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError:  # e.g. keys that are no strings; they are reported already
        return []

    def sound(problem: Problem) -> bool:
        paths = (problem.path, *problem.related)
        return not any(path == bad or path.startswith(f"{bad}.") for path in paths for bad in doubtful)

    found = (problem for rule in rules for problem in rule(config))
    return [problem for problem in found if sound(problem)]


def _placed(problem: Problem, sources: Sequence[Source]) -> Problem:
    """The problem with the place that last set its field, if any did."""
    keys = tuple(problem.path.split("."))
    for source in reversed(sources):
        if _mentions(source.values, keys):
            return Problem(problem.path, problem.what, problem.related, source.place(keys))
    return problem


def _mentions(values: Any, keys: KeyPath) -> bool:
    for key in keys:
        if isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            return False
    return True
