"""Reports of measurements: JSON for programs, a markdown table beside it for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megamoe.common import strict_json


def write(report: dict[str, Any], markdown: str, path: Path) -> list[Path]:
    """Write `path` (JSON) and the same name with the suffix .md; returns both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(strict_json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    return [path, path.with_suffix(".md")]


def target(name: str, limit: float, value: float, *, at_least: bool = False) -> dict[str, Any]:
    """A promise (`value` at most `limit`, or at least), what was reached, and whether it holds."""
    holds = value >= limit if at_least else value <= limit
    return {"target": name, "at": "least" if at_least else "most", "limit": limit, "value": value, "holds": holds}


def as_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def in_words(values: dict[str, Any]) -> str:
    """A spread as `median (min to max)`."""
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def closing(report: dict[str, Any]) -> list[str]:
    """What every report ends with: targets, conditions, how to repeat it."""
    rows = [
        (t["target"], f"at {t['at']} {t['limit']:.2f}", f"{t['value']:.2f}", "yes" if t["holds"] else "**no**")
        for t in report["targets"]
    ]
    where = report["conditions"]
    shares = where["others_before_rounds"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in where["packages"].items())
    conditions = (
        f"{where['date']}, {where['cpu']} ({', '.join(where['cpu_flags'])}), {where['cpus']} CPUs, load average before "
        f"{where['load_average'][0]:.1f}, Python {where['python']}, {versions}; allocator: {where['allocator']}; "
        f"CPUs used by other processes right before a round: {shares['median']:.0%} (at most {shares['max']:.0%})."
    )
    targets = [as_table(("target", "limit", "reached", "holds"), rows)] if rows else []
    return [*targets, conditions, *([where["note"]] if where["note"] else [])]
