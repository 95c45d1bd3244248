"""The parity suite's findings as rows of a table, as remarks, and as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megamoe.config.load import dump_config
from megamoe.testing.parity_cases import Case, Plan
from megamoe.testing.parity_judge import Finding, Outcome

KINDS = ("loss", "auxiliary", "norm", "gradient", "weight", "exp_avg", "exp_avg_sq", "statistic")
CONDITIONS = ("zero", "router", "capacity", "precision")


class Table(NamedTuple):
    """A table of texts, and what is the same in all of its rows and therefore stands above it."""

    heading: str
    header: list[str]
    rows: list[list[str]]


def table(plan: Plan, outcome: Outcome) -> Table:
    """One row per case: the largest error of each kind, the verdict, and where the error nearest to its bound is."""
    varied = [name for name in CONDITIONS if len({condition(case, name) for case in plan.cases}) > 1]
    kinds = [kind for kind in KINDS if any(kind in finding.errors for finding in outcome.findings)]
    same = (f"{name} {condition(plan.cases[0], name)}" for name in CONDITIONS if name not in varied)
    heading = f"Largest relative errors against one process, {', '.join([f'{plan.steps} steps', *same])}:"
    header = ["layout", "ranks", *varied, *kinds, "flips", "verdict", "worst"]
    return Table(heading, header, [_row(finding, varied, kinds) for finding in outcome.findings])


def _row(finding: Finding, varied: Sequence[str], kinds: Sequence[str]) -> list[str]:
    case, worst = finding.case, finding.worst()
    errors = [f"{finding.errors[kind].value:.1e}" if kind in finding.errors else "" for kind in kinds]
    where = f"{worst} of {finding.errors[worst].where}" if worst and finding.errors[worst].where else worst
    conditions = [condition(case, name) for name in varied]
    flips = str(finding.flips) if finding.bounds else ""
    return [case.layout.name, str(case.layout.ranks), *conditions, *errors, flips, finding.verdict, where]


def condition(case: Case, name: str) -> str:
    """One of the case's `CONDITIONS`."""
    return str(case.zero_stage) if name == "zero" else str(getattr(case.setting, name))


def remarks(plan: Plan, outcome: Outcome) -> Iterator[str]:
    """What the table cannot say: why a case was refused, what a verdict rests on, whether clipping was active."""
    refusals: dict[str, int] = {}
    for finding in outcome.findings:
        if finding.verdict == "refused":
            refusals[finding.note] = refusals.get(finding.note, 0) + 1
        elif finding.note:
            yield f"{finding.verdict}: {finding.case}: {finding.note}"
    for note, number in refusals.items():
        yield f"refused ({number} case{'s' if number > 1 else ''}): {note}"
    for setting, steps in outcome.clipped.items():
        if steps == 0:
            yield f"clipping was never active with {', '.join(setting)}, and so was not tested: lower gradient_clipping"


def summary(outcome: Outcome) -> str:
    """How many cases got which verdict."""
    verdicts = [finding.verdict for finding in outcome.findings]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))


def as_data(plan: Plan, outcome: Outcome, conditions: dict[str, Any], left_out: Sequence[str]) -> dict[str, Any]:
    """Everything, for a JSON file."""
    return {
        "report": "parity",
        "steps": plan.steps,
        "conditions": conditions,
        "config": dump_config(next(iter(plan.references.values()))),
        "clipped_steps": {", ".join(setting): steps for setting, steps in outcome.clipped.items()},
        "left_out": list(left_out),
        "results": [_as_data(finding) for finding in outcome.findings],
    }


def _as_data(finding: Finding) -> dict[str, Any]:
    case = finding.case
    return {
        "layout": case.layout.name,
        "ranks": case.layout.ranks,
        "zero_stage": case.zero_stage,
        **case.setting._asdict(),
        "verdict": finding.verdict,
        "note": finding.note,
        "flips": finding.flips,
        "errors": {kind: {**error._asdict(), "bound": finding.bounds[kind]} for kind, error in finding.errors.items()},
        "seconds": finding.seconds,
    }
