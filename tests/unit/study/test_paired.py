"""Paired differences against numbers worked out by hand and against tables."""

import math
import statistics

import pytest

from megamoe.study.paired import Difference, difference, quantile_975, ratio, summary


@pytest.mark.parametrize("degrees, quantile", [(1, 12.706), (4, 2.776), (30, 2.042), (40, 2.021), (120, 1.980)])
def test_student_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert quantile_975(degrees) == pytest.approx(quantile, abs=6e-4)


def test_a_difference_is_paired_by_seed() -> None:
    """Between seeds the losses differ by 1, within a pair by 0.1: only the pairs show it."""
    baseline = {1: 3.0, 2: 4.0, 3: 5.0, 4: 6.0}
    arm = {4: 5.91, 3: 4.89, 2: 3.91, 1: 2.89}
    found = difference(arm, baseline)
    assert found is not None
    half = 3.1824 * statistics.stdev([-0.11, -0.09, -0.11, -0.09]) / math.sqrt(4)
    assert found == pytest.approx((-0.1, -0.1 - half, -0.1 + half, 4))
    assert found.verdict() == "better"
    assert found.verdict(lower_is_better=False) == "worse"


def test_seeds_that_only_one_has_do_not_count() -> None:
    found = difference({1: 1.0, 2: 2.0, 9: 50.0}, {1: 0.5, 2: 1.5, 7: 0.0})
    assert found is not None
    assert (found.mean, found.seeds) == (0.5, 2)
    assert difference({1: 1.0}, {2: 1.0}) is None


def test_what_the_interval_allows_to_say() -> None:
    assert Difference(0.1, -0.1, 0.3, 5).verdict() == "no difference seen at 95 %"
    assert Difference(0.2, 0.1, 0.3, 5).verdict() == "worse"
    one = difference({1: 1.0}, {1: 2.0})
    assert one is not None
    assert (one.low, one.verdict()) == (None, "one seed only: no verdict")


def test_a_diverged_run_is_named_and_not_left_out() -> None:
    found = difference({1: 1.0, 2: math.nan}, {1: 2.0, 2: 2.0})
    assert found is not None
    assert found.verdict() == "a run diverged: no verdict"
    assert summary([1.0, math.inf]).deviation is None


def test_summary_and_ratio() -> None:
    assert summary([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)), 2)
    assert summary([1.0]) == (1.0, None, 1)
    assert ratio({1: 2.0, 2: 1.0}, {1: 4.0, 2: 4.0}) == pytest.approx((0.5 + 0.25) / 2)
    assert ratio({1: 2.0}, {1: 0.0}) is None
