"""Section `ops`: which implementation of each op runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megamoe.config.base import Section


class OpsConfig(Section):
    """`auto` takes the fastest available implementation and prints which; a named one must be available."""

    expert_ffn: Literal["auto", "reference", "blocked", "grouped_mm"] = Field(
        "auto",
        description="Feed-forward of the experts: plain loop, blocked loop (CPU), or torch's grouped_mm.",
    )
    grap_affinity: Literal["auto", "reference", "sliced"] = Field(
        "auto",
        description="Affinities of the resonance router's grap modes: plain autograd, or by hand in chunks (CPU).",
    )
