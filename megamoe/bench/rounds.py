"""Timing in turns, and what the times say."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

from tqdm import tqdm

Key = TypeVar("Key")


class Spread(NamedTuple):
    """Median, smallest and largest of the values of all rounds."""

    median: float
    min: float
    max: float


def in_turns(
    contestants: Mapping[Key, Callable[[], None]],
    rounds: int,
    warmup: int,
    before_round: Callable[[], None] = lambda: None,
    between: Callable[[Key], None] = lambda key: None,
    title: str = "",
    rotate: bool = False,
) -> dict[Key, list[float]]:
    """Seconds that each contestant took in each round: A B C A B C ..., after untimed rounds of the same kind.

    Args:
        before_round: called untimed before every round.
        between: called untimed after each turn, to put away what the turn left behind.
        title: of the progress bar, which shows on a terminal only.
        rotate: whether each round begins with another one, so that no place in a round is anyone's own.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in contestants}
    for number in tqdm(range(warmup + rounds), desc=title, unit="round", disable=None, leave=False):
        before_round()
        turns = list(contestants.items())
        first = number % len(turns) if rotate else 0
        for key, run in turns[first:] + turns[:first]:
            began = time.perf_counter()
            run()
            elapsed = time.perf_counter() - began
            between(key)
            if number >= warmup:
                seconds[key].append(elapsed)
    return seconds


def spread(values: Iterable[float]) -> Spread:
    """Median, smallest and largest."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Between which values the median of ever more rounds would lie, in 95 of 100 such measurements.

    By order statistics, so without a guess at how the values are distributed: in n rounds, the number of those below
    the true median is binomial (n, 1/2), and its normal approximation is used. Up to 7 rounds that is all of them,
    and below 6 they hold the median less often.
    """
    ordered = sorted(values)
    n = len(ordered)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return ordered[low], ordered[n - 1 - low]


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> Spread:
    """Spread of the ratios of each round."""
    return spread(a / b for a, b in zip(numerators, denominators, strict=True))
