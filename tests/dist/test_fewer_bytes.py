"""Dispatchers that send a token once to a rank or once to a node: results of all_to_all, and bytes as predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megamoe.config.exchange_bytes import ByLink, Exchange, Spread, backward_bytes, forward_bytes, rows_per_token
from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.dispatch.broadcast import as_assignments
from megamoe.moe.dispatch.deduplicated import DeduplicatedDispatcher
from megamoe.moe.dispatch.expert_tensor import ExpertTensorDispatcher
from megamoe.moe.dispatch.groupwise import GroupwiseDispatcher
from megamoe.moe.dispatch.hierarchical import HierarchicalDispatcher
from megamoe.moe.dispatch.local import LocalDispatcher
from megamoe.moe.experts import Experts
from megamoe.moe.types import BroadcastRows, Choices, RoutingPlan
from megamoe.ops.plan import plan_rows
from megamoe.parallel.axis import axis_of
from megamoe.parallel.groups import ProcessGroup, build_groups
from megamoe.parallel.link import Link, Transfer
from megamoe.parallel.nodes import build_node_groups, tensor_parallel_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, assert_equal_bits, run_ranks
from megamoe.testing.waits import Waits

RANKS, EXPERTS, WIDTH, FFN = 4, 8, 16, 8


def blocks(ranks: int, per_node: int) -> tuple[int, ...]:
    """A map of ranks to nodes."""
    return tuple(rank // per_node for rank in range(ranks))


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape: int, seed: int) -> Tensor:
    """Small enough that every sum below is exact, in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


# What is sent


class CountingLink(Link):
    """Keeps what leaves this rank: bytes by phase and the global rank that they go to."""

    def __init__(self, group: ProcessGroup, log: list[tuple[str, int, int]]) -> None:
        super().__init__(group)
        self.log, self.peers = log, dist.get_process_group_ranks(group)

    def start(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, phase: str) -> Transfer:
        per_row = rows.element_size() * rows[:1].numel() if len(rows) else 0
        for peer, number in zip(self.peers, send or [len(rows) // self.num_ranks] * self.num_ranks, strict=True):
            self.log.append((phase, peer, number * per_row))
        return super().start(rows, send, receive, phase)

    def exchange(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, phase: str) -> Tensor:
        return self.start(rows, send, receive, phase).wait()


Log = list[tuple[str, int, int]]
Build = Callable[[Log], Dispatcher]


class Way(NamedTuple):
    """A dispatcher and the number of ranks that experts are spread over."""

    ep: int
    build: Build


def nodes_of(kind: Any, topology: Topology, node_of: tuple[int, ...]) -> Way:
    """A hierarchical dispatcher, its groups made at once."""
    made = build_node_groups(topology.groups("ep"), node_of)

    def build(log: Log) -> Dispatcher:
        links = CountingLink(made.between.handle, log), CountingLink(made.inside.handle, log)
        return kind(made.nodes, *links)

    return Way(topology.ep, build)


def ways(ranks: int = RANKS) -> dict[str, Way]:
    """Every dispatcher. Collective."""
    found, half = {}, tuple(rank % 2 for rank in range(ranks))
    for ep in (1, 2, 4):
        group = build_groups(Topology(ranks, ep=ep)).ep.handle
        for kind in (AllToAllDispatcher, DeduplicatedDispatcher):
            found[f"{kind.name}, ep {ep}"] = Way(ep, partial(_on_a_group, kind, group))
    whole, tp = Topology(ranks, ep=4), Topology(ranks, tp=2, ep=4)
    return found | {
        "hierarchical, 2 x 2": nodes_of(HierarchicalDispatcher, whole, blocks(ranks, 2)),
        "hierarchical, 2 x 2 in turn": nodes_of(HierarchicalDispatcher, whole, half),
        "hierarchical, 4 x 1": nodes_of(HierarchicalDispatcher, whole, blocks(ranks, 1)),
        "hierarchical, 1 x 4": nodes_of(HierarchicalDispatcher, whole, blocks(ranks, 4)),
        "hierarchical, 2 x 1": nodes_of(HierarchicalDispatcher, Topology(ranks, ep=2), half),
        "groupwise, tp 2": nodes_of(GroupwiseDispatcher, tp, tensor_parallel_groups(tp)),
    }


def _on_a_group(kind: Any, group: ProcessGroup, log: Log) -> Dispatcher:
    return kind(CountingLink(group, log))


FEWER = (
    "deduplicated, ep 1",
    "deduplicated, ep 2",
    "deduplicated, ep 4",
    "hierarchical, 2 x 2",
    "hierarchical, 2 x 2 in turn",
    "hierarchical, 4 x 1",
    "hierarchical, 1 x 4",
    "hierarchical, 2 x 1",
    "groupwise, tp 2",
)

# Plans


class Case(NamedTuple):
    tokens: tuple[int, ...] = (12, 12, 12, 12)
    top_k: int = 3
    choices: bool = True
    drop: float = 0.0
    """Share of choices that come to nothing."""
    bound: bool = False
    """More room than assignments: the last entries are nobody's."""
    only: int | None = None
    """The expert that all tokens choose."""
    broadcast: bool = False
    capacity: int | None = None
    dtype: torch.dtype = torch.float32


SOME_EMPTY = (9, 0, 5, 1)
CASES = {
    "choices": Case(),
    "assignments": Case(choices=False),
    "dropped": Case(drop=0.4),
    "dropped assignments": Case(drop=0.4, choices=False, bound=True),
    "bounded": Case(drop=0.3, bound=True, capacity=12),
    "a rank without tokens": Case(SOME_EMPTY),
    "a rank without tokens, assignments": Case(SOME_EMPTY, choices=False),
    "all on one expert": Case(top_k=1, only=5),
    "no tokens": Case((0, 0, 0, 0)),
    "nothing": Case(drop=1.0),
    "all experts": Case(top_k=EXPERTS),
    "broadcast": Case(drop=0.2, broadcast=True),
    "broadcast, a rank without tokens": Case(SOME_EMPTY, choices=False, bound=True, broadcast=True),
    "broadcast, fp64": Case(drop=0.2, broadcast=True, dtype=torch.float64),
    "fp64": Case(dtype=torch.float64),
    "bf16": Case(drop=0.2, dtype=torch.bfloat16),
}
OF_EXPERTS = ("d w1", "d w2", "d w3")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}


class Given(NamedTuple):
    plan: RoutingPlan
    leaves: dict[str, Tensor]
    """Gate weights."""


def given(case: Case, rank: int) -> Given:
    tokens, wide = case.tokens[rank], torch.float64 if case.dtype == torch.float64 else torch.float32
    random = drawn(tokens, EXPERTS, seed=rank)
    experts_TK = random.argsort(1)[:, : case.top_k]
    if case.only is not None:
        experts_TK = torch.full_like(experts_TK, case.only)
    chosen_U = torch.arange(0, tokens, 3) if case.broadcast else torch.arange(0)
    share = torch.rand(experts_TK.shape, generator=torch.Generator().manual_seed(20 + rank))
    experts_TK = experts_TK.masked_fill(share < case.drop, EXPERTS)
    experts_TK[chosen_U] = EXPERTS
    weights_TK = drawn(*experts_TK.shape, seed=50 + rank, dtype=wide).square().requires_grad_()
    plan = planned(experts_TK, weights_TK, EXPERTS, case.bound, case.choices)._replace(capacity=case.capacity)
    if not case.broadcast:
        return Given(plan, {"weights": weights_TK})
    leaf_UE = drawn(len(chosen_U), EXPERTS, seed=70 + rank, dtype=wide).square().requires_grad_()
    weights_UE = leaf_UE * (drawn(len(chosen_U), EXPERTS, seed=71 + rank) > -0.5)
    broadcast = BroadcastRows(chosen_U, weights_UE)
    return Given(plan._replace(broadcast=broadcast), {"weights": weights_TK, "broadcast weights": leaf_UE})


def planned(
    experts_TK: Tensor, weights_TK: Tensor, num_experts: int, bound: bool = False, choices: bool = True
) -> RoutingPlan:
    """As routers make plans."""
    place_TK, source_A, rows_per_expert_E = plan_rows(experts_TK, num_experts)
    source_A = source_A if bound else source_A[: int(rows_per_expert_E.sum())]
    any_A, nobody_A = source_A.clamp_min(0).long(), source_A < 0
    return RoutingPlan(
        any_A // experts_TK.shape[1],
        experts_TK.flatten()[any_A].masked_fill(nobody_A, num_experts),
        weights_TK.flatten()[any_A].masked_fill(nobody_A, 0.0),
        rows_per_expert_E,
        torch.empty(0),
        {},
        {},
        {},
        choices=Choices(experts_TK, weights_TK, place_TK, source_A) if choices else None,
    )


def experts_on(place: int, ep: int, dtype: torch.dtype) -> Experts:
    """Those of a rank; everyone draws all of them."""
    local = EXPERTS // ep
    experts = Experts(local, WIDTH, FFN).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(experts.parameters()):
            whole = drawn(EXPERTS, *parameter.shape[1:], seed=number) * 0.3
            parameter.copy_(whole[place * local : (place + 1) * local])
    return experts


# What comes of them


class Passed(NamedTuple):
    arrived: dict[str, Tensor]
    """Rows, weights and numbers of rows at the experts."""
    tensors: dict[str, Tensor]
    """Output and gradients."""
    exact: dict[str, Tensor]
    """With experts that give their rows back: the sum of a token's, and its gradient, in integers."""
    declared: int
    log: Log


def passed(case: Case, way: Way) -> Passed:
    rank = dist.get_rank()
    plan, leaves = given(case, rank)
    log: Log = []
    dispatcher, tokens = way.build(log), case.tokens[rank]
    if isinstance(dispatcher, AllToAllDispatcher | LocalDispatcher):
        plan = as_assignments(plan)
    experts = experts_on(rank % way.ep, way.ep, case.dtype)
    rows_TD = drawn(tokens, WIDTH, seed=100 + rank, dtype=case.dtype).requires_grad_()
    rows_RD, rows_per_expert_L, handle = dispatcher.dispatch(rows_TD, plan)
    out_TD = dispatcher.combine(experts(rows_RD, handle.weights_R, rows_per_expert_L), handle)
    sent = list(log)
    probe_TD = drawn(tokens, WIDTH, seed=200 + rank, dtype=case.dtype)
    targets = {"rows": rows_TD, **leaves, **dict(experts.named_parameters())}
    gradients = torch.autograd.grad(out_TD, list(targets.values()), probe_TD)
    tensors = {"out": out_TD.detach(), **{f"d {n}": g for n, g in zip(targets, gradients, strict=True)}}
    arrived = {"rows": rows_RD.detach(), "weights": handle.weights_R.detach(), "numbers": rows_per_expert_L}
    exact = movement(dispatcher, plan, tokens, case.dtype)
    return Passed(arrived, tensors, exact, handle.sent_bytes, sent)


def movement(dispatcher: Dispatcher, plan: RoutingPlan, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rank = dist.get_rank()
    rows_TD = integers(tokens, WIDTH, seed=300 + rank).to(dtype).requires_grad_()
    rows_RD, _, handle = dispatcher.dispatch(rows_TD, plan)
    out_TD = dispatcher.combine(rows_RD, handle)
    (d_rows_TD,) = torch.autograd.grad(out_TD, rows_TD, integers(tokens, WIDTH, seed=400 + rank).to(dtype))
    return {"out": out_TD.detach(), "d rows": d_rows_TD}


def copies(plan: RoutingPlan, tokens: int) -> Tensor:
    """[T, 1]: how many experts take each token."""
    whole = as_assignments(plan)
    return torch.bincount(whole.token_ids_A, minlength=tokens)[:, None]


def everything() -> dict[str, dict[str, Passed]]:
    """By way and case."""
    every = {"local": Way(1, lambda log: LocalDispatcher()), **ways()}
    return {name: {title: passed(case, way) for title, case in CASES.items()} for name, way in every.items()}


@cache
def results() -> list[dict[str, dict[str, Passed]]]:
    return run_ranks(everything, RANKS)


def degree(way: str) -> int:
    return {"ep 1": 1, "ep 2": 2, "2 x 1": 2}.get(way.split(", ")[1], 4)


every_case = pytest.mark.parametrize("case", CASES)
every_way = pytest.mark.parametrize("way", FEWER)


@every_way
@every_case
def test_experts_get_what_all_to_all_brings_them(case: str, way: str) -> None:
    for rank, result in enumerate(results()):
        expected, found = result[f"all_to_all, ep {degree(way)}"][case], result[way][case]
        for name, tensor in expected.arrived.items():
            assert_equal_bits(found.arrived[name], tensor, name=f"{name} on rank {rank}")
        assert int(found.arrived["numbers"].sum()) == len(found.arrived["rows"])


@every_way
@every_case
def test_movement_is_exact(case: str, way: str) -> None:
    """Experts that give rows back: a token's output is itself times the number of its experts."""
    for rank, result in enumerate(results()):
        tokens = CASES[case].tokens[rank]
        times_T1 = copies(given(CASES[case], rank).plan, tokens)
        exact = result[way][case].exact
        assert torch.equal(exact["out"].float(), integers(tokens, WIDTH, seed=300 + rank) * times_T1)
        assert torch.equal(exact["d rows"].float(), integers(tokens, WIDTH, seed=400 + rank) * times_T1)


@every_way
@every_case
def test_results_and_gradients_are_those_of_one_rank(case: str, way: str) -> None:
    rel, ep, ranks = TOLERANCE[CASES[case].dtype], degree(way), results()
    for rank, result in enumerate(ranks):
        for name, tensor in result["local"][case].tensors.items():
            found = result[way][case].tensors[name]
            if name not in OF_EXPERTS:
                assert_close(found, tensor, rel=rel, name=f"{name} on rank {rank}")
            else:
                # Rows at the experts have the bits and order of all_to_all, and so do their gradients.
                assert_equal_bits(found, result[f"all_to_all, ep {ep}"][case].tensors[name], name=name)
    for first in range(0, RANKS, ep):
        group = ranks[first : first + ep]
        for name in OF_EXPERTS:
            expected = torch.stack([result["local"][case].tensors[name].double() for result in group]).sum(0)
            found = torch.cat([result[way][case].tensors[name] for result in group])
            assert_close(found, expected.to(found.dtype), rel=rel, name=name)


@every_way
@every_case
def test_bytes_are_declared_as_they_are_sent(case: str, way: str) -> None:
    for rank, result in enumerate(results()):
        passed = result[way][case]
        assert passed.declared == sum(size for _, peer, size in passed.log if peer != rank)


def test_the_cases_are_what_they_are_called() -> None:
    for rank in range(RANKS):
        plans = {name: given(case, rank).plan for name, case in CASES.items()}
        assert len(plans["dropped"].token_ids_A) < 36
        assert int(plans["bounded"].rows_per_expert_E.sum()) < len(plans["bounded"].token_ids_A)
        assert int(plans["nothing"].rows_per_expert_E.sum()) == 0
        assert plans["all on one expert"].rows_per_expert_E.tolist() == [0, 0, 0, 0, 0, 12, 0, 0]
        assert plans["assignments"].choices is None
        weights_UE = plans["broadcast"].broadcast.weights_UE  # type: ignore[union-attr]
        assert len(weights_UE) == 4
        assert bool((weights_UE == 0).any())


# Once per rank, once per node


def pairs(case: str, rank: int, ranks: int) -> dict[int, int]:
    """How many rows of a rank are wanted on each of so many parts of the experts."""
    plan = as_assignments(given(CASES[case], rank).plan)
    parts = (plan.expert_ids_A // (EXPERTS // ranks)).tolist()
    return Counter(part for part, _ in set(zip(parts, plan.token_ids_A.tolist(), strict=True)))


def rows_sent(passed: Passed, phase: str, width: int) -> dict[int, int]:
    """To each rank, from the bytes of the larger of the two messages of a phase."""
    sizes: dict[int, list[int]] = {}
    for name, peer, size in passed.log:
        if name == phase:
            sizes.setdefault(peer, []).append(size)
    return {peer: found[0] // width for peer, found in sizes.items() if found[0]}


@every_case
def test_a_token_travels_once_to_a_rank(case: str) -> None:
    row = WIDTH * CASES[case].dtype.itemsize
    found = [result["deduplicated, ep 4"][case] for result in results()]
    wanted = [pairs(case, rank, 4) for rank in range(RANKS)]
    for rank in range(RANKS):
        assert rows_sent(found[rank], "dispatch", row) == wanted[rank]
        returned = {source: wanted[source][rank] for source in range(RANKS) if wanted[source][rank]}
        assert rows_sent(found[rank], "combine", row) == returned


@every_case
def test_a_token_travels_once_to_a_node_and_there_once_to_a_rank(case: str) -> None:
    row = WIDTH * CASES[case].dtype.itemsize
    found = [result["hierarchical, 2 x 2"][case] for result in results()]
    by_node = [pairs(case, rank, 2) for rank in range(RANKS)]
    by_rank = [pairs(case, rank, 4) for rank in range(RANKS)]
    for rank in range(RANKS):
        node, place = divmod(rank, 2)
        across = {2 * other + place: by_node[rank][other] for other in range(2) if by_node[rank][other]}
        assert rows_sent(found[rank], "dispatch between nodes", row) == across
        sources = (place, 2 + place)  # whose rows enter this node here
        within = {2 * node + to: sum(by_rank[source][2 * node + to] for source in sources) for to in range(2)}
        assert rows_sent(found[rank], "dispatch inside the node", row) == {p: n for p, n in within.items() if n}
        back = {source: by_node[source][node] for source in sources if by_node[source][node]}
        assert rows_sent(found[rank], "combine between nodes", row) == back


# Eight ranks: what evenly chosen experts cost, and what is predicted


LARGE, MANY, TOP_K, TOKENS, LONG = 8, 64, 8, 512, 64
SPREAD = {
    "all_to_all": Spread(MANY, TOP_K, LARGE, 4),
    "deduplicated": Spread(MANY, TOP_K, LARGE, 4),
    "hierarchical": Spread(MANY, TOP_K, LARGE, 4, 4),
    "groupwise": Spread(MANY, TOP_K, LARGE, 4, 2),
}
PER_NODE = 4


def one_of_eight() -> dict[str, dict[str, ByLink]]:
    """Bytes that this rank hands out by dispatcher, forward and backward."""
    rank, tp = dist.get_rank(), Topology(LARGE, tp=2, ep=LARGE)
    group = build_groups(Topology(LARGE, ep=LARGE)).ep.handle
    kinds: dict[str, Build] = {
        "all_to_all": partial(_on_a_group, AllToAllDispatcher, group),
        "deduplicated": partial(_on_a_group, DeduplicatedDispatcher, group),
        "hierarchical": nodes_of(HierarchicalDispatcher, tp, blocks(LARGE, PER_NODE)).build,
        "groupwise": nodes_of(GroupwiseDispatcher, tp, tensor_parallel_groups(tp)).build,
    }
    experts_TK = drawn(TOKENS, MANY, seed=rank).argsort(1)[:, :TOP_K]
    weights_TK = drawn(TOKENS, TOP_K, seed=50 + rank).requires_grad_()
    rows_TD = drawn(TOKENS, LONG, seed=100 + rank).requires_grad_()
    found = {}
    for name, build in kinds.items():
        log: Log = []
        dispatcher = build(log)
        plan = planned(experts_TK, weights_TK, MANY)
        rows_RD, _, handle = dispatcher.dispatch(rows_TD, plan)
        out_TD = dispatcher.combine(rows_RD * handle.weights_R[:, None], handle)
        forward = len(log)
        torch.autograd.grad(out_TD, [rows_TD, weights_TK], torch.ones_like(out_TD))
        found[name] = {"forward": by_link(log[:forward], rank), "backward": by_link(log[forward:], rank)}
    return found


def by_link(log: Log, rank: int) -> ByLink:
    found = Counter[str]()
    for _, peer, size in log:
        near = peer // PER_NODE == rank // PER_NODE
        found["itself" if peer == rank else "inside" if near else "between"] += size
    return ByLink(**found)


@cache
def eight() -> dict[str, dict[str, ByLink]]:
    """On average over the ranks."""
    results = run_ranks(one_of_eight, LARGE)
    return {
        name: {
            way: ByLink(*(sum(result[name][way][i] for result in results) / LARGE for i in range(3)))
            for way in ("forward", "backward")
        }
        for name in SPREAD
    }


@pytest.mark.parametrize("name", SPREAD)
def test_bytes_by_kind_of_link_are_those_predicted(name: Exchange) -> None:
    """As exactly as 4096 tokens that choose by chance show it."""
    predicted = {
        "forward": forward_bytes(name, SPREAD[name], TOKENS, LONG * 4),
        "backward": backward_bytes(name, SPREAD[name], TOKENS, LONG * 4),
    }
    for way, expected in predicted.items():
        for link, size in expected._asdict().items():
            assert getattr(eight()[name][way], link) == pytest.approx(size, rel=0.02), (way, link)


def test_deduplication_cuts_a_third_of_the_bytes() -> None:
    rows = {name: rows_per_token(name, SPREAD[name]).sent for name in ("all_to_all", "deduplicated")}
    assert 1 - rows["deduplicated"] / rows["all_to_all"] == pytest.approx(0.321, abs=5e-4)
    sent = {name: sum(found[way].sent for way in found) for name, found in eight().items()}
    # Lists of experts and numbers of rows with it, which rows of 256 bytes make much of.
    assert 1 - sent["deduplicated"] / sent["all_to_all"] == pytest.approx(0.32, abs=0.008)


def test_nodes_are_entered_once() -> None:
    between = {name: found["forward"].between for name, found in eight().items()}
    assert between["hierarchical"] < 0.4 * between["deduplicated"] < 0.4 * between["all_to_all"]


# Broadcast tokens


def broadcast_bytes() -> dict[int, tuple[int, int]]:
    """Of 5 tokens that go to all E experts: bytes of rows, and of what says for which experts with which weight."""
    group, rank = build_groups(Topology(RANKS, ep=RANKS)).ep.handle, dist.get_rank()
    found = {}
    for experts in (8, 32):
        log: Log = []
        dispatcher = DeduplicatedDispatcher(CountingLink(group, log))
        nobody = planned(torch.full((9, 2), experts), torch.ones(9, 2), experts)
        broadcast = BroadcastRows(torch.arange(5) + 2, torch.full((5, experts), 1 / experts))
        rows_RD, _, handle = dispatcher.dispatch(integers(9, WIDTH, seed=rank), nobody._replace(broadcast=broadcast))
        dispatcher.combine(rows_RD, handle)
        sizes = [size for phase, peer, size in log if peer != rank and phase != "counts"]
        rows, lists = sum(sizes[:3]) + sum(sizes[6:]), sum(sizes[3:6])
        assert handle.sent_bytes == rows + lists + (RANKS - 1) * 3 * 8
        found[experts] = rows, lists
    return found


def test_a_broadcast_token_costs_a_row_for_each_rank_and_not_for_each_expert() -> None:
    for found in run_ranks(broadcast_bytes, RANKS):
        for experts, (rows, lists) in found.items():
            assert rows == 5 * (RANKS - 1) * 2 * WIDTH * 4
            assert lists == 5 * (RANKS - 1) * experts // RANKS * 6


# Inside a training step


def recomputed() -> list[str]:
    """Phases of a pass with gradients that is recomputed."""
    log: Log = []
    group = build_groups(Topology(2, ep=2)).ep
    dispatcher = DeduplicatedDispatcher(CountingLink(group.handle, log))
    plan = planned(torch.tensor([[0, 5], [7, 6], [2, 3]]), torch.ones(3, 2), EXPERTS)
    experts = experts_on(group.place, 2, torch.float32)

    def through(rows_TD: Tensor) -> Tensor:
        return dispatcher.through(rows_TD, plan, experts).out_TD

    rows_TD = drawn(3, WIDTH, seed=group.place).requires_grad_()
    out_TD = checkpoint(through, rows_TD, use_reentrant=False)
    out_TD.sum().backward()
    assert torch.equal(rows_TD.grad, torch.autograd.grad(through(rows_TD).sum(), rows_TD)[0])
    return [phase for phase, peer, _ in log if peer == group.place]


def test_a_recomputed_pass_does_not_go_home_again() -> None:
    there, back = ["counts", "dispatch", "dispatch"], ["dispatch backward", "dispatch backward"]
    once = [*there, "combine", "combine backward", *there, *back]
    assert run_ranks(recomputed, 2) == [[*once, *there, "combine", "combine backward", *back]] * 2


def waits() -> tuple[list[str], list[str]]:
    """What the host waits for in a pass with gradients, without nodes and with them."""
    topology, found = Topology(2, ep=2), []
    group = build_groups(topology).ep.handle
    ways = (
        partial(_on_a_group, DeduplicatedDispatcher, group),
        nodes_of(HierarchicalDispatcher, topology, (0, 1)).build,
    )
    for build in ways:
        dispatcher = build([])
        rows_TD, weights_TK = drawn(3, WIDTH, seed=1).requires_grad_(), torch.ones(3, 2).requires_grad_()
        plan = planned(torch.tensor([[0, 5], [7, 6], [2, EXPERTS]]), weights_TK, EXPERTS, bound=True)
        with Waits() as seen:
            rows_RD, _, handle = dispatcher.dispatch(rows_TD, plan)
            out_TD = dispatcher.combine(rows_RD * handle.weights_R[:, None], handle)
            torch.autograd.grad(out_TD, [rows_TD, weights_TK], torch.ones_like(out_TD))
        found.append(seen.found)
    return found[0], found[1]


def test_the_host_waits_for_numbers_of_rows_alone() -> None:
    assert run_ranks(waits, 2) == [(["tolist"], ["tolist", "tolist"])] * 2


def parts_of_experts() -> float:
    """Largest difference of results where experts are cut over ranks from those of whole experts."""
    topology = Topology(RANKS, ep=2, etp=2)
    groups, rank = build_groups(topology), dist.get_rank()
    half, place = axis_of(groups.etp), groups.ep.place
    whole = experts_on(place, 2, torch.float32)
    cut = Experts(EXPERTS // 2, WIDTH, FFN, etp=half)
    with torch.no_grad():
        for name, dim in (("w1", 1), ("w2", 2), ("w3", 1)):
            getattr(cut, name).copy_(getattr(whole, name).chunk(2, dim)[half.rank])
    plan, rows_TD = given(CASES["choices"], rank).plan, drawn(12, WIDTH, seed=rank)
    inner = DeduplicatedDispatcher(Link(groups.ep.handle))
    found = ExpertTensorDispatcher(inner, half).through(rows_TD, plan, cut).out_TD
    expected = LocalDispatcher().through(rows_TD, plan, experts_on(0, 1, torch.float32)).out_TD
    return float((found - expected).abs().max() / expected.abs().max())


def test_experts_may_be_cut_over_ranks() -> None:
    assert max(run_ranks(parts_of_experts, RANKS)) < 1e-6
