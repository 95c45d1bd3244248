"""Section `ops`: which implementation of each op runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megamoe.config.base import Section


class OpsConfig(Section):
    """`auto` takes the fastest available implementation and prints which; a named one must be available.

    `kernels` are the compiled ops of the optional package megamoe-kernels.
    """

    plan: Literal["auto", "kernels", "reference"] = Field(
        "auto",
        description="Which choices of the tokens their experts keep, and the order of the rows that follows from it.",
    )
    rows: Literal["auto", "kernels", "reference"] = Field(
        "auto",
        description="Rows to their experts' places, and their sum back to the tokens.",
    )
    router_scores: Literal["auto", "kernels", "reference"] = Field(
        "auto",
        description="Scores of linear routers and of the resonance router's cosine mode, in fp32.",
    )
    expert_ffn: Literal["auto", "reference", "blocked", "grouped_mm", "fused", "by_source"] = Field(
        "auto",
        description="Feed-forward of the experts: plain loop, blocked loop (CPU), torch's grouped_mm in plain "
        "autograd, or grouped_mm with the activation between the products as one op each way (GPU). by_source: each "
        "rank's rows by themselves, for training.rank_invariant.",
    )
    grap_affinity: Literal["auto", "reference", "sliced", "kernels"] = Field(
        "auto",
        description="Affinities of the resonance router's grap modes: plain autograd, by hand in chunks (CPU), or the "
        "compiled op of megamoe-kernels.",
    )
