"""Expert-Token Resonance over ranks: padded and ragged exchange, one agreed capacity, choices across ranks, nodes."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.config.moe import CapacityConfig, MoEConfig
from megamoe.config.routers import ResonanceRouterConfig, TopKRouterConfig
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers import Rows
from megamoe.moe.types import RoutingPlan
from megamoe.parallel.groups import RankGroup, build_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, assert_equal_bits, run_ranks

RANKS, EXPERTS, WIDTH, FFN, TOKENS = 4, 8, 32, 12, 96

CAPACITIES = {
    "static": CapacityConfig(mode="static", factor=1.0, tile=4),
    "static, tight": CapacityConfig(mode="static", factor=0.4, tile=4),
    "random": CapacityConfig(mode="static", factor=0.6, drop="random", tile=1),
    "etr_success": CapacityConfig(mode="etr_success", tile=8, minimum=0.1),
    "etr_bound": CapacityConfig(mode="etr_bound", tile=8),
    "locmoe": CapacityConfig(mode="locmoe", tile=8),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ep_group(ep: int) -> RankGroup:
    return build_groups(Topology(RANKS, ep=ep)).ep


def build(config: MoEConfig, ep: RankGroup | None, node: tuple[int, ...] | None = None) -> MoELayer:
    """Every rank draws all experts and keeps its own."""
    place = ExpertParallel() if ep is None else ExpertParallel(ep.size, ep.place, ep.handle, node)
    layer, local = MoELayer(config, WIDTH, place), EXPERTS // place.size
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(layer.named_parameters())):
            if name.startswith("experts."):
                whole = drawn(EXPERTS, *parameter.shape[1:], seed=number) * 0.4
                parameter.copy_(whole[place.rank * local : (place.rank + 1) * local])
            else:
                parameter.copy_(drawn(*parameter.shape, seed=number) * 0.3 + (parameter.dim() == 1))
    return layer


def moe(capacity: CapacityConfig, dispatcher: str = "auto", **router: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=EXPERTS,
        top_k=2,
        expert_ffn_size=FFN,
        router=ResonanceRouterConfig(**router),
        capacity=capacity,
        dispatcher=dispatcher,
    )


def tokens(rank: int, step: int = 0) -> Tensor:
    """Some experts are wanted by more tokens than others."""
    rows_TD = drawn(TOKENS, WIDTH, seed=100 * step + rank)
    rows_TD[:, :6] += 0.5
    return rows_TD


class Pass(NamedTuple):
    tensors: dict[str, Tensor]
    """Output, gradients of rows and of every parameter."""
    sent_bytes: float
    exchanges: int
    received_rows: int
    """Rows of the expert-parallel buffer, filled or not."""
    filled_rows: int
    drop_share: float
    plan: RoutingPlan


def run(layer: MoELayer, rows_TD: Tensor) -> Pass:
    """Forward and backward pass, with the exchanges of the forward pass counted."""
    seen: dict[str, Any] = {}
    handles = [
        layer.experts.register_forward_hook(
            lambda m, args, out: seen.update(rows=len(args[0]), used=int(args[2].sum()))
        ),
        layer.router.register_forward_hook(lambda m, args, plan: seen.update(plan=plan)),
    ]
    exchanged = dist.all_to_all_single
    rows_TD = rows_TD.clone().requires_grad_()
    try:
        seen["exchanges"] = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen["exchanges"] += 1
            return exchanged(*args, **kwargs)

        dist.all_to_all_single = counted
        out_TD, aux = layer(rows_TD)
    finally:
        dist.all_to_all_single = exchanged
        for handle in handles:
            handle.remove()
    loss = sum(aux.losses.values(), (out_TD * drawn(*out_TD.shape, seed=7)).sum())
    targets = {"x": rows_TD, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(loss, list(targets.values()))
    tensors = {"out": out_TD.detach(), **{f"d {n}": g for n, g in zip(targets, gradients, strict=True)}}
    plan = RoutingPlan(*(x.detach() if isinstance(x, Tensor) else x for x in seen["plan"]))
    metrics = {name: value[0] for name, value in aux.metrics.items()}
    return Pass(
        tensors,
        float(metrics["sent_bytes"]),
        seen["exchanges"],
        seen["rows"],
        seen["used"],
        float(metrics["drop_share"]),
        plan._replace(losses={}, observations={}, metrics={}),
    )


def after_some_steps(layer: MoELayer, group: RankGroup, steps: int = 3) -> None:
    """Move the running statistics as the training loop does: by the sums over all ranks."""
    for step in range(steps):
        plan = layer.router(tokens(dist.get_rank(), step=step + 1))
        summed = {}
        for name, value in plan.observations.items():
            summed[name] = value.clone()
            dist.all_reduce(summed[name])
        layer.router.update(summed)


# Padded equals ragged


def both_exchanges(ep: int) -> dict[str, tuple[Pass, Pass]]:
    group = ep_group(ep)
    result = {}
    for name, capacity in CAPACITIES.items():
        passes = []
        for dispatcher in ("padded", "all_to_all"):
            layer = build(moe(capacity, dispatcher), group)
            after_some_steps(layer, group)
            passes.append(run(layer, tokens(dist.get_rank())))
        result[name] = (passes[0], passes[1])
    return result


@pytest.fixture(scope="module", params=[2, 4])
def exchanges(request: pytest.FixtureRequest) -> list[dict[str, tuple[Pass, Pass]]]:
    return run_ranks(both_exchanges, RANKS, request.param)


def test_padded_and_ragged_give_the_same_bits(exchanges: list[dict[str, tuple[Pass, Pass]]]) -> None:
    dropped = 0.0
    for rank in exchanges:
        for name, (padded, ragged) in rank.items():
            assert torch.equal(padded.plan.token_ids_A, ragged.plan.token_ids_A)
            assert padded.filled_rows == ragged.received_rows == ragged.filled_rows
            dropped = max(dropped, padded.drop_share)
            for tensor in ragged.tensors:
                assert_equal_bits(padded.tensors[tensor], ragged.tensors[tensor], name=f"{name}: {tensor}")
    assert dropped > 0.3, "the capacity was felt"


def test_padded_needs_no_exchange_of_sizes_and_moves_what_the_capacity_says(
    exchanges: list[dict[str, tuple[Pass, Pass]]],
) -> None:
    for rank in exchanges:
        for padded, ragged in rank.values():
            assert (padded.exchanges, ragged.exchanges) == (2, 3)
            slots = padded.plan.capacity
            assert slots is not None
            assert padded.received_rows == EXPERTS * slots
            local = len(padded.tensors["d experts.w1"])
            elsewhere = EXPERTS - local
            assert padded.sent_bytes == elsewhere * slots * (WIDTH + 1 + WIDTH) * 4
    loose, tight = (exchanges[0][name][0] for name in ("static", "static, tight"))
    assert tight.sent_bytes <= 0.5 * loose.sent_bytes
    assert tight.received_rows <= 0.5 * loose.received_rows


def test_the_capacity_is_one_number_for_all_ranks(exchanges: list[dict[str, tuple[Pass, Pass]]]) -> None:
    for name in CAPACITIES:
        assert len({rank[name][0].plan.capacity for rank in exchanges}) == 1


# Spreading the experts changes nothing


def spread_over(ep: int) -> dict[str, Pass]:
    group = ep_group(ep)
    result = {}
    for name, capacity in CAPACITIES.items():
        layer = build(moe(capacity), group)
        after_some_steps(layer, group)
        result[name] = run(layer, tokens(dist.get_rank()))
    return result


def test_ep_1_equals_ep_2_and_4() -> None:
    alone, two, four = (run_ranks(spread_over, RANKS, ep) for ep in (1, 2, 4))
    for rank in range(RANKS):
        for name in CAPACITIES:
            for other in (two, four):
                expected, found = alone[rank][name], other[rank][name]
                assert torch.equal(found.plan.token_ids_A, expected.plan.token_ids_A)
                assert torch.equal(found.plan.expert_ids_A, expected.plan.expert_ids_A)
                for tensor in ("out", "d x", "d router.slice_values", "d router.log_scale"):
                    assert_close(found.tensors[tensor], expected.tensors[tensor], abs=2e-5, rel=1e-4, name=tensor)


# Choosing among the tokens of all ranks


def across_ranks(ep: int) -> Pass:
    config = moe(CapacityConfig(mode="static", factor=0.5), scope="ep_group", threshold=0.9)
    return run(build(config, ep_group(ep)), tokens(dist.get_rank()))


def test_ep_group_scope_chooses_as_one_process_with_all_tokens() -> None:
    alone = build(moe(CapacityConfig(mode="static", factor=0.5), threshold=0.9), None)
    expected = alone.router(torch.cat([tokens(rank) for rank in range(RANKS)]))
    pairs = set(zip(expected.token_ids_A.tolist(), expected.expert_ids_A.tolist(), strict=True))
    found = set()
    for rank, result in enumerate(run_ranks(across_ranks, RANKS, RANKS)):
        assert result.plan.capacity is None, "so the exchange is ragged"
        places = (result.plan.token_ids_A + rank * TOKENS).tolist()
        found |= set(zip(places, result.plan.expert_ids_A.tolist(), strict=True))
    assert found == pairs
    assert len(pairs) < 2 * TOKENS * RANKS


HELD = (96, 0, 41, 17)
"""Rows of each rank that are no padding."""


def across_uneven_ranks(drop: str) -> list[tuple[int, int]]:
    """What a rank's tokens may go to, as (place among all, expert); every rank asks for a capacity of 96 rows."""
    capacity = CapacityConfig(mode="static", factor=0.2, drop=drop)
    layer, rank = build(moe(capacity, scope="ep_group"), ep_group(RANKS)), dist.get_rank()
    about = Rows(torch.arange(HELD[rank]) + rank, None, TOKENS)
    plan = layer.router(tokens(rank)[: HELD[rank]], about)
    return list(zip((plan.token_ids_A + sum(HELD[:rank])).tolist(), plan.expert_ids_A.tolist(), strict=True))


@pytest.mark.parametrize("drop", ["affinity", "position"])
def test_ep_group_scope_with_different_numbers_of_rows(drop: str) -> None:
    """Ranks hold different numbers of rows where conversations leave different paddings."""
    alone = build(moe(CapacityConfig(mode="static", factor=0.2, drop=drop)), None)
    rows_TD = torch.cat([tokens(rank)[: HELD[rank]] for rank in range(RANKS)])
    expected = alone.router(rows_TD, Rows(None, None, RANKS * TOKENS))
    pairs = sorted(zip(expected.token_ids_A.tolist(), expected.expert_ids_A.tolist(), strict=True))
    assert sorted(pair for found in run_ranks(across_uneven_ranks, RANKS, drop) for pair in found) == pairs
    assert len(pairs) < 2 * sum(HELD)


# Nodes


def on_two_nodes() -> tuple[float, float, list[str], list[str]]:
    """EP 4 over two nodes of two ranks, pulled towards the own node; and the same on one node."""
    group = ep_group(4)
    node = (0, 1) if group.place < 2 else (2, 3)
    config = moe(CapacityConfig(), affinity="cosine", locality_loss=0.01)
    layer, whole = build(config, group, node), build(config, group)
    _, aux = layer(tokens(dist.get_rank()))
    share = float(aux.metrics["node_share"][0])
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        layer.router(tokens(dist.get_rank())).losses["locality_loss"].backward()
        optimizer.step()
    _, aux = layer(tokens(dist.get_rank()))
    return share, float(aux.metrics["node_share"][0]), layer.router.remarks(), whole.router.remarks()


def test_locality_keeps_rows_on_their_node_and_says_once_where_it_cannot() -> None:
    for before, after, spread, together in run_ranks(on_two_nodes, RANKS):
        assert 0.2 < before < 0.8
        assert after > before + 0.1
        assert spread == []
        assert together == [
            "moe.router.locality_loss: every expert is on this node, so it acts as one more balance loss only"
        ]


def test_top_k_with_a_static_capacity_goes_padded_too() -> None:
    results = run_ranks(_top_k, RANKS)
    assert all(result == ("padded", True) for result in results)


def _top_k() -> tuple[str, bool]:
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=2,
        expert_ffn_size=FFN,
        router=TopKRouterConfig(),
        capacity=CapacityConfig(mode="static", drop="position"),
    )
    layer = build(config, ep_group(2))
    trained = run(layer, tokens(dist.get_rank())).plan.capacity
    layer.eval()
    return layer.dispatcher.name, trained is not None and layer.router(tokens(0)).capacity is None


def uneven() -> str:
    layer = build(moe(CAPACITIES["static"]), ep_group(2))
    try:
        layer(tokens(dist.get_rank())[: 40 + 30 * (dist.get_rank() % 2)])
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_different_numbers_of_rows_are_told_so() -> None:
    for message in run_ranks(uneven, RANKS):
        assert message.startswith("a padded exchange needs as many rows on every rank; capacities over ranks: [")
