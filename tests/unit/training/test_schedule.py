"""Shapes and end points of the learning rate."""

import math
from itertools import pairwise

import pytest

from megamoe.config.training import ScheduleConfig
from megamoe.training.schedule import lr_factor

TOTAL = 100
TYPES = ("cosine", "linear", "wsd", "constant")


def curve(**settings) -> list[float]:
    """Factor of steps 1 ... TOTAL; place 0 is not a step."""
    config = ScheduleConfig(**settings)
    return [math.nan, *(lr_factor(config, step, TOTAL) for step in range(1, TOTAL + 1))]


@pytest.mark.parametrize("kind", TYPES)
def test_end_points(kind: str) -> None:
    factors = curve(type=kind, warmup_steps=10, min_lr_ratio=0.1)
    assert factors[1] == pytest.approx(0.1)
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == 1.0, "the peak is reached"
    assert max(factors[1:]) == 1.0
    assert factors[TOTAL] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))


@pytest.mark.parametrize("kind", TYPES)
def test_without_warm_up_the_first_step_is_already_near_the_peak(kind: str) -> None:
    factors = curve(type=kind, warmup_steps=0)
    assert 0.98 < factors[1] <= 1.0


def test_cosine() -> None:
    factors = curve(type="cosine", warmup_steps=20, min_lr_ratio=0.2)
    assert factors[60] == pytest.approx(0.2 + 0.8 * 0.5)  # half way after the warm-up
    assert factors[40] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_linear() -> None:
    factors = curve(type="linear", warmup_steps=20, min_lr_ratio=0.2)
    assert factors[60] == pytest.approx(0.6)
    slopes = [b - a for a, b in pairwise(factors[20:])]
    assert slopes == pytest.approx([-0.01] * 80)


def test_wsd_holds_and_then_decays_over_its_share_of_the_steps() -> None:
    factors = curve(type="wsd", warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.25)
    assert set(factors[10:76]) == {1.0}
    assert factors[76] == pytest.approx(24 / 25)
    assert factors[99] == pytest.approx(1 / 25)
    assert factors[100] == 0.0


def test_a_shorter_run_is_the_beginning_of_no_other() -> None:
    config = ScheduleConfig(type="cosine")
    assert lr_factor(config, 50, 50) == pytest.approx(0.1)
    assert lr_factor(config, 50, 100) > 0.5


def test_after_the_end_it_stays_there() -> None:
    for kind in ("cosine", "linear"):
        assert lr_factor(ScheduleConfig(type=kind), TOTAL + 5, TOTAL) == pytest.approx(0.1)
