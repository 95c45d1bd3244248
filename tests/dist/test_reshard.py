"""A checkpoint of one layout, loaded into another: every weight, moment and statistic has the same bits there.

What a layout holds is asked of DeepSpeed's own functions, which put whole tensors together by messages; what a
checkpoint holds is read from its files. So saving and loading are each compared with something that shares no code.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.model.initialise import initialise
from megamoe.parallel import collectives
from megamoe.parallel.groups import build_groups
from megamoe.testing import parity
from megamoe.testing import parity_record as record
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import run_ranks
from megamoe.testing.saving import save_now
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.index import Index
from megamoe.training.checkpoint.load import load_checkpoint
from megamoe.training.checkpoint.reader import Reader
from megamoe.training.engine import Engine
from megamoe.training.job import build_engine
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.state import TrainState
from megamoe.training.step import train_step

RANKS = 4
ALL = ("moe.router.type=resonance", "moe.router.affinity=cosine", "moe.router.centre=true")
LAYOUTS = {
    "ep2": ("parallel.ep=2", "parallel.zero_stage=1"),
    "ep4": ("parallel.ep=4", "parallel.zero_stage=1"),
    "tp2-ep2": ("parallel.tp=2", "parallel.ep=2", "parallel.zero_stage=1"),
    "pp2-ep2": ("parallel.pp=2", "parallel.ep=2", "parallel.zero_stage=1"),
    "pp2-tp2-ep2": ("parallel.pp=2", "parallel.tp=2", "parallel.ep=2", "parallel.zero_stage=1"),
    "ep2-zero0": ("parallel.ep=2", "parallel.zero_stage=0"),
    "ep2-zero2": ("parallel.ep=2", "parallel.zero_stage=2"),
    "ep2-zero3": ("parallel.ep=2", "parallel.zero_stage=3"),
    "tp2-ep4-zero3": ("parallel.tp=2", "parallel.ep=4", "parallel.zero_stage=3"),
    "tp2-ep2-etp2-zero2": ("parallel.tp=2", "parallel.ep=2", "parallel.etp=2", "parallel.zero_stage=2"),
    "cp2-ep2": ("parallel.cp=2", "parallel.ep=2", "parallel.zero_stage=1"),
    "offload-zero2": ("parallel.ep=2", "parallel.zero_stage=2", "parallel.offload_optimizer=true"),
}
QUICK = ("pp2-tp2-ep2", "ep2-zero3", "tp2-ep2-etp2-zero2")


def engine_of(config: RunConfig) -> tuple[Engine, Runtime]:
    groups = build_groups(topology_of(config.parallel, collectives.world_size()))
    runtime = Runtime(groups.rank, groups.topology.world_size, parity.CPU, groups)
    fill = functools.partial(initialise, config=config.model, seed=config.training.seed)
    return build_engine(config, runtime, derive.vocab_size(config), fill), runtime


def held_by(engine: Engine) -> dict[str, Tensor]:
    """Whole tensors by the names that a checkpoint gives them, on rank 0."""
    held = {f"weight/{name}": value for name, value in record.weights(engine).items()}
    for kind, moments in record.moments(engine).items():
        held |= {f"{kind}/{name}": value for name, value in moments.items()}
    return held | {f"statistic/{name}": value for name, value in record.statistics(engine).items()}


def save(overrides: tuple[str, ...], folder: Path) -> dict[str, Tensor]:
    """Two steps, a checkpoint, and what the layout held then."""
    config = tiny_config(*ALL, *overrides)
    engine, runtime = engine_of(config)
    steps, place = derive.accumulation_steps(config, runtime.world_size), runtime.groups.dp
    for step in range(2):
        numbers = [number * place.size + place.place for number in range(steps)]
        train_step(engine, [parity.random_tokens(config, step, number) for number in numbers], 1.0)
    save_now(engine, folder, TrainState(2, 16, 512))
    return held_by(engine)


def load(overrides: tuple[str, ...], checkpoints: list[Path]) -> list[tuple[TrainState, dict[str, Tensor]]]:
    """What a layout holds after loading each of them, one after the other into the same engine."""
    engine, _ = engine_of(tiny_config(*ALL, *overrides))
    found = []
    for checkpoint in checkpoints:
        state = load_checkpoint(engine, checkpoint, folders.read_manifest(checkpoint))
        found.append((state, held_by(engine)))
    return found


def stored(checkpoint: Path) -> dict[str, Tensor]:
    reader = Reader(checkpoint)
    return {tensor: reader.read(tensor) for tensor in reader.index.tensors}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not differing, f"{len(differing)} of {len(expected)} tensors differ, first: {differing[:3]}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by `checkpoint_of`."""
    return {"": tmp_path_factory.mktemp("reshard")}


def checkpoint_of(layout: str, saved: dict[str, Path]) -> Path:
    """The checkpoint that a layout wrote, compared with what the layout held."""
    if layout not in saved:
        held = run_ranks(save, RANKS, LAYOUTS[layout], saved[""] / layout)[0]
        (checkpoint,) = folders.complete(saved[""] / layout)
        Index.read(checkpoint).check()
        assert_equal(stored(checkpoint), held)
        saved[layout] = checkpoint
    return saved[layout]


def check_loads(target: str, sources: tuple[str, ...], saved: dict[str, Path]) -> None:
    checkpoints = [checkpoint_of(source, saved) for source in sources]
    for checkpoint, (state, held) in zip(
        checkpoints, run_ranks(load, RANKS, LAYOUTS[target], checkpoints)[0], strict=True
    ):
        assert asdict(state) == asdict(TrainState(2, 16, 512))
        assert_equal(held, stored(checkpoint))


@pytest.mark.parametrize("target", QUICK)
def test_checkpoints_of_other_layouts_load_exactly(target: str, saved: dict[str, Path]) -> None:
    check_loads(target, QUICK, saved)


@pytest.mark.thorough
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_loads_every_other(target: str, saved: dict[str, Path]) -> None:
    check_loads(target, tuple(LAYOUTS), saved)


MUON = ("training.optimizer.type=muon", "training.gradient_clipping=0.0")
DENSE = ("moe.num_experts=0", "training.precision=bf16")
OF_MUON = {
    "zero0": (*MUON, "parallel.ep=2", "parallel.zero_stage=0"),
    "zero1": (*MUON, "parallel.ep=4", "parallel.zero_stage=1"),
    "zero2": (*MUON, "parallel.ep=2", "parallel.zero_stage=2"),
    "zero2-offload": (*MUON, "parallel.ep=2", "parallel.zero_stage=2", "parallel.offload_optimizer=true"),
    "pp2-zero1": (*MUON, "parallel.pp=2", "parallel.ep=2", "parallel.zero_stage=1"),
}


def next_losses(engine: Engine, runtime: Runtime) -> list[float]:
    """Of two further steps, which momenta decide about."""
    config, found = engine.config, []
    steps, place = derive.accumulation_steps(config, runtime.world_size), runtime.groups.dp
    for step in (2, 3):
        numbers = [number * place.size + place.place for number in range(steps)]
        batches = [parity.random_tokens(config, step, number) for number in numbers]
        found.append(float(train_step(engine, batches, 1.0)[0].values["loss"]))
    return found


def save_and_go_on(overrides: tuple[str, ...], folder: Path) -> list[float]:
    config = tiny_config(*overrides)
    engine, runtime = engine_of(config)
    for step in range(2):
        place = runtime.groups.dp
        count = derive.accumulation_steps(config, runtime.world_size)
        numbers = [number * place.size + place.place for number in range(count)]
        train_step(engine, [parity.random_tokens(config, step, number) for number in numbers], 1.0)
    save_now(engine, folder, TrainState(2, 16, 512))
    return next_losses(engine, runtime)


def load_and_go_on(overrides: tuple[str, ...], checkpoint: Path) -> list[float]:
    engine, runtime = engine_of(tiny_config(*overrides))
    load_checkpoint(engine, checkpoint, folders.read_manifest(checkpoint))
    return next_losses(engine, runtime)


@pytest.mark.thorough
@pytest.mark.parametrize("source", OF_MUON)
def test_momenta_of_muon_go_along(source: str, tmp_path: Path) -> None:
    expected = run_ranks(save_and_go_on, RANKS, OF_MUON[source], tmp_path)[0]
    (checkpoint,) = folders.complete(tmp_path)
    assert len(Reader(checkpoint).names("momentum_buffer")) == 14
    for target, overrides in OF_MUON.items():
        found = run_ranks(load_and_go_on, RANKS, overrides, checkpoint)[0]
        assert found == pytest.approx(expected, rel=0 if target == source else 1e-5), target


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_momenta_in_bf16_go_along(stage: int, tmp_path: Path) -> None:
    """At ZeRO-1 DeepSpeed keeps them in another way there."""
    overrides = (*MUON, *DENSE, f"parallel.zero_stage={stage}")
    expected = run_ranks(save_and_go_on, 2, overrides, tmp_path)[0]
    (checkpoint,) = folders.complete(tmp_path)
    assert len(Reader(checkpoint).names("momentum_buffer")) == 14
    assert run_ranks(load_and_go_on, 2, overrides, checkpoint)[0] == expected
