"""The learning rate as a pure function of the step, so that a resumed run needs no state of it."""

from __future__ import annotations

import math

from megamoe.config.training import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step.

    Args:
        step: optimizer step, counted from 1.
        total_steps: `training.steps`; the schedule reaches `min_lr_ratio` there.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * _shape(config, min(1.0, progress), step, total_steps)


def _shape(config: ScheduleConfig, progress: float, step: int, total_steps: int) -> float:
    """From 1 down to 0 over the steps after warm-up."""
    match config.type:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":
            decay_steps = max(1, round(config.decay_fraction * total_steps))
            return min(1.0, (total_steps - step) / decay_steps)
