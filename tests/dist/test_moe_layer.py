"""The MoE layer over expert-parallel ranks: rows arrive as they should, and results equal one rank's."""

from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig, MoEConfig
from megamoe.config.routers import ResonanceRouterConfig, RouterConfig, TopKRouterConfig
from megamoe.moe.dispatch import build_dispatcher
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers.base import count
from megamoe.moe.types import RoutingPlan
from megamoe.parallel.groups import RankGroup, build_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, assert_equal_bits, run_ranks

RANKS, EXPERTS, WIDTH, FFN = 4, 8, 16, 12
DEGREES = (1, 2, 4)


def ep_group(world_size: int, ep: int) -> RankGroup:
    return build_groups(Topology(world_size, ep=ep)).ep


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Dispatch and combine, with plans written by hand

Pairs = list[tuple[int, int]]
"""(expert, token), in the order of a plan."""

PLANS: dict[str, list[tuple[int, Pairs]]] = {
    # Tokens of a rank and its plan, per rank.
    "mixed": [
        (3, [(0, 0), (0, 2), (3, 1), (5, 0), (6, 0)]),
        (2, [(0, 0), (1, 1), (6, 0), (6, 1)]),
        (4, [(2, 3), (6, 0), (7, 0)]),
        (1, [(0, 0), (2, 0), (4, 0), (6, 0)]),
    ],
    "a rank without tokens": [(2, [(1, 0), (7, 1)]), (0, []), (3, [(0, 0), (0, 1), (0, 2)]), (1, [(4, 0)])],
    "all on one expert": [(rank + 1, [(5, token) for token in range(rank + 1)]) for rank in range(RANKS)],
    "nothing at all": [(2, []), (0, []), (1, []), (0, [])],
}


class Moved(NamedTuple):
    received_RD: Tensor
    rows_per_expert_L: list[int]
    weights_R: Tensor
    out_TD: Tensor
    d_rows_TD: Tensor
    d_weights_A: Tensor


def hand_plan(pairs: Pairs, rank: int) -> RoutingPlan:
    experts = torch.tensor([e for e, _ in pairs], dtype=torch.int64)
    tokens = torch.tensor([t for _, t in pairs], dtype=torch.int64)
    weights_A = drawn(len(pairs), seed=50 + rank).requires_grad_()
    return RoutingPlan(tokens, experts, weights_A, count(experts, EXPERTS), torch.empty(0), {}, {}, {})


def move_all(ep: int) -> dict[str, Moved]:
    group = ep_group(RANKS, ep)
    return {name: move(plans, group) for name, plans in PLANS.items()}


@cache
def moved_on_every_rank(ep: int) -> list[dict[str, Moved]]:
    return run_ranks(move_all, RANKS, ep)


def move(plans: list[tuple[int, Pairs]], group: RankGroup) -> Moved:
    """Identity experts: what arrives goes straight home, so results are rows and a probe times choices."""
    rank = torch.distributed.get_rank()
    tokens, pairs = plans[rank]
    rows_TD, plan = drawn(tokens, WIDTH, seed=rank).requires_grad_(), hand_plan(pairs, rank)
    dispatcher = build_dispatcher("auto", group.handle)
    assert dispatcher.name == ("local" if group.size == 1 else "padded")
    received_RD, rows_per_expert_L, handle = dispatcher.dispatch(rows_TD, plan)
    out_TD = dispatcher.combine(received_RD, handle)
    loss = (out_TD * drawn(tokens, WIDTH, seed=100 + rank)).sum() + handle.weights_R.square().sum() / 2
    d_rows_TD, d_weights_A = torch.autograd.grad(loss, [rows_TD, plan.weights_A])
    return Moved(
        received_RD.detach(),
        rows_per_expert_L.tolist(),
        handle.weights_R.detach(),
        out_TD.detach(),
        d_rows_TD,
        d_weights_A,
    )


@pytest.mark.parametrize("ep", DEGREES)
@pytest.mark.parametrize("name", PLANS)
def test_movement_is_exact(name: str, ep: int) -> None:
    plans, local = PLANS[name], EXPERTS // ep
    for rank, results in enumerate(moved_on_every_rank(ep)):
        moved = results[name]
        tokens, pairs = plans[rank]
        choices_T1 = torch.tensor([sum(t == token for _, t in pairs) for token in range(tokens)]).view(-1, 1)
        assert torch.equal(moved.out_TD, drawn(tokens, WIDTH, seed=rank) * choices_T1)
        assert torch.equal(moved.d_rows_TD, drawn(tokens, WIDTH, seed=100 + rank) * choices_T1)
        assert_equal_bits(moved.d_weights_A, drawn(len(pairs), seed=50 + rank), name="weights go and come back")
        # Received: by expert, then by sender, then by token, as the contract says.
        peers, first = range(rank - rank % ep, rank - rank % ep + ep), rank % ep * local
        arrivals = sorted(
            (expert, sender, token, place)
            for sender in peers
            for place, (expert, token) in enumerate(plans[sender][1])
            if first <= expert < first + local
        )
        rows = [drawn(plans[s][0], WIDTH, seed=s)[t] for _, s, t, _ in arrivals]
        weights = [drawn(len(plans[s][1]), seed=50 + s)[a] for _, s, _, a in arrivals]
        assert_equal_bits(moved.received_RD, torch.stack(rows) if rows else torch.empty(0, WIDTH))
        assert_equal_bits(moved.weights_R, torch.stack(weights) if weights else torch.empty(0))
        counted = [sum(e == first + i for e, *_ in arrivals) for i in range(local)]
        assert moved.rows_per_expert_L == counted


# The whole layer, the same tokens per rank, spread over 1, 2 and 4 ranks

ROUTERS: dict[str, RouterConfig] = {
    "softmax": TopKRouterConfig(z_loss=0.01),
    "sigmoid": TopKRouterConfig(score="sigmoid", bias_update_rate=0.01),
    "grap_learned": ResonanceRouterConfig(threshold=0.9),
}
MODES: tuple[Literal["dropless", "static"], ...] = ("dropless", "static")
TOKENS = {
    "even": (24, 24, 24, 24),
    "a rank without tokens": (24, 0, 24, 7),
    "one expert": (24, 24, 24, 24),
    "padding": (24, 24, 24, 24),
}
REAL = (24, 0, 17, 7)
"""Of the rows in the case `padding`."""


class Result(NamedTuple):
    out_TD: Tensor
    gradients: dict[str, Tensor]
    losses: dict[str, Tensor]
    rows_per_expert_L: Tensor
    drop_share: float


def global_layer(config: MoEConfig, ep: RankGroup) -> MoELayer:
    """Every rank draws all experts and keeps its own."""
    layer = MoELayer(config, WIDTH, ExpertParallel(ep.size, ep.place, ep.handle))
    local = EXPERTS // ep.size
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(layer.named_parameters())):
            if name.startswith("experts."):
                whole = drawn(EXPERTS, *parameter.shape[1:], seed=number) * 0.4
                parameter.copy_(whole[ep.place * local : (ep.place + 1) * local])
            else:
                parameter.copy_(drawn(*parameter.shape, seed=number) * 0.3 + (parameter.dim() == 1))
    return layer


def layer_input(case: str, rank: int) -> Tensor:
    x_TD = drawn(TOKENS[case][rank], WIDTH, seed=200 + rank)
    if case == "one expert":
        x_TD = x_TD * 0.01 + drawn(1, WIDTH, seed=999)  # all but the same token
    return x_TD.requires_grad_()


def run_layer(config: MoEConfig, case: str, ep: RankGroup) -> Result:
    rank = torch.distributed.get_rank()
    layer = global_layer(config, ep)
    seen: list[Tensor] = []
    layer.experts.register_forward_hook(lambda module, args, out: seen.append(args[2]))
    x_TD = layer_input(case, rank)
    if case == "padding":
        documents_BS = torch.full((1, len(x_TD)), -1)
        documents_BS[:, : REAL[rank]] = 0
        out_BSD, aux = layer(x_TD[None], documents=documents_BS)
        out_TD = out_BSD[0]
    else:
        out_TD, aux = layer(x_TD)
    probe = drawn(*out_TD.shape, seed=300 + rank)
    loss = sum(aux.losses.values(), (out_TD * probe).sum())
    targets = {"x": x_TD, **dict(layer.named_parameters())}
    gradients = dict(zip(targets, torch.autograd.grad(loss, list(targets.values())), strict=True))
    losses = {name: value.detach() for name, value in aux.losses.items()}
    return Result(out_TD.detach(), gradients, losses, seen[0], aux.metrics["drop_share"][0].item())


def run_layers(router: str) -> dict[tuple[str, str], dict[int, Result]]:
    """Every case of a router: {(mode, tokens): {EP: result of this rank}}."""
    groups = {ep: ep_group(RANKS, ep) for ep in DEGREES}
    results = {}
    for mode in MODES:
        config = MoEConfig(
            num_experts=EXPERTS,
            top_k=2,
            expert_ffn_size=FFN,
            num_shared_experts=1,
            router=ROUTERS[router],
            capacity=CapacityConfig(mode=mode, factor=1.0),
        )
        for case, tokens in TOKENS.items():
            # Padded exchanges, the default with a capacity, are for ranks with equally many tokens.
            dispatcher = "auto" if len(set(tokens)) == 1 else "all_to_all"
            changed = config.model_copy(update={"dispatcher": dispatcher})
            results[mode, case] = {ep: run_layer(changed, case, group) for ep, group in groups.items()}
    return results


@cache
def layers_on_every_rank(router: str) -> list[dict[tuple[str, str], dict[int, Result]]]:
    return run_ranks(run_layers, RANKS, router)


def expert_gradients(results: list[dict[int, Result]], ep: int, name: str) -> Tensor:
    """[E, ...]: summed over ranks that hold the same experts, put together over those that hold others."""
    shares = [sum(results[rank][ep].gradients[name] for rank in range(place, RANKS, ep)) for place in range(ep)]
    return torch.cat(shares)


@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_result_does_not_depend_on_the_expert_parallel_degree(router: str, mode: str, case: str) -> None:
    results = [cases[mode, case] for cases in layers_on_every_rank(router)]
    for small, large in pairwise(DEGREES):
        for rank in range(RANKS):
            one, other = results[rank][small], results[rank][large]
            assert_close(other.out_TD, one.out_TD, rel=1e-5, name=f"output of rank {rank} at EP {large}")
            for name, loss in one.losses.items():
                assert_equal_bits(other.losses[name], loss, name=name)
            for name, gradient in one.gradients.items():
                if not name.startswith("experts."):
                    assert_close(other.gradients[name], gradient, rel=1e-5, abs=1e-7, name=f"{name} at EP {large}")
        for name in ("experts.w1", "experts.w2", "experts.w3"):
            expected = expert_gradients(results, small, name)
            assert_close(expert_gradients(results, large, name), expected, rel=1e-5, name=f"{name} at EP {large}")
    assert_hard_branches(results, mode, case)


def assert_hard_branches(results: list[dict[int, Result]], mode: str, case: str) -> None:
    """The data of a case reaches what the case is named after."""
    loads_E = torch.cat([results[rank][4].rows_per_expert_L for rank in range(RANKS)])
    if mode == "static":
        assert any(result[1].drop_share > 0 for result in results)
    if case == "a rank without tokens":
        assert results[1][4].out_TD.shape == (0, WIDTH)
    if case == "one expert":
        assert int((loads_E == 0).sum()) == EXPERTS - 2, "two experts have all the rows, six are empty"
        assert any(not bool(result[4].rows_per_expert_L.any()) for result in results), "a rank has none to compute"
