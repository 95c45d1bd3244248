import random
from fractions import Fraction

import numpy as np
import pytest

from megamoe.common.errors import DataError
from megamoe.data.blend import Blend

RANDOM = random.Random(1)
CASES = [
    [1.0],
    [1.0, 1.0],
    [0.7, 0.3],
    [0.1, 0.2, 0.7],
    [1e-3, 1.0],
    [5.0, 2.0, 2.0, 1.0],
    [1.0] * 9,
    [3.0, 60.0, 60.0, 1.0, 5.0],
    *([round(RANDOM.uniform(0.01, 3), 2) for _ in range(k)] for k in (2, 3, 5, 8, 13, 30)),
]


def _largest_deviation(sources: np.ndarray, weights: list[float]) -> Fraction:
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    used, worst = [0] * len(shares), Fraction(0)
    for n, source in enumerate(sources.tolist(), start=1):
        used[source] += 1
        worst = max(worst, *(abs(n * share - count) for share, count in zip(shares, used, strict=True)))
    return worst


@pytest.mark.parametrize("weights", CASES, ids=str)
def test_every_prefix_is_within_one_of_its_quota(weights: list[float]):
    blend = Blend(weights)
    sources, _ = blend.locate(np.arange(min(blend.period + 50, 6000)))
    k = len(weights)
    bound = 1 - Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
    assert _largest_deviation(sources, weights) <= bound < 1


def test_the_largest_deficit_rule_would_not_do():
    # The reason for a less obvious rule; if this held, the simpler one could take its place.
    weights = [3.0, 60.0, 60.0, 1.0, 5.0]
    used, sources = np.zeros(5), []
    for n in range(1, 130):
        sources.append(int(np.argmax(n * np.array(weights) - used * 129)))
        used[sources[-1]] += 1
    assert _largest_deviation(np.array(sources), weights) > 1


@pytest.mark.parametrize("weights", CASES[:8], ids=str)
def test_a_sources_samples_are_counted_without_gap(weights: list[float]):
    blend = Blend(weights)
    sources, within = blend.locate(np.arange(3 * blend.period))
    for source, share in enumerate(blend.shares):
        assert within[sources == source].tolist() == list(range(3 * share))


def test_any_sample_can_be_located_alone():
    blend = Blend([0.7, 0.2, 0.1])
    far = 10**12
    sources, within = blend.locate(np.arange(far, far + 25))
    assert [tuple(int(x) for x in blend.locate(far + i)) for i in range(25)] == list(
        zip(sources.tolist(), within.tolist(), strict=True)
    )
    assert sorted(within[:10][sources[:10] == 0].tolist()) == list(range(7 * far // 10, 7 * far // 10 + 7))


def test_weights_mean_the_decimals_that_were_written():
    assert Blend([0.1, 0.2, 0.7]).shares == (1, 2, 7)
    assert Blend([2, 4]).shares == (1, 2)


def test_weights_too_fine_to_be_exact_are_an_error():
    with pytest.raises(DataError, match="too finely graded"):
        Blend([0.123456789, 1.0])
