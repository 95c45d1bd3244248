"""Routers, one small file each."""

from __future__ import annotations

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import (
    BalancedRouterConfig,
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    ResonanceRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    TopKRouterConfig,
)
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.routers.balanced import BalancedRouter
from megamoe.moe.routers.base import Router, RouterSize, Rows
from megamoe.moe.routers.expert_choice import ExpertChoiceRouter
from megamoe.moe.routers.hash import HashRouter
from megamoe.moe.routers.resonance import ResonanceRouter
from megamoe.moe.routers.sinkhorn import SinkhornRouter
from megamoe.moe.routers.topk import TopKRouter

__all__ = ["Router", "RouterSize", "Rows", "build_router"]

ROUTERS: dict[type, type] = {
    TopKRouterConfig: TopKRouter,
    ResonanceRouterConfig: ResonanceRouter,
    ExpertChoiceRouterConfig: ExpertChoiceRouter,
    SinkhornRouterConfig: SinkhornRouter,
    HashRouterConfig: HashRouter,
    BalancedRouterConfig: BalancedRouter,
}


def build_router(
    config: RouterConfig, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE
) -> Router:
    """The router that `moe.router` describes."""
    router: Router = ROUTERS[type(config)](config, size, capacity, ep)
    return router
