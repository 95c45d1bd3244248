"""Every dispatcher of the configuration trains the same model as one process: whole steps of the engine, in fp64."""

from __future__ import annotations

import functools
import os

import pytest

from megamoe.common.errors import TopologyError
from megamoe.moe.dispatch.chunked import ChunkedDispatcher
from megamoe.parallel.groups import build_groups
from megamoe.testing import parity
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import run_ranks
from megamoe.training.job import build_engine
from megamoe.training.setup import Runtime, placement, topology_of

STEPS = 4
FP64 = ("training.precision=fp64", "parallel.zero_stage=0", "moe.num_experts=8", "moe.num_shared_experts=1")
STATIC = "moe.capacity={mode: static, factor: 1.5}"
BROADCAST = "moe.broadcast={threshold: fixed, entropy: 0.9, max_share: 0.2}"
SETTINGS = {
    "dropless": (),
    "static": ("moe.router.type=resonance", STATIC),
    "broadcast": (BROADCAST,),
    "recomputed": ("training.recompute=full",),
}
# Name: ranks, ranks per node, overrides.
WAYS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "chunks 2": (2, 2, ("parallel.ep=2", "moe.chunks=2")),
    "chunks 2 of ragged rows": (4, 4, ("parallel.ep=4", "moe.chunks=2", "moe.dispatcher=all_to_all")),
    "chunks 2, folded": (4, 4, ("parallel.ep=4", "parallel.tp=2", "moe.chunks=2")),
    "deduplicated": (4, 4, ("parallel.ep=4", "moe.dispatcher=deduplicated")),
    "deduplicated, cut experts": (4, 4, ("parallel.ep=2", "parallel.etp=2", "moe.dispatcher=deduplicated")),
    "hierarchical": (4, 2, ("parallel.ep=4", "moe.dispatcher=hierarchical")),
    "groupwise": (4, 4, ("parallel.ep=4", "parallel.tp=2", "moe.dispatcher=groupwise")),
    "push": (2, 2, ("parallel.ep=2", "moe.dispatcher=push")),
}
ALWAYS = {("chunks 2", "static"), ("hierarchical", "dropless"), ("push", "static"), ("groupwise", "broadcast")}


def allowed(way: str, setting: str) -> bool:
    """Push needs a capacity."""
    return way != "push" or setting == "static"


CASES = [
    pytest.param(way, setting, marks=[] if (way, setting) in ALWAYS else [pytest.mark.thorough])
    for way in WAYS
    for setting in SETTINGS
    if allowed(way, setting)
]


def train(overrides: tuple[str, ...], per_node: int) -> parity.ParityRun:
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    return parity.train_steps(tiny_config(*overrides), STEPS)


@functools.cache
def one_process(setting: str) -> parity.ParityRun:
    return run_ranks(train, 1, (*FP64, *SETTINGS[setting]), 1)[0]


@pytest.mark.parametrize("way, setting", CASES)
def test_it_trains_the_same_model(way: str, setting: str) -> None:
    ranks, per_node, overrides = WAYS[way]
    run = run_ranks(train, ranks, (*FP64, *SETTINGS[setting], *overrides), per_node)[0]
    parity.compare(run, one_process(setting), parity.EXACT)


def chosen(overrides: tuple[str, ...], per_node: int) -> tuple[str, int]:
    """The first block's dispatcher, and its number of chunks."""
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    config = tiny_config(*overrides)
    groups = build_groups(topology_of(config.parallel, int(os.environ["WORLD_SIZE"])))
    runtime = Runtime(groups.rank, groups.topology.world_size, parity.CPU, groups)
    engine = build_engine(config, runtime, 64, lambda model: None)
    dispatcher = engine.model.blocks[0].ffn.dispatcher  # type: ignore[union-attr]
    return dispatcher.name, dispatcher.chunks if isinstance(dispatcher, ChunkedDispatcher) else 1


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (("moe.chunks=3", "moe.num_experts=6"), ("chunked", 3)),
        ((), ("padded", 1)),
        (("moe.dispatcher=deduplicated", BROADCAST), ("deduplicated", 1)),
        (("moe.dispatcher=push", STATIC), ("push", 1)),
    ],
)
def test_the_configuration_chooses(overrides: tuple[str, ...], expected: tuple[str, int]) -> None:
    assert run_ranks(chosen, 2, ("parallel.ep=2", *overrides), 2) == [expected] * 2


def refusal(overrides: tuple[str, ...], per_node: int) -> str:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["LOCAL_WORLD_SIZE"] = str(min(per_node, ranks - rank // per_node * per_node))
    config = tiny_config(*overrides)
    groups = build_groups(topology_of(config.parallel, ranks))
    try:
        placement(Runtime(groups.rank, groups.topology.world_size, parity.CPU, groups), config)
    except TopologyError as error:
        return str(error)
    return ""


def test_uneven_nodes_are_refused_on_every_rank() -> None:
    messages = run_ranks(refusal, 3, ("parallel.ep=3", "moe.num_experts=6", "moe.dispatcher=hierarchical"), 2)
    assert all("equally many ranks" in message and "0: 0 1; 2: 2" in message for message in messages), messages
