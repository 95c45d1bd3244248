"""Rows that are written straight into the peers' memory: the bits of the other dispatchers, and an error in time."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megamoe.common.errors import LostPeerError
from megamoe.config.moe import CapacityConfig, MoEConfig
from megamoe.moe.dispatch import push_window
from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.dispatch.local import LocalDispatcher
from megamoe.moe.dispatch.padded import PaddedDispatcher
from megamoe.moe.dispatch.push import PushDispatcher
from megamoe.moe.dispatch.push_window import Way, Window, shared_window
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers import base
from megamoe.moe.types import Choices, RoutingPlan
from megamoe.ops import push
from megamoe.ops.plan import plan_rows
from megamoe.parallel import symmetric
from megamoe.parallel.exchanges import RECORD
from megamoe.parallel.groups import RankGroup, build_groups
from megamoe.parallel.link import Link
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, assert_equal_bits, run_ranks
from megamoe.testing.waits import Waits

EXPERTS, TOP_K, WIDTH, FFN, CAPACITY = 8, 2, 24, 12, 40


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if reason := push.unavailable(torch.device("cpu"), torch.float32):
        pytest.skip(reason)


def ep_group(ranks: int) -> RankGroup:
    return build_groups(Topology(ranks, ep=ranks)).ep


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Movement alone

CASES: dict[str, Callable[[int], tuple[int, float]]] = {
    # By rank: tokens, and the share of choices that an expert has dropped.
    "even": lambda rank: (24, 0.0),
    "ragged, with drops": lambda rank: (5 + 9 * rank, 0.4),
    "a rank without tokens": lambda rank: (0 if rank == 1 else 17, 0.1),
    "all on one expert": lambda rank: (CAPACITY, 0.0),
    "nothing at all": lambda rank: (rank, 1.0),
}


def drawn_plan(case: str, rank: int, of_choices: bool) -> tuple[int, RoutingPlan]:
    """Tokens of a rank, and their plan."""
    tokens, dropped = CASES[case](rank)
    generator = torch.Generator().manual_seed(7 * rank + 1)
    experts_TK = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
    if case == "all on one expert":
        experts_TK[:, 0], experts_TK[:, 1] = EXPERTS - 1, EXPERTS
    experts_TK[torch.rand(tokens, TOP_K, generator=generator) < dropped] = EXPERTS
    planned = plan_rows(experts_TK, EXPERTS, implementation="reference")
    source_A = planned.source_R[: int(planned.rows_per_expert_E.sum())]
    weights_TK = torch.rand(tokens, TOP_K, generator=generator).requires_grad_()
    choices = Choices(experts_TK, weights_TK, planned.place_TK, source_A)
    plan = RoutingPlan(
        source_A.long() // TOP_K,
        experts_TK.flatten()[source_A.long()],
        weights_TK.flatten()[source_A.long()],
        planned.rows_per_expert_E,
        torch.empty(0),
        {},
        {},
        {},
        CAPACITY,
        choices=choices,
    )
    return tokens, plan if of_choices else plan._replace(choices=None)


class Moved(NamedTuple):
    received_RD: Tensor
    weights_R: Tensor
    rows_per_expert_L: Tensor
    out_TD: Tensor
    d_rows_TD: Tensor
    d_weights_TK: Tensor
    sent_bytes: int


def moved(dispatcher: Dispatcher, case: str, of_choices: bool, dtype: torch.dtype, step: int = 0) -> Moved:
    """What comes back is three times what has arrived; the loss asks for every row, weight and result."""
    rank = torch.distributed.get_rank()
    tokens, plan = drawn_plan(case, rank, of_choices)
    rows_TD = drawn(tokens, WIDTH, seed=100 * step + rank, dtype=dtype).requires_grad_()
    received_RD, rows_per_expert_L, handle = dispatcher.dispatch(rows_TD, plan)
    out_TD = dispatcher.combine(received_RD * 3, handle)
    probe_TD = drawn(tokens, WIDTH, seed=1000 + rank, dtype=dtype)
    loss = (out_TD * probe_TD).sum() + handle.weights_R.square().sum() + received_RD.square().sum()
    weights = plan.choices.weights_TK if plan.choices is not None else plan.weights_A
    d_rows_TD, d_weights_TK = torch.autograd.grad(loss, [rows_TD, weights])
    num_rows = int(rows_per_expert_L.sum())
    received_RD, weights_R = received_RD.detach(), handle.weights_R.detach()
    assert not received_RD[num_rows:].any()
    assert not weights_R[num_rows:].any()
    kept = received_RD[:num_rows], weights_R[:num_rows], rows_per_expert_L
    return Moved(*kept, out_TD.detach(), d_rows_TD, d_weights_TK, handle.sent_bytes)


def moved_by_all(dtype: torch.dtype, cases: tuple[str, ...]) -> dict[tuple[str, bool], dict[str, Moved]]:
    """Every case by every dispatcher. Push keeps its window through all of them."""
    group = ep_group(torch.distributed.get_world_size()).handle
    dispatchers: list[Dispatcher] = [PushDispatcher(Link(group)), AllToAllDispatcher(Link(group))]
    results: dict[tuple[str, bool], dict[str, Moved]] = {}
    for case in cases:
        for of_choices in (True, False):
            found = {each.name: moved(each, case, of_choices, dtype) for each in dispatchers}
            if len({CASES[case](rank)[0] for rank in range(4)}) == 1:
                found["padded"] = moved(PaddedDispatcher(Link(group)), case, of_choices, dtype)
            results[case, of_choices] = found
    return results


@cache
def movement(ranks: int, dtype: torch.dtype) -> list[dict[tuple[str, bool], dict[str, Moved]]]:
    return run_ranks(moved_by_all, ranks, dtype, tuple(CASES))


@pytest.mark.parametrize("of_choices", [True, False], ids=["choices", "assignments"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "ranks, dtype",
    [
        (2, torch.float32),
        (4, torch.bfloat16),
        pytest.param(4, torch.float32, marks=pytest.mark.thorough),
        pytest.param(2, torch.float64, marks=pytest.mark.thorough),
        pytest.param(1, torch.float32, marks=pytest.mark.thorough),
    ],
)
def test_the_bits_are_those_of_other_dispatchers(ranks: int, dtype: torch.dtype, case: str, of_choices: bool) -> None:
    for results in movement(ranks, dtype):
        found = results[case, of_choices]
        for name in found.keys() - {"push"}:
            for what in Moved._fields[:-1]:
                assert_equal_bits(getattr(found["push"], what), getattr(found[name], what), name=f"{what} of {name}")
        if dtype == torch.float32:  # what counts is the rows: the numbers of them are half as wide as all_to_all's
            counts = (ranks - 1) * EXPERTS * 4
            assert found["push"].sent_bytes - counts == found["all_to_all"].sent_bytes - counts * 2 // ranks


# The layer


class Step(NamedTuple):
    out_TD: Tensor
    grads: dict[str, Tensor]


def built(ep: RankGroup | None, seed: int) -> MoELayer:
    config = MoEConfig(
        num_experts=EXPERTS, expert_ffn_size=FFN, capacity=CapacityConfig(mode="static", factor=1.0), dispatcher="auto"
    )
    place = ExpertParallel(ep.size, ep.place, ep.handle) if ep is not None else ExpertParallel()
    layer = MoELayer(config, WIDTH, place).train()
    local = EXPERTS // place.size
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(layer.named_parameters())):
            if name.startswith("experts."):
                whole = drawn(EXPERTS, *parameter.shape[1:], seed=seed + number) * 0.4
                parameter.copy_(whole[place.rank * local : (place.rank + 1) * local])
            else:
                parameter.copy_(drawn(*parameter.shape, seed=seed + number) * 0.3)
    return layer


def passed(layers: list[MoELayer], step: int, rank: int, recompute: bool) -> Step:
    x_TD = drawn(32, WIDTH, seed=500 * step + rank).requires_grad_()
    hidden_TD: Tensor = x_TD
    for layer in layers:
        run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
        hidden_TD = hidden_TD + run(hidden_TD)[0]
    named = {"x": x_TD} | {f"{i}.{n}": p for i, layer in enumerate(layers) for n, p in layer.named_parameters()}
    grads = torch.autograd.grad((hidden_TD * drawn(32, WIDTH, seed=9)).sum(), list(named.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    return Step(hidden_TD.detach(), found)


WAYS = ("padded", "shared", "own", "recomputed")


def layer_steps(num_steps: int) -> dict[str, list[Step]]:
    """Two layers, step after step, by every way."""
    ep = ep_group(torch.distributed.get_world_size())
    results: dict[str, list[Step]] = {}
    for way in WAYS:
        layers = [built(ep, seed) for seed in (0, 50)]
        for number, layer in enumerate(layers):
            if way != "padded":
                own = Window(ep.handle, torch.device("cpu"))
                windows = (lambda rows, num_local, own=own: own) if way == "own" else None
                layer.dispatcher = PushDispatcher(Link(ep.handle, number), windows=windows)
        results[way] = [passed(layers, step, ep.place, way == "recomputed") for step in range(num_steps)]
    shared = shared_window(ep.handle, torch.zeros(1), EXPERTS // ep.size)
    assert shared.reason == ""
    assert shared._number >= num_steps * 2 * 4, "rows were pushed, and both buffers used again"
    return results


def alone(num_ranks: int, num_steps: int) -> list[list[Step]]:
    """Of each rank its tokens through all experts at once."""
    layers = [built(None, seed) for seed in (0, 50)]
    assert all(isinstance(layer.dispatcher, LocalDispatcher) for layer in layers)
    return [[passed(layers, step, rank, False) for step in range(num_steps)] for rank in range(num_ranks)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_layers_give_what_they_give_by_other_ways(ranks: int) -> None:
    steps = 3
    expected = alone(ranks, steps)
    for rank, results in enumerate(run_ranks(layer_steps, ranks, steps)):
        for way in WAYS:
            for step in range(steps):
                found, wanted = results[way][step], expected[rank][step]
                assert_close(found.out_TD, wanted.out_TD, rel=1e-5, name=f"output, {way}")
                assert_close(found.grads["x"], wanted.grads["x"], rel=1e-5, name=f"input, {way}")
                padded = results["padded"][step]
                assert found.grads.keys() == padded.grads.keys()
                for name, grad in padded.grads.items():
                    assert_close(found.grads[name], grad, rel=1e-5, abs=1e-7, name=f"{name}, {way}")


# What happens beside


def grown_and_waited() -> tuple[list[str], bool]:
    """Backward through an exchange of a window that has grown since; and what the host waits for."""
    group = ep_group(2).handle
    dispatcher = PushDispatcher(Link(group))
    rank = torch.distributed.get_rank()
    tokens, plan = drawn_plan("even", rank, True)
    rows_TD = drawn(tokens, WIDTH, seed=rank).requires_grad_()
    received_RD, _, handle = dispatcher.dispatch(rows_TD, plan)
    dispatcher.dispatch(rows_TD, plan._replace(capacity=3 * CAPACITY))
    out_TD = dispatcher.combine(received_RD, handle)
    wanted_TD = rows_TD.detach() * TOP_K
    assert plan.choices is not None
    probe_TD = drawn(tokens, WIDTH, seed=3)
    (d_rows_TD,) = torch.autograd.grad((out_TD * probe_TD).sum(), [rows_TD])
    same = torch.equal(out_TD.detach(), wanted_TD) and torch.equal(d_rows_TD, probe_TD * TOP_K)
    base.waiting_costs = lambda device: True  # as on a GPU
    with Waits() as waits:
        received_RD, _, handle = dispatcher.dispatch(rows_TD, plan)
        dispatcher.combine(received_RD, handle).sum().backward()
    return waits.found, same


def test_a_window_grows_and_the_host_waits_for_nothing() -> None:
    assert run_ranks(grown_and_waited, 2) == [([], True)] * 2


def test_no_file_is_left_behind() -> None:
    before = set(symmetric.FOLDER.glob("megamoe-*"))
    run_ranks(grown_and_waited, 2)
    assert set(symmetric.FOLDER.glob("megamoe-*")) <= before


def warnings_told() -> list[str]:
    """What the window logs from now on."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    push_window.log.addHandler(handler)
    return told


def not_grown() -> tuple[list[bool], list[bool], list[str]]:
    """Layers of which some ask for more memory than rank 1 has, and their backward passes: whether the rows of each
    were pushed, and whether results and gradients are right."""
    rank, told = torch.distributed.get_rank(), warnings_told()
    dispatcher = PushDispatcher(Link(ep_group(2).handle))
    tokens, plan = drawn_plan("even", rank, True)
    rows_TD = drawn(tokens, WIDTH, seed=rank).requires_grad_()
    outs, pushed = [], []
    for factor in (1, 3, 1, 4):
        received_RD, _, handle = dispatcher.dispatch(rows_TD, plan._replace(capacity=factor * CAPACITY))
        pushed.append(isinstance(handle.state, Way))
        outs.append(dispatcher.combine(received_RD, handle))
        if rank == 1:
            symmetric.FOLDER = Path("/dev/null")
    probe_TD = drawn(tokens, WIDTH, seed=3)
    right = []
    for out_TD in reversed(outs):
        (d_rows_TD,) = torch.autograd.grad((out_TD * probe_TD).sum(), [rows_TD])
        right.append(torch.equal(out_TD, rows_TD * TOP_K) and torch.equal(d_rows_TD, probe_TD * TOP_K))
    return pushed, right, told


def test_where_a_window_cannot_grow_the_old_one_goes_on() -> None:
    for pushed, right, told in run_ranks(not_grown, 2):
        assert pushed == [True, False, True, False]
        assert right == [True] * 4
        (text,) = told
        assert "more of them than before are not pushed but travel by all-to-all: rank 1: no shared memory of" in text


def a_group_later() -> bool:
    """Whether the memory for a group that is destroyed is there when there is a window for another one."""
    group = torch.distributed.new_group()
    moved(PushDispatcher(Link(group)), "even", True, torch.float32)
    window = weakref.ref(shared_window(group, torch.zeros(1), EXPERTS // 2))
    torch.distributed.destroy_process_group(group)
    shared_window(torch.distributed.new_group(), torch.zeros(1), EXPERTS // 2)
    return window() is not None


def test_memory_does_not_outlive_its_group() -> None:
    assert run_ranks(a_group_later, 2) == [False, False]


def without_an_allocation() -> tuple[symmetric.SymmetricMemory | str, bool]:
    """Rank 1's GPU is full. Whether this rank has gone to meet the others."""
    from torch.distributed import _symmetric_memory

    met: list[Tensor] = []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if torch.distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("out of memory")
        return torch.empty(size, dtype=dtype, device=device)

    _symmetric_memory.empty = empty  # type: ignore[assignment]
    _symmetric_memory.rendezvous = lambda own, group: met.append(own)  # type: ignore[assignment,return-value]
    return symmetric._on_cuda(ep_group(2).handle, 64, torch.device("cpu")), bool(met)


def test_nobody_waits_for_a_rank_that_has_no_memory_on_its_gpu() -> None:
    reason = "rank 1: no symmetric memory of 64 bytes: OutOfMemoryError: out of memory"
    assert run_ranks(without_an_allocation, 2) == [(reason, False)] * 2


def instead(why: str) -> tuple[str, list[str], bool]:
    """Without one of the things that pushing needs, on rank 1 alone."""
    ep = ep_group(2)
    if ep.place == 1:
        if why == "memory":
            symmetric.FOLDER = Path("/dev/null")
        elif why == "node":
            symmetric.socket.gethostname = lambda: "elsewhere"
        else:
            push_window.push.unavailable = lambda device, dtype: "megamoe-kernels is not installed"
    told = warnings_told()
    dispatcher = PushDispatcher(Link(ep.handle))
    pushed = [moved(dispatcher, "even", True, torch.float32) for _ in range(2)][-1]
    other = moved(AllToAllDispatcher(Link(ep.handle)), "even", True, torch.float32)
    same = all(torch.equal(a, b) for a, b in zip(pushed[:-1], other[:-1], strict=True))
    return shared_window(ep.handle, pushed.out_TD, EXPERTS // 2).reason, told, same


@pytest.mark.parametrize(
    "why, reason",
    [
        ("memory", "rank 1: no shared memory of"),
        ("node", "its group spans nodes: rank 0 is on"),
        ("ops", "megamoe-kernels is not installed"),
    ],
)
def test_without_what_it_needs_rows_go_by_all_to_all_and_the_reason_is_told_once(why: str, reason: str) -> None:
    for found, told, same in run_ranks(instead, 2, why):
        assert found.startswith(reason)
        assert told == [f"rows are not pushed but travel by all-to-all: {found}"]
        assert same


class Standing(TorchDispatchMode):
    """Writes down in which phase the record says that this rank stands, at every op of an exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "megamoe" and name in push.OPS:
            self.found.append((name, "" if RECORD.waiting is None else RECORD.waiting.phase))
        return func(*args, **(kwargs or {}))


def stood() -> list[tuple[str, str]]:
    dispatcher = PushDispatcher(Link(ep_group(2).handle))
    moved(dispatcher, "even", True, torch.float32)
    with Standing() as standing:
        moved(dispatcher, "even", True, torch.float32)
    return standing.found


def test_an_op_that_may_wait_is_inside_of_an_exchange_that_others_see() -> None:
    there, home = ("dispatch_push", "wait_flags"), ("publish_rows", "combine_pull")
    ops = {"counts": ("exchange_counts", "wait_counts"), "dispatch": there, "combine": home}
    ops |= {"combine backward": there, "dispatch backward": home}
    assert run_ranks(stood, 2) == [[(op, phase) for phase in ops for op in ops[phase]]] * 2


class Gone(Exception):
    """This rank does no more."""


class Leaves(torch.autograd.Function):
    """Until the gradient comes here."""

    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        raise Gone


def without_a_peer(phase: str) -> str:
    """Rank 1, which has the expert that all want, ends in the middle of a layer."""
    ep = ep_group(2)
    window = Window(ep.handle, torch.device("cpu"), limit=0.3)
    dispatcher = PushDispatcher(Link(ep.handle, layer=5), windows=lambda rows, num_local: window)
    moved(dispatcher, "even", True, torch.float32)  # both are there
    torch.distributed.barrier()
    leaves = ep.place == 1
    tokens, plan = drawn_plan("all on one expert", ep.place, True)
    rows_TD = drawn(tokens, WIDTH, seed=1).requires_grad_()
    try:
        if leaves and phase == "dispatch":
            raise Gone
        received_RD, _, handle = dispatcher.dispatch(rows_TD, plan)
        if leaves and phase == "combine":
            raise Gone
        received_RD = Leaves.apply(received_RD) if leaves else received_RD
        dispatcher.combine(received_RD, handle).sum().backward()
    except Gone:
        return "gone"
    except LostPeerError as error:
        return str(error)
    return "nothing was noticed"


@pytest.mark.parametrize(
    "phase, what",
    [
        ("dispatch", "its numbers of rows"),
        ("combine", "its results of expert 7 (32 missing)"),
        ("dispatch backward", "its results of expert 7 (32 missing)"),
    ],
)
def test_a_peer_that_is_gone_is_named_in_time(phase: str, what: str) -> None:
    told, left = run_ranks(without_a_peer, 2, phase)
    assert left == "gone"
    assert told.startswith(f"Rank 1 did not answer: block 5, {phase} (ep ranks 0, 1)."), told
    assert f"nothing for 0.3 s in the place of {what}" in told
