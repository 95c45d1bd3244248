"""Which steps count, by their gradient norms alone."""

import json
import math
from dataclasses import asdict

import pytest
from pydantic import TypeAdapter

from megamoe.config.faults import FaultsConfig
from megamoe.training import guard
from megamoe.training.state import TrainState

SPIKES = FaultsConfig(spike_factor=3.0, spike_window=20)


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("faults", [FaultsConfig(), SPIKES])
def test_what_is_not_finite_never_counts(norm: float, faults: FaultsConfig) -> None:
    assert not guard.accepts(norm, [], faults)


def test_a_spike_is_judged_by_the_median_once_there_are_enough() -> None:
    usual = [1.0] * 9 + [100.0] * 7  # its mean would let 60 pass
    assert guard.accepts(3.0, usual, SPIKES)
    assert not guard.accepts(3.001, usual, SPIKES)
    assert guard.accepts(1e9, usual[:15], SPIKES), "too few to judge by"
    assert guard.accepts(1e9, usual, FaultsConfig()), "off"


def test_the_window_holds_the_last_norms_that_counted() -> None:
    state = TrainState()
    for number in range(30):
        state = guard.judged(state.advanced(8, 64), float(number), number == 25, SPIKES)
    assert state.norms == tuple(float(n) for n in range(9, 30) if n != 25)
    assert (state.step, state.updates, state.skipped, state.skipped_in_row) == (30, 29, 1, 0)


def test_nothing_is_kept_where_nothing_is_judged() -> None:
    assert guard.judged(TrainState(step=1), 1.0, False, FaultsConfig()).norms == ()


def test_the_state_survives_json_bit_for_bit() -> None:
    state = TrainState(3, 24, 768, 2, 1, (0.1, 1 / 3, 5e-324, 0.49958986043930054))
    assert TypeAdapter(TrainState).validate_json(json.dumps(asdict(state), allow_nan=False), strict=True) == state


def test_the_run_ends_with_the_last_of_the_skips_in_a_row() -> None:
    faults, state = FaultsConfig(max_skips=3), TrainState()
    ends = []
    for skipped in (True, True, False, True, True, True):
        state = guard.judged(state.advanced(8, 64), math.inf, skipped, faults)
        ends.append(guard.is_last_straw(state, math.inf, faults))
    assert ends == [False, False, False, False, False, True]
    text = str(guard.too_many(state, math.inf, faults, None))
    assert "steps 4 to 6" in text
    assert "inf" in text


def test_without_skipping_the_first_one_ends_it() -> None:
    state = guard.judged(TrainState().advanced(8, 64), math.nan, True, FaultsConfig())
    assert guard.is_last_straw(state, math.nan, FaultsConfig(skip_nonfinite=False))
    assert not guard.is_last_straw(state, 7.0, FaultsConfig(skip_nonfinite=False)), "a spike is not NaN"
