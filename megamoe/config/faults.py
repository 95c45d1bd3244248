"""Section `training.faults`: steps that cannot be used, ranks that do not answer."""

from __future__ import annotations

from pydantic import Field

from megamoe.config.base import Section


class FaultsConfig(Section):
    """What a run does where a step or a rank fails."""

    skip_nonfinite: bool = Field(
        True,
        description="A step whose gradients hold NaN or infinity changes nothing, and the run goes on with the next "
        "samples; false: it ends the run.",
    )
    spike_factor: float = Field(
        0.0,
        ge=0,
        description="Likewise a step whose gradient norm is above this many times the median of the last ones; 0: off.",
    )
    spike_window: int = Field(
        64, ge=16, description="Steps whose norms that median is of; nothing is judged before there are 16."
    )
    max_skips: int = Field(10, ge=1, description="Skipped steps in a row that end the run.")
    dump: bool = Field(
        True,
        description="Write what is needed to see a skipped step again to faults/ of the run folder; the first of "
        "several in a row, and the one that ends the run.",
    )
    heartbeat_seconds: float = Field(
        10.0, gt=0, description="Between two writes of a rank's file in heartbeats/ of the run folder."
    )
    hang_minutes: float | None = Field(
        None,
        gt=0,
        description="A rank without progress for so long ends, naming who it waits for; null: nine tenths of "
        "timeout_minutes, before a collective's own limit, which names nobody.",
    )
