"""The Mixture-of-Experts layer."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.config.moe import MoEConfig
from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch import build_dispatcher
from megamoe.moe.experts import Experts
from megamoe.moe.ffn import FeedForward
from megamoe.moe.marker import ExpertParallelMarker
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers import RouterSize, build_router
from megamoe.moe.types import LayerAux


class MoELayer(ExpertParallelMarker):
    """Routed experts, and shared ones if configured.

    1. route: the router decides which rows go to which experts, with which weight;
    2. dispatch: each row travels to the ranks of its experts;
    3. compute: every expert works on its rows and multiplies them by their weights;
    4. combine: the rows return and are added up per token.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_size: int,
        ep: ExpertParallel,
        ops: OpsConfig | None = None,
        vocab_size: int = 0,
        number: int = 0,
    ) -> None:
        super().__init__()
        ops = ops or OpsConfig()
        size = RouterSize(hidden_size, config.num_experts, config.top_k, vocab_size, ops, number)
        self.router = build_router(config.router, size, config.capacity, ep)
        self.dispatcher = build_dispatcher(config.dispatcher, ep.group)
        self.experts = Experts(config.num_experts // ep.size, hidden_size, config.expert_ffn_size, ops.expert_ffn)
        self.shared_experts = (
            FeedForward(hidden_size, config.num_shared_experts * config.expert_ffn_size)
            if config.num_shared_experts
            else None
        )
        self.mark(self.experts, config.num_experts, ep.size, ep.rank)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, LayerAux]:
        """[..., D] to ([..., D], auxiliary losses, observations and metrics). The residual is the caller's.

        Args:
            token_ids: int64 [...], vocabulary entries of the rows, for routers that look at them.
        """
        rows_TD = x.reshape(-1, x.shape[-1])
        plan = self.router(rows_TD, None if token_ids is None else token_ids.reshape(-1))
        rows_RD, rows_per_expert_L, handle = self.dispatcher.dispatch(rows_TD, plan)
        out_RD = self.experts(rows_RD, handle.weights_R, rows_per_expert_L)
        out = self.dispatcher.combine(out_RD, handle).view(x.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        sent = torch.full((), float(handle.sent_bytes), device=x.device)
        return out, LayerAux(plan.losses, plan.observations, plan.metrics | {"sent_bytes": (sent, "sum")})
