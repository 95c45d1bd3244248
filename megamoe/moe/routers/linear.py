"""What routers share that score experts by a linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamoe.config.moe import CapacityConfig
from megamoe.moe import losses, stats
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.routers.base import Router, RouterSize
from megamoe.moe.stats import Metrics
from megamoe.ops.precision import at_least_fp32
from megamoe.ops.scores import router_scores


class LinearRouter(Router):
    """A router with one vector per expert, `weight` [E, D]."""

    def __init__(self, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE) -> None:
        super().__init__(size, capacity, ep)
        self.weight = nn.Parameter(torch.empty(size.num_experts, size.hidden_size))

    def logits(self, rows_TD: Tensor) -> Tensor:
        """rows @ weight.T, [T, E]; in fp32 at least: two experts' logits often differ by less than bf16 resolves."""
        return router_scores(rows_TD, at_least_fp32(self.weight), implementation=self.ops.router_scores)

    def describe(self, probs_TE: Tensor) -> Metrics:
        """What is reported of the scores."""
        return {
            "router_entropy": (losses.entropy(probs_TE), "mean"),
            "expert_similarity": (stats.expert_similarity(self.weight), "mean"),
        }
