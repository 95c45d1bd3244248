"""The Mixture-of-Experts layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megamoe.config.moe import MoEConfig
from megamoe.moe.dispatch import build_dispatcher
from megamoe.moe.experts import Experts
from megamoe.moe.ffn import FeedForward
from megamoe.moe.marker import ExpertParallelMarker
from megamoe.moe.routers import build_router
from megamoe.moe.types import LayerAux
from megamoe.parallel.groups import ProcessGroup


class ExpertParallel(NamedTuple):
    """This rank's place in its expert-parallel group."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


ALONE = ExpertParallel()
"""All experts on this rank."""


class MoELayer(ExpertParallelMarker):
    """Routed experts, and shared ones if configured.

    1. route: the router decides which rows go to which experts, with which weight;
    2. dispatch: each row travels to the ranks of its experts;
    3. compute: every expert works on its rows and multiplies them by their weights;
    4. combine: the rows return and are added up per token.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, ep: ExpertParallel, expert_ffn: str = "auto") -> None:
        super().__init__()
        self.router = build_router(config, hidden_size)
        self.dispatcher = build_dispatcher(config.dispatcher, ep.group)
        self.experts = Experts(config.num_experts // ep.size, hidden_size, config.expert_ffn_size, expert_ffn)
        self.shared_experts = (
            FeedForward(hidden_size, config.num_shared_experts * config.expert_ffn_size)
            if config.num_shared_experts
            else None
        )
        self.mark(self.experts, config.num_experts, ep.size, ep.rank)

    def forward(self, x: Tensor) -> tuple[Tensor, LayerAux]:
        """[..., D] to ([..., D], auxiliary losses, observations and metrics). The residual is the caller's."""
        rows_TD = x.reshape(-1, x.shape[-1])
        plan = self.router(rows_TD)
        rows_RD, rows_per_expert_L, handle = self.dispatcher.dispatch(rows_TD, plan)
        out_RD = self.experts(rows_RD, handle.weights_R, rows_per_expert_L)
        out = self.dispatcher.combine(out_RD, handle).view(x.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, LayerAux(plan.losses, plan.observations, plan.metrics)
