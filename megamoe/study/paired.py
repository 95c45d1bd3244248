"""Statistics over seeds: mean, deviation, and differences between two arms of the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
"""97.5 % quantiles of Student's distribution with 1 to 30 degrees of freedom."""


class Summary(NamedTuple):
    """Of one arm over its seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""
    seeds: int


class Difference(NamedTuple):
    """An arm minus the baseline, over the seeds that both have."""

    mean: float
    low: float | None
    high: float | None
    """Two-sided 95 % interval of the mean; None for one seed."""
    seeds: int

    def verdict(self, lower_is_better: bool = True) -> str:
        """In words, as far as the interval allows."""
        if not math.isfinite(self.mean):
            return "a run diverged: no verdict"
        if self.low is None or self.high is None:
            return "one seed only: no verdict"
        if self.low <= 0 <= self.high:
            return "no difference seen at 95 %"
        return "better" if (self.mean < 0) == lower_is_better else "worse"


def quantile_975(degrees: int) -> float:
    """97.5 % quantile of Student's distribution."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    # Abramowitz and Stegun 26.7.5, off by less than 1e-5 from 31 degrees on.
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def summary(values: Sequence[float]) -> Summary:
    """Of at least one value; without a deviation if a value is not finite."""
    several = len(values) > 1 and all(map(math.isfinite, values))
    return Summary(statistics.fmean(values), statistics.stdev(values) if several else None, len(values))


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Mean paired difference arm - baseline; None where they share no seed.

    Args:
        arm, baseline: value by seed.
    """
    pairs = [arm[seed] - baseline[seed] for seed in arm if seed in baseline]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) == 1 or not math.isfinite(mean):  # a diverged run counts: to leave it out would flatter its arm
        return Difference(mean, None, None, len(pairs))
    half = quantile_975(len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half, len(pairs))


def ratio(arm: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """Mean over seeds of arm / baseline; None where they share no seed or the baseline has a zero."""
    pairs = [(arm[seed], baseline[seed]) for seed in arm if seed in baseline]
    if not pairs or any(base == 0 for _, base in pairs):
        return None
    return statistics.fmean(value / base for value, base in pairs)
