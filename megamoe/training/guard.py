"""Steps whose gradients cannot be used: which ones they are, and when there were too many.

A step counts by its global gradient norm alone, which every rank knows before the optimizer moves anything. A step that
does not count leaves weights, moments and running statistics as they are; the data goes on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megamoe.common.errors import TrainingError
from megamoe.config.faults import FaultsConfig
from megamoe.training.state import TrainState

ENOUGH = 16
"""Norms from which on their median says what is usual."""


def accepts(norm: float, before: Sequence[float], faults: FaultsConfig) -> bool:
    """Whether a step of this gradient norm counts.

    Args:
        before: norms of the last steps that counted.
    """
    if not math.isfinite(norm):
        return False
    if not faults.spike_factor or len(before) < ENOUGH:
        return True
    return norm <= faults.spike_factor * statistics.median(before)


def judged(state: TrainState, norm: float, skipped: bool, faults: FaultsConfig) -> TrainState:
    """The state with the last step's verdict in it."""
    if skipped:
        return replace(state, skipped=state.skipped + 1, skipped_in_row=state.skipped_in_row + 1)
    norms = (*state.norms, norm)[-faults.spike_window :] if faults.spike_factor else ()
    return replace(state, skipped_in_row=0, norms=norms)


def is_last_straw(state: TrainState, norm: float, faults: FaultsConfig) -> bool:
    """Whether the run ends with the step that was just skipped."""
    return state.skipped_in_row >= faults.max_skips or not (faults.skip_nonfinite or math.isfinite(norm))


def too_many(state: TrainState, norm: float, faults: FaultsConfig, dump: Path | None) -> TrainingError:
    """The error of a run that `is_last_straw` ends."""
    first = state.step - state.skipped_in_row + 1
    steps = f"steps {first} to {state.step}" if state.skipped_in_row > 1 else f"step {state.step}"
    usual = f"at most {faults.spike_factor:g} times the median of the last ones" if faults.spike_factor else "finite"
    look = f"look at {dump}, which names the parameters and how to see the step again" if dump is not None else ""
    lower = "start again from an older checkpoint with a lower learning rate, or without these samples"
    return TrainingError(
        f"The gradients of {steps} could not be used, so they changed nothing; the run ends here.",
        got=f"a gradient norm of {norm:g} at step {state.step}",
        expected=f"one that is {usual}, at the latest after {faults.max_skips} skipped steps (training.faults)",
        todo="; ".join(filter(None, (look, lower))),
    )
