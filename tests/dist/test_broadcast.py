"""Broadcast rows over expert-parallel ranks: the results of one rank, one row per token and rank, counted bytes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.config.moe import BroadcastConfig, CapacityConfig, MoEConfig
from megamoe.config.routers import ExpertChoiceRouterConfig, ResonanceRouterConfig, RouterConfig, TopKRouterConfig
from megamoe.model.recompute import recomputed
from megamoe.moe.dispatch import build_dispatcher
from megamoe.moe.dispatch.broadcast import as_assignments
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers import Rows
from megamoe.moe.types import RoutingPlan
from megamoe.parallel.groups import RankGroup, build_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, assert_equal_bits, run_ranks

RANKS, EXPERTS, WIDTH, FFN, BATCH, SEQUENCE = 4, 8, 32, 12, 3, 16
TOKENS = BATCH * SEQUENCE
DEGREES = (2, 4)
SURE = 1
"""A rank whose tokens are all certain."""

STATIC = CapacityConfig(mode="static", factor=0.8, tile=4)


class Case(NamedTuple):
    router: RouterConfig
    capacity: CapacityConfig = CapacityConfig()
    dispatcher: Literal["auto", "all_to_all", "padded"] = "auto"
    broadcast: Mapping[str, Any] = MappingProxyType({})
    dtype: torch.dtype = torch.float64
    recompute: bool = False
    frozen: bool = False
    """The router, and whatever comes before the layer."""
    threshold: float = 0.5


TOPK, ETR = TopKRouterConfig(), ResonanceRouterConfig(affinity="cosine", threshold=0.75)
CASES = {
    "ragged": Case(TOPK, dispatcher="all_to_all"),
    "ragged, fp32": Case(TOPK, dtype=torch.float32),
    "ragged, bounded": Case(TOPK, STATIC, "all_to_all", {"choose": "random"}),
    "padded": Case(TOPK, STATIC, "padded"),
    "padded, fp32": Case(TOPK, STATIC, dtype=torch.float32),
    "etr": Case(ETR, CapacityConfig(mode="etr_success", tile=8, minimum=0.1)),
    "expert choice": Case(ExpertChoiceRouterConfig(balance_loss=0.01), STATIC),
    "top_m": Case(TOPK, broadcast={"top_m": 2, "max_share": 1.0}),
    "top_m, padded": Case(TOPK, STATIC, broadcast={"top_m": 3, "slots": "first", "scale": "match_topk"}),
    "recomputed": Case(ETR, STATIC, recompute=True),
    "recomputed, ragged": Case(TOPK, recompute=True),
    "frozen": Case(TOPK, STATIC, frozen=True),
    "everything": Case(TOPK, broadcast={"max_share": 1.0}, threshold=0.0),
    "nothing": Case(TOPK, STATIC, threshold=torch.nan),
}
every_case = pytest.mark.parametrize("name", CASES)
every_degree = pytest.mark.parametrize("ep", DEGREES)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VECTORS_ED = drawn(EXPERTS, WIDTH, seed=99)
"""Of the router."""


def build(case: Case, ep: RankGroup | None) -> Any:
    """An MoE layer. Every rank draws all experts and keeps its own."""
    place = ExpertParallel() if ep is None else ExpertParallel(ep.size, ep.place, ep.handle)
    settings: dict[str, Any] = {"threshold": "quantile", "max_share": 0.4} | dict(case.broadcast)
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=2,
        expert_ffn_size=FFN,
        router=case.router,
        capacity=case.capacity,
        dispatcher=case.dispatcher if ep is not None else "local",
        broadcast=BroadcastConfig(**settings),
    )
    layer, local = MoELayer(config, WIDTH, place).to(case.dtype), EXPERTS // place.size
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(layer.named_parameters())):
            if name.startswith("experts."):
                whole = drawn(EXPERTS, *parameter.shape[1:], seed=number) * 0.4
                parameter.copy_(whole[place.rank * local : (place.rank + 1) * local])
            elif name == "router.log_scale":
                parameter.fill_(3.0)
            else:
                parameter.copy_(VECTORS_ED * 0.5)
    layer.router.broadcast.threshold.fill_(case.threshold)
    layer.router.requires_grad_(not case.frozen)
    return layer


def inputs(rank: int, dtype: torch.dtype) -> Tensor:
    """[B, S, D]; on the rank that is sure, rows that lie on a router's vectors for linear and cosine scores alike."""
    x = drawn(BATCH, SEQUENCE, WIDTH, seed=rank)
    if rank == SURE:
        x = 0.1 * x + 3.0 * VECTORS_ED[torch.arange(TOKENS) % EXPERTS].view(BATCH, SEQUENCE, WIDTH)
    else:
        x[..., :6] += 0.5
        x[0] *= 0.2
    return x.to(dtype)


class Pass(NamedTuple):
    tensors: dict[str, Tensor]
    """Output, gradients of rows and of this rank's parameters."""
    pairs: list[tuple[int, int]]
    """(expert, token) of the assignments."""
    weights_UE: Tensor
    metrics: dict[str, Tensor]


def run(case: Case, layer: Any) -> Pass:
    seen: list[RoutingPlan] = []
    handle = layer.router.register_forward_hook(lambda module, args, plan: seen.append(plan))
    x = inputs(dist.get_rank(), case.dtype).requires_grad_(not case.frozen)
    token_ids = torch.arange(TOKENS).view(BATCH, SEQUENCE) + dist.get_rank()
    out, aux = recomputed(layer, x, token_ids) if case.recompute else layer(x, token_ids)
    loss = sum(aux.losses.values(), (out * drawn(*out.shape, seed=7).to(out)).sum())
    targets = {n: t for n, t in {"x": x, **dict(layer.named_parameters())}.items() if t.requires_grad}
    found = torch.autograd.grad(loss, list(targets.values()))
    handle.remove()
    tensors = {"out": out.detach(), **{f"d {n}": g for n, g in zip(targets, found, strict=True)}}
    plan = seen[0]
    pairs = list(zip(plan.expert_ids_A.tolist(), plan.token_ids_A.tolist(), strict=True))
    assert plan.broadcast is not None
    return Pass(
        tensors, pairs, plan.broadcast.weights_UE.detach(), {name: value for name, (value, _) in aux.metrics.items()}
    )


# What is sent


class Sent(NamedTuple):
    """One forward pass of a dispatcher."""

    declared: int
    moved: int
    """Bytes that really went to other ranks."""
    rows: int
    """Broadcast rows that came here."""


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Bytes that this rank hands to all_to_all_single for other ranks."""
    exchange: Any = dist.all_to_all_single
    total = [0]

    def counted(out: Tensor, sent: Tensor, receive: Any = None, send: Any = None, **settings: Any) -> Any:
        group = settings["group"]
        me, ranks = dist.get_rank(group), dist.get_world_size(group)
        own = len(sent) // ranks if send is None else send[me]
        total[0] += (len(sent) - own) * sent[:1].numel() * sent.element_size() if len(sent) else 0
        return exchange(out, sent, receive, send, **settings)

    dist.all_to_all_single = counted  # type: ignore[assignment]
    try:
        yield lambda: total[0]
    finally:
        dist.all_to_all_single = exchange


def send(dispatcher: Any, rows_TD: Tensor, plan: RoutingPlan) -> Sent:
    with counting() as moved:
        rows_RD, _, handle = dispatcher.dispatch(rows_TD, plan)
        dispatcher.combine(rows_RD, handle)
        return Sent(handle.sent_bytes, moved(), getattr(handle.state, "num_broadcast", 0))


def sendings(case: Case, layer: Any, group: RankGroup) -> dict[str, Sent]:
    """The layer's plan with broadcast rows, without them, and with one assignment for each expert of theirs."""
    rows_TD = inputs(dist.get_rank(), case.dtype).view(TOKENS, WIDTH)
    plan = layer.router(rows_TD, Rows(sequences_T=torch.arange(TOKENS) // SEQUENCE))
    ragged = build_dispatcher("all_to_all", group.handle)
    return {
        "all": send(layer.dispatcher, rows_TD, plan),
        "without": send(layer.dispatcher.inner, rows_TD, plan),
        "ragged without": send(ragged, rows_TD, plan),
        "per expert": send(ragged, rows_TD, as_assignments(plan)),
    }


class Found(NamedTuple):
    passes: dict[int, dict[str, Pass]]
    """By degree (1: this rank alone) and case."""
    sent: dict[int, dict[str, dict[str, Sent]]]


def on_a_rank() -> Found:
    groups = {ep: build_groups(Topology(RANKS, ep=ep)).ep for ep in DEGREES}
    found = Found({1: {name: run(case, build(case, None)) for name, case in CASES.items()}}, {})
    for ep, group in groups.items():
        found.passes[ep], found.sent[ep] = {}, {}
        for name, case in CASES.items():
            layer = build(case, group)
            found.passes[ep][name] = run(case, layer)
            found.sent[ep][name] = sendings(case, layer, group)
    return found


@cache
def everything() -> list[Found]:
    return run_ranks(on_a_rank, RANKS)


@every_degree
@every_case
def test_spreading_the_experts_changes_nothing(name: str, ep: int) -> None:
    results, rel = everything(), 1e-12 if CASES[name].dtype == torch.float64 else 1e-5
    for result in results:
        alone, spread = result.passes[1][name], result.passes[ep][name]
        assert spread.pairs == alone.pairs
        assert_equal_bits(spread.weights_UE, alone.weights_UE)
        for tensor, expected in alone.tensors.items():
            if not tensor.startswith("d experts."):
                assert_close(spread.tensors[tensor], expected, rel=rel, name=tensor)
        assert (spread.metrics.keys() - {"sent_bytes"}) == (alone.metrics.keys() - {"sent_bytes"})
        for metric in alone.metrics.keys() - {"sent_bytes"}:
            assert_close(spread.metrics[metric], alone.metrics[metric], rel=1e-6, name=metric)


@every_degree
@every_case
def test_an_expert_gets_the_gradients_of_all_ranks_of_its_group(name: str, ep: int) -> None:
    results, rel = everything(), 1e-12 if CASES[name].dtype == torch.float64 else 1e-5
    for first in range(0, RANKS, ep):
        group = results[first : first + ep]
        for tensor in ("d experts.w1", "d experts.w2", "d experts.w3"):
            expected = torch.stack([result.passes[1][name].tensors[tensor] for result in group]).sum(0)
            found = torch.cat([result.passes[ep][name].tensors[tensor] for result in group])
            assert_close(found, expected, rel=rel, name=tensor)


def test_the_cases_are_what_they_are_called() -> None:
    results = everything()
    for name, case in CASES.items():
        numbers = [len(result.passes[1][name].weights_UE) for result in results]
        if name == "everything":
            assert numbers == [TOKENS] * RANKS
        elif name == "nothing":
            assert numbers == [0] * RANKS
        else:
            assert numbers[SURE] == 0, name
            assert sum(numbers) > 20, name
        drops = max(result.passes[1][name].metrics["drop_share"].item() for result in results)
        assert (drops > 0.02) == (case.capacity.mode != "dropless"), name


# One row for a token and a rank


def wanted(weights_UE: Tensor, ep: int) -> Tensor:
    """[P] for each place of the group, the tokens that have an expert there."""
    return torch.tensor([int((part != 0).any(1).sum()) for part in weights_UE.chunk(ep, dim=1)])


@every_degree
@every_case
def test_a_rank_receives_a_token_once(name: str, ep: int) -> None:
    results, skipped = everything(), 0
    for first in range(0, RANKS, ep):
        group = range(first, first + ep)
        wanted_PP = torch.stack([wanted(results[rank].passes[ep][name].weights_UE, ep) for rank in group])
        for place, rank in enumerate(group):
            assert results[rank].sent[ep][name]["all"].rows == int(wanted_PP[:, place].sum())
        skipped += sum(len(results[rank].passes[ep][name].weights_UE) for rank in group) * ep - int(wanted_PP.sum())
    if "top_m" not in CASES[name].broadcast:
        assert skipped == 0
    elif name == "top_m":
        assert skipped > 0, "some ranks get a row and others do not"


@every_degree
@every_case
def test_bytes_are_counted_as_they_are_sent(name: str, ep: int) -> None:
    """The routers of the second pass see no vocabulary entries, so random choices are compared by bytes alone."""
    for result in everything():
        for sent in result.sent[ep][name].values():
            assert sent.declared == sent.moved


@every_degree
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.broadcast.get("choose") != "random"])
def test_a_row_costs_one_way_there_and_back_for_each_other_rank(name: str, ep: int) -> None:
    results, local = everything(), EXPERTS // ep
    value = CASES[name].dtype.itemsize
    for first in range(0, RANKS, ep):
        group = range(first, first + ep)
        wanted_PP = torch.stack([wanted(results[rank].passes[ep][name].weights_UE, ep) for rank in group])
        for place, rank in enumerate(group):
            sent = results[rank].sent[ep][name]
            there = int(wanted_PP[place].sum() - wanted_PP[place, place])
            back = int(wanted_PP[:, place].sum() - wanted_PP[place, place])
            rows = there * (WIDTH + local) + back * WIDTH
            assert sent["all"].moved - sent["without"].moved == rows * value + (ep - 1) * 8
            if "top_m" in CASES[name].broadcast:
                continue
            # By itself, each of the L experts of a rank would cost a row, its weight, and a row back.
            single = local * (there * (WIDTH + 1) + back * WIDTH)
            assert sent["per expert"].moved - sent["ragged without"].moved == single * value
            assert single - local * rows == local * there * (1 - local), "1/L but for the weights"


# Choosing among the tokens of all ranks

ACROSS = ResonanceRouterConfig(affinity="cosine", threshold=0.9, scope="ep_group")


def across_ranks() -> Pass:
    case = Case(ACROSS, CapacityConfig(mode="static", factor=0.6))
    return run(case, build(case, build_groups(Topology(RANKS, ep=RANKS)).ep))


def test_ep_group_scope_takes_broadcast_tokens_of_all_ranks_out() -> None:
    case = Case(ACROSS, CapacityConfig(mode="static", factor=0.6))
    alone = build(case, None)
    rows_TD = torch.cat([inputs(rank, case.dtype).view(TOKENS, WIDTH) for rank in range(RANKS)])
    plan = alone.router(rows_TD, Rows(sequences_T=torch.arange(RANKS * TOKENS) // SEQUENCE))
    expected = set(zip(plan.expert_ids_A.tolist(), plan.token_ids_A.tolist(), strict=True))
    found, number = set(), 0
    for rank, result in enumerate(run_ranks(across_ranks, RANKS)):
        found |= {(expert, token + rank * TOKENS) for expert, token in result.pairs}
        number += len(result.weights_UE)
    assert found == expected
    assert plan.broadcast is not None
    assert number == len(plan.broadcast.token_ids_U) > 20
