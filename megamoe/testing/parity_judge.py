"""What came of comparing a layout with one process: errors, their bounds, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megamoe.config.run import RunConfig
from megamoe.testing import parity
from megamoe.testing.parity import EXACT, Error, Flip, ParityRun, Tolerance
from megamoe.testing.parity_cases import Case, Plan, Setting, in_fp32, one_process_of

Verdict = Literal["equal", "flip", "miss", "refused", "error"]
FAILURES = ("miss", "error")
TOLERANCES = {"fp32": Tolerance(), "fp64": EXACT}
ALLOWED_BF16 = 2.0
"""Times the error of one process in bf16."""

References = Mapping[Setting, ParityRun]


@dataclass(frozen=True)
class Measurement:
    """A comparison with one process."""

    errors: dict[str, Error]
    """By kind (`parity.errors_of`); of the steps before the first flip, if there is one that counts."""
    flip: Flip | None = None
    """The one that has to be a near tie."""
    flips: int = 0
    """How many tokens were routed otherwise."""


@dataclass(frozen=True)
class Finding:
    """What came of a case."""

    case: Case
    verdict: Verdict
    note: str = ""
    errors: dict[str, Error] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    flips: int = 0
    """Choices of tokens that differ from those of one process."""
    seconds: float = 0.0

    def worst(self) -> str:
        """The kind whose error is the largest share of its bound; empty: nothing was compared."""
        return max(self.errors, key=lambda kind: self.errors[kind].value / self.bounds[kind], default="")


@dataclass(frozen=True)
class Outcome:
    """What came of a plan."""

    findings: list[Finding]
    clipped: dict[Setting, int]
    """In how many steps one process clipped its gradients."""

    def failed(self) -> bool:
        """Whether anything missed."""
        return any(finding.verdict in FAILURES for finding in self.findings)


def outcome_of(plan: Plan, findings: list[Finding], references: References) -> Outcome:
    """The findings, and what their references were like."""

    def clipped(setting: Setting, config: RunConfig) -> int:
        return sum(norm > config.training.gradient_clipping > 0 for norm in references[setting].norms)

    return Outcome(findings, {setting: clipped(setting, config) for setting, config in plan.references.items()})


def flips_count(setting: Setting) -> bool:
    """Not in bf16, where many tokens are as near to other experts as its rounding goes, on one process as well."""
    return setting.precision != "bf16"


def compared_with(setting: Setting) -> Setting:
    """The setting of the one process."""
    return in_fp32(setting) if setting.precision == "bf16" else setting


def measurement_of(run: ParityRun, reference: ParityRun, flips_count: bool) -> Measurement:
    """Compare two runs; if flips count, up to the first one."""
    flips = parity.routing_flips(run, reference)
    flip = parity.first_flip(flips) if flips_count else None
    return Measurement(parity.errors_of(run, reference, flip.step if flip is not None else None), flip, len(flips))


def worst_of(measurements: list[Measurement]) -> Measurement:
    """Of all ranks, which share their routing decisions; where they differ, errors say on which rank."""
    errors: dict[str, Error] = {}
    for kind in measurements[0].errors:
        values = [measurement.errors[kind] for measurement in measurements]
        worst = max(range(len(values)), key=lambda rank: values[rank].value)
        alone = any(error.value != values[worst].value for error in values)
        errors[kind] = values[worst]._replace(where=f"{values[worst].where}, rank {worst}") if alone else values[worst]
    return replace(measurements[0], errors=errors)


def finding_of(case: Case, measurement: Measurement, references: References) -> Finding:
    """The verdict on a case that ran."""
    bounds = bounds_of(case.setting, references)
    tolerance = TOLERANCES[compared_with(case.setting).precision]
    verdict, note = judge(measurement, bounds, tolerance.near_tie)
    return Finding(case, verdict, note, measurement.errors, bounds, measurement.flips)


def bounds_of(setting: Setting, references: References) -> dict[str, float]:
    """What the errors of a setting may be.

    Of bf16, twice what one process in bf16 differs from fp32 by, the largest of its runs: another order of sums is
    another rounding, and it may add up no worse than that.
    """
    if setting.precision != "bf16":
        return TOLERANCES[setting.precision].bounds()
    fp32 = references[in_fp32(setting)]
    runs = [parity.errors_of(references[each], fp32) for each in one_process_of(setting) if each in references]
    least = TOLERANCES["fp32"].bounds()
    return {kind: max(ALLOWED_BF16 * max(run[kind].value for run in runs), least[kind]) for kind in least}


def judge(measurement: Measurement, bounds: Mapping[str, float], near_tie: float) -> tuple[Verdict, str]:
    """The verdict, and what a reader needs to know with it.

    A flip passes if it is a near tie and everything before it agrees, of which there has to be something.
    """
    broken = [
        f"{kind} {error.value:.1e} > {bounds[kind]:.1e} at {error.where}"
        for kind, error in measurement.errors.items()
        if not error.value <= bounds[kind]
    ]
    flip = measurement.flip
    if flip is None:
        return ("miss", "; ".join(broken)) if broken else ("equal", "")
    if not flip.margin < near_tie:
        broken.append(f"no near tie, which is below {near_tie:.0e}")
    elif flip.step == 0:
        broken.append("with nothing before it to compare: take another training.seed")
    note = f"flip at {flip}"
    return ("miss", "; ".join([note, *broken])) if broken else ("flip", f"{note}; compared up to step {flip.step}")
