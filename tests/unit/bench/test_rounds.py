"""Turns are fair, warm-up is not counted, and ratios are those of the same round."""

import math
import random
from functools import partial

from megamoe.bench.rounds import Spread, in_turns, interval, ratios, spread


def test_contestants_take_turns_and_the_warm_up_is_not_timed() -> None:
    calls: list[str] = []
    seconds = in_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=2,
        warmup=1,
        between=lambda key: calls.append(f"after {key}"),
    )
    assert calls == ["a", "after a", "b", "after b"] * 3
    assert {key: len(own) for key, own in seconds.items()} == {"a": 2, "b": 2}


def test_each_round_begins_with_another_one() -> None:
    calls: list[str] = []
    turns = {name: partial(calls.append, name) for name in "abc"}
    in_turns(turns, rounds=4, warmup=0, rotate=True)
    assert "".join(calls) == "abcbcacababc"


def test_a_ratio_compares_times_of_one_round() -> None:
    # The machine was ten times slower in the second round, for both.
    assert ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == Spread(2.0, 2.0, 3.0)
    assert spread(iter([3.0, 1.0, 2.0])) == Spread(2.0, 1.0, 3.0)


def test_the_interval_of_a_median_is_of_the_middle_values() -> None:
    assert interval(range(1, 101)) == (41, 60)
    assert interval([5.0, 1.0, 4.0, 2.0, 3.0]) == (1.0, 5.0)
    # One wild round in ten does not count.
    assert interval([*range(9), 1e9]) == (1, 8)


def test_the_interval_holds_the_median_in_95_of_100_measurements() -> None:
    draws = random.Random(7)
    intervals = [interval([draws.expovariate(1.0) for _ in range(40)]) for _ in range(2000)]
    share = sum(low <= math.log(2) <= high for low, high in intervals) / len(intervals)
    assert 0.945 <= share <= 0.975
