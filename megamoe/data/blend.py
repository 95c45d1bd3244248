"""Blending of sources: which source sample number n comes from, with exact quotas at every n.

The task is the chairman assignment problem: give every position to one of k sources so that after n positions
each source s with share w_s has been used within 1 of n·w_s. Always taking the source with the largest
deficit does not keep that promise for many sources; Tijdeman's rule (The chairman assignment problem,
Discrete Mathematics 32, 1980) does: with d = 1/(2k-2), a source may be used once its deficit has reached d,
and among those the one whose deficit would pass 1-d first is used. All of it is integer arithmetic.

Shares are rational, so the sequence repeats after the sum of the reduced integer shares. One period is
computed once; any sample is then found by a division and a look-up, at any distance from the start.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from megamoe.common.errors import DataError

MAX_PERIOD = 1_000_000
Positions = npt.NDArray[np.int64]


class Blend:
    """A fixed sequence of sources.

    Args:
        weights: one positive number per source, taken as the decimal fraction that was written.

    Attributes:
        shares: reduced integer share of each source within one period.
        period: their sum; source s has exactly shares[s] of every `period` samples.

    Raises:
        DataError: the weights have so many digits that a period would exceed MAX_PERIOD.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = _integer_shares(weights)
        self.period = sum(self.shares)
        self._sources = _tijdeman(self.shares)
        self._within = np.empty(self.period, dtype=np.int64)
        for source, share in enumerate(self.shares):
            self._within[self._sources == source] = np.arange(share)

    def locate(self, samples: npt.ArrayLike) -> tuple[Positions, Positions]:
        """Sample numbers [N] → (source [N], how often that source was used before [N])."""
        rounds, position = np.divmod(np.asarray(samples, dtype=np.int64), self.period)
        source = self._sources[position]
        return source, rounds * np.asarray(self.shares, dtype=np.int64)[source] + self._within[position]


def _integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    # The shortest decimal that reads back as the same float: 0.1 means one tenth, not its binary neighbour.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    shares = tuple(share // gcd(*whole) for share in whole)
    if sum(shares) > MAX_PERIOD:
        raise DataError(
            "The weights of data.sources are too finely graded to be kept exactly.",
            got=", ".join(str(weight) for weight in weights),
            expected=f"weights whose pattern repeats within {MAX_PERIOD:,} samples (here: {sum(shares):,})",
            todo="round the weights to four or five digits",
        )
    return shares


def _tijdeman(shares: Sequence[int]) -> Positions:
    """One period of sources, int64 [sum of shares]."""
    period, count = sum(shares), len(shares)
    if count == 1:
        return np.zeros(period, dtype=np.int64)
    unit = 2 * count - 2  # 1/d
    sources = np.empty(period, dtype=np.int64)
    waiting = [(_release(0, share, period, unit), source, 0) for source, share in enumerate(shares)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for position in range(1, period + 1):
        while waiting and waiting[0][0] <= position:
            _, source, used = heapq.heappop(waiting)
            heapq.heappush(ready, (_deadline(used, shares[source], period, unit), source, used))
        _, source, used = heapq.heappop(ready)
        sources[position - 1] = source
        heapq.heappush(waiting, (_release(used + 1, shares[source], period, unit), source, used + 1))
    return sources


def _release(used: int, share: int, period: int, unit: int) -> int:
    """First position n at which n·share/period - used has reached 1/unit."""
    return -(-(used * unit + 1) * period // (unit * share))


def _deadline(used: int, share: int, period: int, unit: int) -> int:
    """Last position for use number `used`: one after the last at which the deficit is within 1 - 1/unit."""
    return ((used + 1) * unit - 1) * period // (unit * share) + 1
