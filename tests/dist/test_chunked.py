"""Dispatch in chunks: the bits of the exchange in one piece, and what happens beside what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.common.errors import KernelUnavailable
from megamoe.config.moe import BroadcastConfig, CapacityConfig, MoEConfig
from megamoe.config.ops import OpsConfig
from megamoe.config.routers import ExpertChoiceRouterConfig, ResonanceRouterConfig, RouterConfig, TopKRouterConfig
from megamoe.model.recompute import recomputed
from megamoe.moe import layer as layers
from megamoe.moe.dispatch import build_dispatcher
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.dispatch.chunked import ChunkedDispatcher, chunk_major, chunk_spans
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers import base
from megamoe.moe.types import RoutingPlan
from megamoe.ops.expert_ffn_blocked import BLOCKED
from megamoe.ops.expert_ffn_later import Chunks, Later, Split, Weights
from megamoe.parallel.exchanges import RECORD
from megamoe.parallel.groups import RankGroup, build_groups
from megamoe.parallel.link import Link, Transfer
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, assert_equal_bits, parity, run_ranks
from megamoe.testing.configs import tiny_config
from megamoe.testing.waits import Waits

RANKS, EXPERTS, WIDTH, FFN = 4, 12, 16, 8
DEGREES = {1: (5,), 2: (1, 4), 4: (2, 3)}
"""Numbers of chunks by EP; 5 of 12, 4 of 6 and 2 of 3 experts are chunks of different sizes."""
UNEVEN, EVEN = (24, 0, 24, 7), (24, 24, 24, 24)
STATIC = CapacityConfig(mode="static", factor=0.8, tile=4)
BROADCAST = BroadcastConfig(threshold="quantile", max_share=0.4)


class Case(NamedTuple):
    router: RouterConfig = TopKRouterConfig(balance_loss=0.01)
    capacity: CapacityConfig = CapacityConfig()
    tokens: tuple[int, ...] = UNEVEN
    padded: bool = False
    dtype: torch.dtype = torch.float32
    recompute: bool = False
    frozen: str = ""
    """Beginning of the names of parameters without a gradient; `x`: the input has none either."""
    broadcast: BroadcastConfig | None = None
    ops: OpsConfig = OpsConfig()


CASES = {
    "ragged": Case(),
    "ragged, bf16": Case(dtype=torch.bfloat16, recompute=True),
    "bounded": Case(capacity=STATIC),
    "all on one expert": Case(tokens=(3, 0, 9, 1)),
    "padded": Case(capacity=STATIC, tokens=EVEN, padded=True),
    "padded, bf16": Case(capacity=STATIC, tokens=EVEN, padded=True, dtype=torch.bfloat16),
    "padded, grouped products": Case(
        capacity=STATIC, tokens=EVEN, padded=True, recompute=True, ops=OpsConfig(expert_ffn="fused")
    ),
    "expert choice": Case(ExpertChoiceRouterConfig(), STATIC, EVEN, padded=True),
    "frozen experts": Case(frozen="experts"),
    "frozen input and router": Case(frozen="router", recompute=True),
}
GUESTS = {
    "ragged": Case(dtype=torch.float64, broadcast=BROADCAST),
    "padded": Case(capacity=STATIC, tokens=EVEN, padded=True, dtype=torch.float64, broadcast=BROADCAST),
    "recomputed": Case(ResonanceRouterConfig(), dtype=torch.float64, recompute=True, broadcast=BROADCAST),
}

SHARDED = "deepspeed_extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"
"""No parameter is kept whole, as DeepSpeed would keep small ones at ZeRO-3."""


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(case: Case, ep: RankGroup) -> MoELayer:
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=2,
        expert_ffn_size=FFN,
        num_shared_experts=1,
        router=case.router,
        capacity=case.capacity,
        dispatcher="padded" if case.padded else "all_to_all",
        broadcast=case.broadcast,
    )
    layer = MoELayer(config, WIDTH, ExpertParallel(ep.size, ep.place, ep.handle), case.ops).to(case.dtype)
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        seed = number + (100 * ep.place if name.startswith("experts.") else 0)
        parameter.data.copy_(drawn(*parameter.shape, seed=seed) * 0.4)
        parameter.requires_grad_(not case.frozen or not name.startswith(case.frozen))
    if layer.router.broadcast is not None:
        layer.router.broadcast.threshold.fill_(0.5)
    return layer


def micro_batch(name: str, case: Case, number: int) -> Tensor:
    rank = dist.get_rank()
    x_BSD = drawn(1, case.tokens[rank], WIDTH, seed=10 * number + rank)
    if name == "all on one expert":
        x_BSD = 0.01 * x_BSD + drawn(1, 1, WIDTH, seed=999)
    return x_BSD.to(case.dtype).requires_grad_(case.frozen != "router")


class Result(NamedTuple):
    tensors: dict[str, Tensor]
    """Outputs, gradients of inputs, and those of parameters, of two micro-batches together."""
    phases: list[str]
    """Exchanges, in the order in which they began."""
    declared: float
    """Bytes of the forward passes, as the layer says."""
    moved: int
    """And as the link counted them."""
    most_rows: int
    """Of an expert, from this rank."""
    guests: int
    """Rows of this rank that are broadcast."""


def run(name: str, case: Case, layer: MoELayer) -> Result:
    layer.zero_grad(set_to_none=True)
    tensors, declared, number = {}, 0.0, RECORD.begin((0, "", ()), "", (0, 0), False).number
    plans: list[RoutingPlan] = []
    hook = layer.router.register_forward_hook(lambda module, args, plan: plans.append(plan))
    for micro in range(2):
        x = micro_batch(name, case, micro)
        out, aux = recomputed(layer, x) if case.recompute else layer(x)
        loss = sum(aux.losses.values(), (out.double() * drawn(*out.shape, seed=7)).sum())
        declared += float(aux.metrics["sent_bytes"][0])
        torch.autograd.backward(loss)
        tensors |= {f"out {micro}": out.detach()} | ({} if x.grad is None else {f"dx {micro}": x.grad})
    hook.remove()
    tensors |= {f"d {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    exchanges = [exchange for exchange in RECORD.recent if exchange.number > number]
    moved = sum(exchange.sent_bytes for exchange in exchanges if "backward" not in exchange.phase)
    with torch.no_grad():
        tensors["out without gradients"] = layer(micro_batch(name, case, 0))[0]
    return Result(tensors, [exchange.phase for exchange in exchanges], declared, moved, *of_plan(plans[0]))


def of_plan(plan: RoutingPlan) -> tuple[int, int]:
    return int(plan.rows_per_expert_E.max()), 0 if plan.broadcast is None else len(plan.broadcast.token_ids_U)


def chunked(layer: MoELayer, ep: RankGroup, chunks: int, padded: bool, ops: OpsConfig) -> None:
    layer.dispatcher = ChunkedDispatcher(Link(ep.handle), ops, chunks, padded)


Results = dict[tuple[str, int, int], Result]
"""By case, EP and number of chunks; 0: in one piece."""


def on_a_rank() -> tuple[Results, Results]:
    found: tuple[Results, Results] = ({}, {})
    groups = {ep: build_groups(Topology(RANKS, ep=ep)).ep for ep in DEGREES}
    for results, cases in zip(found, (CASES, GUESTS), strict=True):
        for name, case in cases.items():
            for ep, group in groups.items():
                if ep == 1 and case.broadcast is not None:
                    continue
                layer = build(case, group)
                results[name, ep, 0] = run(name, case, layer)
                for chunks in DEGREES[ep]:
                    chunked(layer, group, chunks, case.padded, case.ops)
                    results[name, ep, chunks] = run(name, case, layer)
    return found


@cache
def everything() -> list[tuple[Results, Results]]:
    return run_ranks(on_a_rank, RANKS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ep", DEGREES)
def test_chunks_change_no_bit(ep: int, name: str) -> None:
    for rank, (results, _) in enumerate(everything()):
        whole = results[name, ep, 0]
        for chunks in DEGREES[ep]:
            found = results[name, ep, chunks]
            assert found.tensors.keys() == whole.tensors.keys()
            for tensor, expected in whole.tensors.items():
                assert_equal_bits(found.tensors[tensor], expected, name=f"{tensor} of rank {rank} in {chunks} chunks")
            assert found.declared == whole.declared
            if not CASES[name].recompute:
                assert found.declared == found.moved


@pytest.mark.parametrize("name", GUESTS)
@pytest.mark.parametrize("ep", [2, 4])
def test_broadcast_rows_come_to_every_chunk(ep: int, name: str) -> None:
    """Their sums over experts are formed in another order."""
    for _, results in everything():
        whole = results[name, ep, 0]
        for chunks in DEGREES[ep]:
            found = results[name, ep, chunks]
            for tensor, expected in whole.tensors.items():
                assert_close(found.tensors[tensor], expected, rel=1e-12, name=tensor)
            assert found.declared == whole.declared
            if not GUESTS[name].recompute:
                assert found.declared == found.moved


def test_the_cases_are_what_they_are_called() -> None:
    first, guests = everything()[0]
    for name in GUESTS:
        assert 4 <= guests[name, 4, 0].guests < 24, "some rows and not all"
    assert first["all on one expert", 4, 0].most_rows == 3, "every token of the rank"
    for name in ("frozen experts", "frozen input and router"):
        frozen = CASES[name].frozen
        gradients = {tensor for tensor in first[name, 4, 2].tensors if tensor.startswith("d")}
        assert not any(tensor.startswith(f"d {frozen}") for tensor in gradients)
        assert ("dx 0" in gradients) == (frozen != "router")


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_begin_the_same_exchanges(name: str) -> None:
    for ep, numbers in DEGREES.items():
        for chunks in numbers:
            orders = [results[name, ep, chunks].phases for results, _ in everything()]
            assert all(order == orders[0] for order in orders)


def test_counts_are_exchanged_once() -> None:
    results, _ = everything()[0]
    assert results["ragged", 4, 3].phases.count("counts") == 2, "one for each micro-batch"
    assert "counts" not in results["padded", 4, 3].phases


@pytest.mark.parametrize("name", ["padded, grouped products", "frozen input and router"])
def test_a_recomputed_pass_sends_no_results(name: str) -> None:
    phases = everything()[0][0][name, 4, 3].phases
    assert phases.count("dispatch 1/3") == 4, "two micro-batches, each once more for the backward pass"
    assert [phases.count(f"combine {chunk}/3") for chunk in (1, 2, 3)] == [2, 2, 2]


# What happens beside what

Notes = list[str]


class NotedTransfer(Transfer):
    def __init__(self, inner: Transfer, phase: str, notes: Notes) -> None:
        self._inner, self._phase, self._notes = inner, phase, notes

    def wait(self) -> Tensor:
        self._notes.append(f"wait {self._phase}")
        return self._inner.wait()


class NotedLink(Link):
    notes: Notes

    def start(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, phase: str) -> Transfer:
        self.notes.append(f"start {phase}")
        return NotedTransfer(super().start(rows, send, receive, phase), phase, self.notes)


def noted_split(notes: Notes) -> Split:
    def forward(*args: Any) -> Any:
        notes.append("experts")
        return BLOCKED.forward(*args)

    def backward(*args: Any) -> Any:
        notes.append("gradients of rows")
        d_rows, d_weights, later = BLOCKED.backward(*args)
        return d_rows, d_weights, noted_later(later)

    def noted_later(later: Later) -> Later:
        def compute(into: Weights) -> None:
            notes.append("gradients of weights")
            later(into)

        return compute

    return Split(forward, backward)


@contextmanager
def noted(layer: MoELayer, ep: RankGroup, chunks: int) -> Iterator[Notes]:
    notes: Notes = []
    link = NotedLink(ep.handle)
    link.notes = notes
    layer.dispatcher = ChunkedDispatcher(link, chunks=chunks)
    experts = layer.experts
    weights = (experts.w1, experts.w2, experts.w3)
    experts._in_chunks = lambda: Chunks(noted_split(notes), weights)  # type: ignore[method-assign]

    def beside(module: Any, args: Any, out: Tensor) -> None:
        notes.append("beside")
        out.register_hook(lambda grad: notes.append("beside backward"))

    assert layer.shared_experts is not None
    hook = layer.shared_experts.register_forward_hook(beside)
    yield notes
    hook.remove()


def order_of_events() -> tuple[Notes, Notes]:
    ep = build_groups(Topology(2, ep=2)).ep
    case = Case(tokens=(24, 0))
    layer = build(case, ep)
    with noted(layer, ep, 3) as notes:
        out, _ = layer(micro_batch("", case, 0))
        forward = list(notes)
        notes.clear()
        out.sum().backward()
    return forward, list(notes)


def test_computation_lies_between_the_beginning_and_the_end_of_exchanges() -> None:
    """On a rank without tokens too."""
    for forward, backward in run_ranks(order_of_events, 2):
        assert forward == [
            *("start dispatch 1/3", "start dispatch 2/3", "start dispatch 3/3", "beside"),
            *("wait dispatch 1/3", "experts", "start combine 1/3"),
            *("wait dispatch 2/3", "experts", "start combine 2/3"),
            *("wait dispatch 3/3", "experts", "start combine 3/3"),
            *("wait combine 1/3", "wait combine 2/3", "wait combine 3/3"),
        ]
        assert backward == [
            *("start combine backward 3/3", "start combine backward 2/3", "start combine backward 1/3"),
            *("wait combine backward 3/3", "gradients of rows", "start dispatch backward 3/3"),
            *("wait combine backward 2/3", "gradients of rows", "start dispatch backward 2/3"),
            *("wait combine backward 1/3", "gradients of rows", "start dispatch backward 1/3"),
            *("beside backward", "gradients of weights", "gradients of weights", "gradients of weights"),
            *("wait dispatch backward 1/3", "wait dispatch backward 2/3", "wait dispatch backward 3/3"),
        ]


# What the host waits for


def waits(padded: bool) -> list[str]:
    base.waiting_costs = lambda device: True  # as on a GPU
    ep = build_groups(Topology(2, ep=2)).ep
    ops = OpsConfig(plan="reference", rows="reference", expert_ffn="fused")
    case = Case(capacity=STATIC, tokens=EVEN, padded=padded, ops=ops)
    layer = build(case, ep)
    chunked(layer, ep, 3, padded, ops)

    def once() -> None:
        out, aux = layer(micro_batch("", case, 0))
        torch.autograd.backward([out.square().sum(), *aux.losses.values()])

    once()  # what is compared and made only once
    with Waits() as found:
        once()
    return found.found


def test_the_host_waits_for_counts_alone_and_once() -> None:
    assert run_ranks(waits, 2, True) == [[]] * 2
    assert run_ranks(waits, 2, False) == [["tolist"]] * 2


# In training, by DeepSpeed


def trained(chunks: int, words: tuple[str, ...]) -> parity.ParityRun:
    def build_chunked(name: str, group: Any, *, ops: OpsConfig, layer: int, **others: Any) -> Dispatcher:
        return ChunkedDispatcher(Link(group, layer), ops, chunks)

    if chunks:
        layers.build_dispatcher = build_chunked  # type: ignore[attr-defined, assignment]
    return parity.train_steps(tiny_config("parallel.ep=2", "moe.num_shared_experts=1", *words), 2)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "words",
    [
        ("parallel.zero_stage=0",),
        ("parallel.zero_stage=1", "training.recompute=moe"),
        ("parallel.zero_stage=2", "moe.capacity.mode=static"),
        ("parallel.zero_stage=3", SHARDED),
        ("parallel.zero_stage=3", SHARDED, "training.recompute=full"),
        ("parallel.zero_stage=3", SHARDED, 'training.frozen=["*.experts.*"]'),
        ("parallel.zero_stage=3", SHARDED, 'training.trainable=["*.experts.*"]'),
    ],
)
def test_training_has_the_same_bits(words: tuple[str, ...]) -> None:
    """On four ranks, so that two hold the same experts and share them out at ZeRO-3."""
    for whole, found in zip(run_ranks(trained, 4, 0, words), run_ranks(trained, 4, 2, words), strict=True):
        assert found.losses == whole.losses
        assert found.norms == whole.norms
        for name, weight in whole.weights.items():
            assert_equal_bits(found.weights[name], weight, name=name)


# Pieces, and what is refused


def test_spans_differ_by_one_expert_at_most() -> None:
    assert [(s.start, s.stop) for s in chunk_spans(7, 3)] == [(0, 3), (3, 5), (5, 7)]
    for chunks in (0, 8):
        with pytest.raises(ValueError, match=f"7 experts on a rank do not make {chunks} chunks"):
            chunk_spans(7, chunks)


def test_experts_are_ordered_by_chunk_then_by_rank() -> None:
    # Two ranks with three experts each: chunk 0 holds 0, 1 of both (0, 1, 3, 4), chunk 1 the last of both (2, 5).
    assert chunk_major(chunk_spans(3, 2), 2).tolist() == [0, 1, 4, 2, 3, 5, 6]


def refused() -> list[str]:
    ep = build_groups(Topology(1, ep=1)).ep
    messages = []
    for implementation in ("reference", "grouped_mm"):
        layer = build(Case(ops=OpsConfig(expert_ffn=implementation)), ep)  # type: ignore[arg-type]
        chunked(layer, ep, 2, padded=True, ops=OpsConfig())
        with pytest.raises(KernelUnavailable) as error:
            layer(torch.zeros(1, 4, WIDTH))
        messages.append(str(error.value))
    dispatcher: Dispatcher = ChunkedDispatcher(Link(ep.handle))
    plan = layer.router(torch.zeros(4, WIDTH))
    with pytest.raises(TypeError, match="not of function") as error_of_type:
        dispatcher.through(torch.zeros(4, WIDTH), plan, lambda rows, weights, counts: rows)
    assert build_dispatcher("auto", None).name == "local"
    return [*messages, str(error_of_type.value)]


def test_experts_whose_weights_cannot_wait_are_refused() -> None:
    reference, grouped, _ = run_ranks(refused, 1)[0]
    assert "ops.expert_ffn=reference" in reference
    assert "ops.expert_ffn=grouped_mm" in grouped
