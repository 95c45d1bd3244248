"""Experts cut over ranks: rows of all ranks reach every part, and results equal those of whole experts on one rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.common.errors import TopologyError
from megamoe.moe.dispatch import build_dispatcher
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.dispatch.broadcast import as_assignments
from megamoe.moe.dispatch.expert_tensor import ExpertTensorDispatcher
from megamoe.moe.dispatch.local import LocalDispatcher
from megamoe.moe.experts import Experts
from megamoe.moe.routers.base import count
from megamoe.moe.types import BroadcastRows, RoutingPlan
from megamoe.parallel.axis import Axis, axis_of
from megamoe.parallel.exchanges import RECORD
from megamoe.parallel.groups import Groups, build_groups
from megamoe.parallel.shards import Shard, part, shards_of, whole_shape
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, run_ranks

EXPERTS, WIDTH, FFN = 4, 6, 8
CAPACITY = 3
"""Rows of a rank for one expert, at most, in every plan below."""

LAYOUTS = {"etp 2": Topology(2, etp=2), "etp 4": Topology(4, etp=4), "ep 2 x etp 2": Topology(4, ep=2, etp=2)}
MODES = ("all_to_all", "padded", "broadcast", "padded, broadcast")

Pairs = list[tuple[int, int]]
"""(expert, token), in the order of a plan."""

PLANS: dict[str, list[tuple[int, Pairs]]] = {
    # Tokens of a rank and its plan, per rank; two ranks take the first two. Expert 2 has no rows in the first.
    "mixed": [
        (3, [(0, 0), (0, 2), (1, 1), (3, 0), (3, 2)]),
        (2, [(0, 1), (3, 0), (3, 1)]),
        (4, [(0, 2), (1, 0), (1, 3), (3, 0)]),
        (1, [(0, 0), (1, 0), (3, 0)]),
    ],
    "a rank without tokens": [(2, [(1, 0), (2, 1)]), (0, []), (3, [(0, 0), (0, 1), (0, 2)]), (1, [(3, 0)])],
    "all on one expert": [(n, [(2, token) for token in range(n)]) for n in (3, 2, 1, 3)],
    "nothing at all": [(2, []), (0, []), (1, []), (0, [])],
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_plan = pytest.mark.parametrize("name", PLANS)

Work = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What experts are: rows, gate weights, rows per expert -> rows."""


def integers(*shape: int, seed: int) -> Tensor:
    """Small enough that every product and sum below is exact in fp32, in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Given(NamedTuple):
    """What one rank brings."""

    rows_TD: Tensor
    plan: RoutingPlan
    probe_TD: Tensor
    """The loss is the sum of results times it."""

    def leaves(self) -> dict[str, Tensor]:
        broadcast = {} if self.plan.broadcast is None else {"broadcast": self.plan.broadcast.weights_UE}
        return {"rows": self.rows_TD, "weights": self.plan.weights_A, **broadcast}


def given(name: str, mode: str, exact: bool, rank: int) -> Given:
    """Exact: fp32 in which nothing is rounded; else fp64. With broadcasting, a rank's last token goes to experts 0, 2
    and 3 besides."""
    tokens, pairs = PLANS[name][rank]
    draw = integers if exact else drawn
    experts_A, tokens_A = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in range(2))
    # Gate weights are not negative.
    weights_A = (1 + draw(len(pairs), seed=50 + rank).abs()) / 8
    capacity, broadcast = (CAPACITY if "padded" in mode else None), None
    if "broadcast" in mode:
        ids_U = torch.arange(tokens)[-1:]
        weights_UE = torch.tensor([0.125, 0.0, 0.5, 0.25], dtype=weights_A.dtype).expand(len(ids_U), -1).clone()
        broadcast = BroadcastRows(ids_U, weights_UE)
    counts_E = count(experts_A, EXPERTS)
    plan = RoutingPlan(tokens_A, experts_A, weights_A, counts_E, torch.empty(0), {}, {}, {}, capacity, broadcast)
    found = Given(draw(tokens, WIDTH, seed=rank), plan, draw(tokens, WIDTH, seed=100 + rank))
    for leaf in found.leaves().values():
        leaf.requires_grad_()
    return found


def together(ranks: list[Given]) -> Given:
    """The rows and plans of all ranks as those of one; gradients of its leaves reach theirs."""
    starts = [sum(len(other.rows_TD) for other in ranks[:rank]) for rank in range(len(ranks))]
    plans = [rank.plan for rank in ranks]
    experts_A = torch.cat([plan.expert_ids_A for plan in plans])
    order_A = torch.sort(experts_A, stable=True).indices
    first, broadcast = plans[0], None
    if first.broadcast is not None:
        rows = [plan.broadcast for plan in plans if plan.broadcast is not None]
        ids_U = torch.cat([row.token_ids_U + start for row, start in zip(rows, starts, strict=True)])
        broadcast = BroadcastRows(ids_U, torch.cat([row.weights_UE for row in rows]))
    plan = first._replace(
        token_ids_A=torch.cat([p.token_ids_A + start for p, start in zip(plans, starts, strict=True)])[order_A],
        expert_ids_A=experts_A[order_A],
        weights_A=torch.cat([p.weights_A for p in plans])[order_A],
        rows_per_expert_E=torch.stack([p.rows_per_expert_E for p in plans]).sum(0),
        broadcast=broadcast,
    )
    rows_TD, probe_TD = torch.cat([rank.rows_TD for rank in ranks]), torch.cat([rank.probe_TD for rank in ranks])
    return Given(rows_TD, as_assignments(plan), probe_TD)


class Result(NamedTuple):
    received_RD: Tensor
    weights_R: Tensor
    rows_per_expert_L: list[int]
    out_TD: Tensor
    loss: Tensor


def passed(dispatcher: Dispatcher, work: Work, here: Given) -> Result:
    rows_RD, rows_per_expert_L, handle = dispatcher.dispatch(here.rows_TD, here.plan)
    out_TD = dispatcher.combine(work(rows_RD, handle.weights_R, rows_per_expert_L), handle)
    loss = (out_TD * here.probe_TD).sum()
    return Result(rows_RD.detach(), handle.weights_R.detach(), rows_per_expert_L.tolist(), out_TD.detach(), loss)


class Found(NamedTuple):
    """Of one rank."""

    result: Result
    gradients: dict[str, Tensor]
    coordinates: dict[str, int]
    sent: tuple[int, int, int]
    """Bytes in the forward pass as declared, as they went to other ranks, and as the record of exchanges has them."""


def identity(etp: Axis) -> Work:
    """Rows times gate weights, of which each part makes some of the columns: the parts' sum is whole."""
    own_D = (torch.arange(WIDTH) % etp.size == etp.rank).float()
    return lambda rows_RD, weights_R, rows_per_expert_L: rows_RD * weights_R[:, None].to(rows_RD.dtype) * own_D


def real(axes: dict[str, Axis]) -> Experts:
    """Part of experts that every rank draws whole. Their parts are where the parameters say."""
    experts = Experts(EXPERTS // axes["ep"].size, WIDTH, FFN, etp=axes["etp"]).double()
    with torch.no_grad():
        for number, parameter in enumerate((experts.w1, experts.w2, experts.w3)):
            whole = drawn(*whole_shape(parameter, axes), seed=number) * 0.4
            parameter.copy_(part(whole, shards_of(parameter), axes))
    return experts


def dispatcher_of(mode: str, groups: Groups) -> Dispatcher:
    name = "padded" if "padded" in mode else "all_to_all"
    etp = axis_of(groups.etp)
    dispatcher = build_dispatcher(name, groups.ep.handle, broadcasts="broadcast" in mode, etp=etp)
    assert isinstance(dispatcher, ExpertTensorDispatcher)
    assert dispatcher.name == name
    return dispatcher


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Bytes that this rank hands to collectives for other ranks."""
    exchange, gather, total = dist.all_to_all_single, dist.all_gather, [0]

    def counted_exchange(
        out: Tensor, sent: Tensor, receive: Any = None, send: Any = None, **how: Any
    ) -> dist.Work | None:
        group = how["group"]
        ranks = dist.get_world_size(group)
        splits = [len(sent) // ranks] * ranks if send is None else send
        total[0] += (sum(splits) - splits[dist.get_rank(group)]) * sent[0].nbytes if len(sent) else 0
        return exchange(out, sent, receive, send, **how)

    def counted_gather(out: list[Tensor], sent: Tensor, group: Any) -> None:
        total[0] += (len(out) - 1) * sent.nbytes
        gather(out, sent, group=group)

    dist.all_to_all_single, dist.all_gather = counted_exchange, counted_gather  # type: ignore[assignment]
    try:
        yield lambda: total[0]
    finally:
        dist.all_to_all_single, dist.all_gather = exchange, gather


def sent_by(dispatcher: Dispatcher, here: Given) -> tuple[int, int, int]:
    """After a pass: what ranks compare the first time only is not a part of what is sent for a layer."""
    RECORD.begin_step(on_gpu=False)
    with counting() as moved:
        rows_RD, _, handle = dispatcher.dispatch(here.rows_TD, here.plan)
        dispatcher.combine(rows_RD, handle)
        RECORD.end_step()
        assert RECORD.last is not None
        return handle.sent_bytes, moved(), sum(exchange.sent_bytes for exchange in RECORD.last.exchanges)


def on_a_rank(topology: Topology) -> dict[tuple[str, str, bool], Found]:
    groups = build_groups(topology)
    axes = {"ep": axis_of(groups.ep), "etp": axis_of(groups.etp)}
    coordinates, found = topology.coordinates(groups.rank), {}
    for mode in MODES:
        dispatcher = dispatcher_of(mode, groups)
        for name in PLANS:
            for exact in (True, False):
                here = given(name, mode, exact, groups.rank)
                experts = None if exact else real(axes)
                result = passed(dispatcher, experts or identity(axes["etp"]), here)
                targets = here.leaves() | (dict(experts.named_parameters()) if experts else {})
                grads = torch.autograd.grad(result.loss, list(targets.values()))
                gradients = dict(zip(targets, grads, strict=True))
                sent = sent_by(dispatcher, here)
                detached = result._replace(loss=result.loss.detach())
                found[mode, name, exact] = Found(detached, gradients, coordinates, sent)
    return found


@cache
def everything(layout: str) -> list[dict[tuple[str, str, bool], Found]]:
    return run_ranks(on_a_rank, LAYOUTS[layout].world_size, LAYOUTS[layout])


def results(layout: str, mode: str, name: str, exact: bool) -> list[Found]:
    return [rank[mode, name, exact] for rank in everything(layout)]


def alone(ranks: list[Given], work: Work, parameters: dict[str, Tensor]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """One process with whole experts and everyone's rows: results, and gradients of each rank's leaves."""
    result = passed(LocalDispatcher(), work, together(ranks))
    targets = [rank.leaves() | parameters for rank in ranks]
    gradients = [torch.autograd.grad(result.loss, list(t.values()), retain_graph=True) for t in targets]
    return result.out_TD, [dict(zip(t, g, strict=True)) for t, g in zip(targets, gradients, strict=True)]


@every_plan
@every_mode
@every_layout
def test_identity_experts_are_exact(layout: str, mode: str, name: str) -> None:
    found = results(layout, mode, name, exact=True)
    ranks = [given(name, mode, True, rank) for rank in range(len(found))]
    out_TD, gradients = alone(ranks, identity(Axis()), {})
    assert torch.equal(torch.cat([rank.result.out_TD for rank in found]), out_TD)
    for rank, expected in zip(found, gradients, strict=True):
        assert rank.gradients.keys() == expected.keys()
        for leaf, gradient in expected.items():
            assert torch.equal(rank.gradients[leaf], gradient), leaf


@every_plan
@every_mode
@every_layout
def test_real_experts_give_what_whole_ones_give(layout: str, mode: str, name: str) -> None:
    found = results(layout, mode, name, exact=False)
    ranks = [given(name, mode, False, rank) for rank in range(len(found))]
    experts = real({"ep": Axis(), "etp": Axis()})
    out_TD, gradients = alone(ranks, experts, dict(experts.named_parameters()))
    assert_close(torch.cat([rank.result.out_TD for rank in found]), out_TD, rel=1e-13, name="output")
    topology = LAYOUTS[layout]
    for rank, expected in zip(found, gradients, strict=True):
        axes = {axis: Axis(topology.degree(axis), rank.coordinates[axis]) for axis in ("ep", "etp")}
        assert rank.gradients.keys() == expected.keys()
        for leaf, gradient in expected.items():
            cuts = shards_of(experts.get_parameter(leaf)) if leaf in ("w1", "w2", "w3") else ()
            assert_close(rank.gradients[leaf], part(gradient, cuts, axes), rel=1e-13, name=leaf)


@every_plan
@pytest.mark.parametrize("mode", ["all_to_all", "padded"])
@every_layout
def test_every_part_gets_the_rows_of_all_ranks_by_expert_and_source(layout: str, mode: str, name: str) -> None:
    found, topology = results(layout, mode, name, exact=True), LAYOUTS[layout]
    ranks = [given(name, mode, True, rank) for rank in range(len(found))]
    for here in found:
        local = EXPERTS // topology.ep
        experts = range(here.coordinates["ep"] * local, (here.coordinates["ep"] + 1) * local)
        arrivals = sorted(
            (expert, found[sender].coordinates["etp"], found[sender].coordinates["ep"], token, sender, place)
            for sender in range(len(found))
            for place, (expert, token) in enumerate(PLANS[name][sender][1])
            if expert in experts
        )
        rows = [ranks[sender].rows_TD[token] for *_, token, sender, _ in arrivals]
        weights = [ranks[sender].plan.weights_A[place] for *_, sender, place in arrivals]
        assert torch.equal(here.result.received_RD, torch.stack(rows) if rows else torch.empty(0, WIDTH))
        assert torch.equal(here.result.weights_R, torch.stack(weights) if weights else torch.empty(0))
        assert here.result.rows_per_expert_L == [
            sum(arrival[0] == expert for arrival in arrivals) for expert in experts
        ]


@every_plan
@every_mode
@every_layout
def test_bytes_are_counted_as_they_are_sent(layout: str, mode: str, name: str) -> None:
    found = results(layout, mode, name, exact=True)
    for here in found:
        declared, moved, recorded = here.sent
        assert declared == moved
        assert recorded == moved, "nothing is waited for that the record does not know"
    assert any(here.sent[0] > 0 for here in found)


def test_experts_say_how_they_are_cut() -> None:
    for etp in (Axis(), Axis(4, 1)):
        experts = Experts(2, WIDTH, FFN, etp=etp)
        assert experts.w1.shape == experts.w3.shape == (2, FFN // etp.size, WIDTH)
        assert experts.w2.shape == (2, WIDTH, FFN // etp.size)
        assert shards_of(experts.w1) == shards_of(experts.w3) == (Shard(0, "ep"), Shard(1, "etp"))
        assert shards_of(experts.w2) == (Shard(0, "ep"), Shard(2, "etp"))
    with pytest.raises(TopologyError, match="width 8 cannot be cut into 3 equal parts"):
        Experts(2, WIDTH, FFN, etp=Axis(3, 0))


def test_parts_need_a_group() -> None:
    with pytest.raises(ValueError, match="process group"):
        build_dispatcher("local", None, etp=Axis(2, 0))
    assert isinstance(build_dispatcher("local", None, etp=Axis()), LocalDispatcher)
