"""Rules about experts, routers, capacity and dispatch; see :mod:`megamoe.config.rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megamoe.config import derive
from megamoe.config.chunks import obstacle
from megamoe.config.problems import Problem, nearest_divisor, nearest_multiple
from megamoe.config.routers import (
    BalancedRouterConfig,
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    ResonanceRouterConfig,
    TopKRouterConfig,
)
from megamoe.config.run import RunConfig


def experts_divide_over_ep(config: RunConfig) -> Iterator[Problem]:
    experts, ep = config.moe.num_experts, config.parallel.ep
    if experts % ep:
        what = (
            f"{experts} experts do not divide over parallel.ep {ep}: {experts} % {ep} = {experts % ep}; use "
            f"{nearest_multiple(ep, experts)}, or parallel.ep {nearest_divisor(experts, ep)}"
        )
        yield Problem("moe.num_experts", what, ("parallel.ep",))


def ep_needs_experts(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.ep > 1 and config.moe.num_experts == 0:
        what = f"{config.parallel.ep} needs experts, but moe.num_experts is 0; use 1 for a dense model"
        yield Problem("parallel.ep", what, ("moe.num_experts",))


def top_k_within_experts(config: RunConfig) -> Iterator[Problem]:
    moe = config.moe
    if 0 < moe.num_experts < moe.top_k:
        what = f"a token cannot choose {moe.top_k} of moe.num_experts {moe.num_experts} experts"
        yield Problem("moe.top_k", what, ("moe.num_experts",))


def dense_prefix_leaves_blocks(config: RunConfig) -> Iterator[Problem]:
    moe, layers = config.moe, config.model.num_layers
    if moe.num_experts and moe.first_k_dense >= layers:
        what = f"{moe.first_k_dense} dense blocks leave none of model.num_layers {layers} for experts"
        yield Problem("moe.first_k_dense", what, ("model.num_layers", "moe.num_experts"))


def some_block_has_experts(config: RunConfig) -> Iterator[Problem]:
    moe, left = config.moe, config.model.num_layers - config.moe.first_k_dense
    if moe.num_experts and 0 < left < moe.every_n_layers:
        what = (
            f"the {left} blocks after the {moe.first_k_dense} dense ones have no {moe.every_n_layers}th; "
            "use moe.num_experts: 0 for a dense model"
        )
        related = ("model.num_layers", "moe.first_k_dense", "moe.num_experts")
        yield Problem("moe.every_n_layers", what, related)


def local_dispatch_needs_local_experts(config: RunConfig) -> Iterator[Problem]:
    if config.moe.dispatcher == "local" and config.parallel.ep > 1:
        what = f"local cannot reach the experts of other ranks (parallel.ep {config.parallel.ep}); use auto"
        yield Problem("moe.dispatcher", what, ("parallel.ep",))


def padded_dispatch_needs_a_capacity(config: RunConfig) -> Iterator[Problem]:
    moe = config.moe
    if moe.dispatcher not in ("padded", "push"):
        return
    name = moe.dispatcher
    if moe.capacity.mode == "dropless":
        what = f"{name} needs a bound on each expert's rows, which dropless is not; use all_to_all or a capacity"
        yield Problem("moe.dispatcher", what, ("moe.capacity.mode",))
    elif isinstance(moe.router, ResonanceRouterConfig) and moe.router.scope == "ep_group":
        what = (
            f"{name} needs a bound on each rank's part, which moe.router.scope ep_group does not have; use all_to_all"
        )
        yield Problem("moe.dispatcher", what, ("moe.router.scope",))


def groupwise_dispatch_has_groups(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    ep, tp, etp = parallel.ep, parallel.tp, parallel.etp
    if config.moe.dispatcher != "groupwise" or ep == 1:
        return
    # The ranks of an expert-parallel group are etp apart.
    if tp <= etp or tp % etp or ep % (tp // etp):
        what = (
            f"groupwise needs as many ranks of an expert-parallel group in every tensor-parallel group, and more than "
            f"one; parallel.ep {ep}, tp {tp}, etp {etp} have not (tp / etp must divide ep); use deduplicated"
        )
        yield Problem("moe.dispatcher", what, ("parallel.tp", "parallel.ep", "parallel.etp"))


def rows_have_other_ranks_to_go_to(config: RunConfig) -> Iterator[Problem]:
    name, parallel = config.moe.dispatcher, config.parallel
    if name in ("deduplicated", "hierarchical", "groupwise", "push") and parallel.ep == 1:
        what = f"{name} sends rows to the experts of other ranks, but parallel.ep is 1; use auto"
        yield Problem("moe.dispatcher", what, ("parallel.ep",))
    elif name == "push" and parallel.etp > 1:
        what = f"push writes rows to whole experts, but parallel.etp is {parallel.etp}; use padded"
        yield Problem("moe.dispatcher", what, ("parallel.etp",))


def chunks_are_of_experts(config: RunConfig) -> Iterator[Problem]:
    chunks, parallel = config.moe.chunks, config.parallel
    if chunks == "auto" or chunks == 1:
        return
    held = config.moe.num_experts // parallel.ep
    if (found := obstacle(config)) is not None:
        missing, related = found
        yield Problem("moe.chunks", f"{chunks} needs {missing}; use 1", related)
    elif chunks > held:
        what = f"{chunks} chunks of {held} experts on a rank (moe.num_experts over parallel.ep); use at most {held}"
        yield Problem("moe.chunks", what, ("moe.num_experts", "parallel.ep"))


def bounds_need_affinities(config: RunConfig) -> Iterator[Problem]:
    mode, router = config.moe.capacity.mode, config.moe.router
    if mode in ("locmoe", "etr_bound", "etr_success") and not isinstance(router, ResonanceRouterConfig):
        what = f"{mode} follows the affinities of moe.router.type resonance, which {router.type} has not; use static"
        yield Problem("moe.capacity.mode", what, ("moe.router.type",))


def expert_choice_needs_a_capacity(config: RunConfig) -> Iterator[Problem]:
    mode, router = config.moe.capacity.mode, config.moe.router
    if isinstance(router, ExpertChoiceRouterConfig) and mode == "dropless":
        what = "dropless leaves open how many tokens an expert takes by expert_choice; use static with a factor"
        yield Problem("moe.capacity.mode", what, ("moe.router.type",))


def expert_choice_ranks_by_score(config: RunConfig) -> Iterator[Problem]:
    mode, drop, router = config.moe.capacity.mode, config.moe.capacity.drop, config.moe.router
    if isinstance(router, ExpertChoiceRouterConfig) and mode != "dropless" and drop != "affinity":
        what = f"{drop} is not what expert_choice ranks tokens by; use affinity"
        yield Problem("moe.capacity.drop", what, ("moe.router.type",))


def threshold_ranks_by_affinity(config: RunConfig) -> Iterator[Problem]:
    router, drop = config.moe.router, config.moe.capacity.drop
    if isinstance(router, ResonanceRouterConfig) and router.threshold < 1 and drop != "affinity":
        what = (
            f"{router.threshold} keeps the candidates of highest affinity, which {drop} does not rank by; use affinity"
        )
        yield Problem("moe.router.threshold", what, ("moe.capacity.drop",))


def minimum_capacity_within_factor(config: RunConfig) -> Iterator[Problem]:
    capacity = config.moe.capacity
    if capacity.mode != "dropless" and capacity.minimum > capacity.factor:
        what = f"{capacity.minimum} of the balanced load is more than moe.capacity.factor {capacity.factor} allows"
        yield Problem("moe.capacity.minimum", what, ("moe.capacity.factor",))


def scale_limits_in_order(config: RunConfig) -> Iterator[Problem]:
    router, width = config.moe.router, config.model.hidden_size
    if not isinstance(router, ResonanceRouterConfig):
        return
    least, initial, most = derive.scale_limits(router, width)
    if not least <= initial <= most:
        what = f"kappa begins at {initial:.4g}, outside of scale_min {least:.4g} ... scale_max {most:.4g}"
        yield Problem("moe.router.scale_min", what, ("moe.router.scale_init", "moe.router.scale_max"))


def groups_divide_experts(config: RunConfig) -> Iterator[Problem]:
    router, experts = config.moe.router, config.moe.num_experts
    if not isinstance(router, TopKRouterConfig) or not config.moe.top_k <= experts:
        return
    groups, best = router.num_groups, router.top_groups
    if experts % groups:
        what = f"{groups} groups do not divide moe.num_experts {experts}: {experts} % {groups} = {experts % groups}"
        yield Problem("moe.router.num_groups", what, ("moe.num_experts",))
    elif best > groups:
        yield Problem("moe.router.top_groups", f"{best} is more than moe.router.num_groups {groups}")
    elif config.moe.top_k > best * (experts // groups):
        what = f"{best} groups of {experts // groups} experts cannot give a token moe.top_k {config.moe.top_k} experts"
        yield Problem("moe.router.top_groups", what, ("moe.top_k", "moe.router.num_groups"))


def grap_slices_hold_a_feature(config: RunConfig) -> Iterator[Problem]:
    router, experts, width = config.moe.router, config.moe.num_experts, config.model.hidden_size
    if isinstance(router, ResonanceRouterConfig) and router.affinity != "cosine" and experts > width:
        what = (
            f"{router.affinity} gives each expert a slice of model.hidden_size {width} features, too few "
            f"for moe.num_experts {experts}; use cosine"
        )
        yield Problem("moe.router.affinity", what, ("moe.num_experts", "model.hidden_size"))


def sigmoid_weights_are_normalised(config: RunConfig) -> Iterator[Problem]:
    router = config.moe.router
    if isinstance(router, TopKRouterConfig) and router.score == "sigmoid" and not router.normalize_weights:
        what = "sigmoid scores do not sum to 1, so their weights are always normalised; use true"
        yield Problem("moe.router.normalize_weights", what, ("moe.router.score",))


def broadcast_needs_scores(config: RunConfig) -> Iterator[Problem]:
    moe, router = config.moe, config.moe.router
    if moe.broadcast is None:
        return
    if moe.num_experts == 0:
        yield Problem("moe.broadcast", "a dense model has no experts to broadcast to; use null", ("moe.num_experts",))
    elif isinstance(router, HashRouterConfig | BalancedRouterConfig):
        what = f"moe.router.type {router.type} has no scores whose entropy could be uncertain; use null"
        yield Problem("moe.broadcast", what, ("moe.router.type",))


def broadcast_quantile_is_measured(config: RunConfig) -> Iterator[Problem]:
    broadcast = config.moe.broadcast
    if broadcast is not None and broadcast.threshold == "quantile" and config.finetune is None:
        what = "quantile is measured on the model that fine-tuning starts from, and this run has no finetune; use fixed"
        yield Problem("moe.broadcast.threshold", what, ("finetune",))


def broadcast_reaches_more_experts(config: RunConfig) -> Iterator[Problem]:
    broadcast, experts, top_k = config.moe.broadcast, config.moe.num_experts, config.moe.top_k
    if broadcast is None or broadcast.top_m is None:
        return
    if broadcast.top_m > experts > 0:
        what = f"{broadcast.top_m} is more than moe.num_experts {experts}; null takes all of them"
        yield Problem("moe.broadcast.top_m", what, ("moe.num_experts",))
    elif broadcast.top_m <= top_k:
        what = f"{broadcast.top_m} experts are no more than moe.top_k {top_k}, which a token reaches anyway"
        yield Problem("moe.broadcast.top_m", what, ("moe.top_k",))


MOE_RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    experts_divide_over_ep,
    ep_needs_experts,
    top_k_within_experts,
    dense_prefix_leaves_blocks,
    some_block_has_experts,
    local_dispatch_needs_local_experts,
    padded_dispatch_needs_a_capacity,
    groupwise_dispatch_has_groups,
    rows_have_other_ranks_to_go_to,
    chunks_are_of_experts,
    bounds_need_affinities,
    expert_choice_needs_a_capacity,
    expert_choice_ranks_by_score,
    threshold_ranks_by_affinity,
    minimum_capacity_within_factor,
    scale_limits_in_order,
    groups_divide_experts,
    grap_slices_hold_a_feature,
    sigmoid_weights_are_normalised,
    broadcast_needs_scores,
    broadcast_quantile_is_measured,
    broadcast_reaches_more_experts,
)
