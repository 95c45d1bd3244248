"""Routers, one small file each."""

from __future__ import annotations

from megamoe.config.moe import MoEConfig, TopKRouterConfig
from megamoe.moe.routers.base import Router
from megamoe.moe.routers.resonance import ResonanceRouter
from megamoe.moe.routers.topk import TopKRouter


def build_router(config: MoEConfig, hidden_size: int) -> Router:
    """The router that `moe.router` describes, for rows of width D."""
    sizes = (hidden_size, config.num_experts, config.top_k, config.capacity)
    if isinstance(config.router, TopKRouterConfig):
        return TopKRouter(config.router, *sizes)
    return ResonanceRouter(config.router, *sizes)
