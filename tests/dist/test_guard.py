"""A step that is skipped leaves nothing behind: the run is, bit for bit, the one that never saw its samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megamoe.config import derive
from megamoe.model.block import Block
from megamoe.model.initialise import initialise
from megamoe.parallel import collectives
from megamoe.parallel.groups import build_groups
from megamoe.testing import parity
from megamoe.testing import parity_record as record
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import RankError, run_ranks
from megamoe.training.engine import Engine
from megamoe.training.faulty_step import dump_step
from megamoe.training.job import build_engine
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.state import TrainState
from megamoe.training.step import SKIPPED, train_step

THOROUGH = pytest.mark.thorough
MUON = ("training.optimizer.type=muon", "training.gradient_clipping=0.0")
BF16 = "training.precision=bf16"
OFFLOAD = "parallel.offload_optimizer=true"
LIMIT = 120.0

GOOD = ((0, ""), (1, ""), (2, ""))
"""Numbers of the samples, and what goes wrong with them."""
BAD = ((3, "nan"), (0, ""), (4, "spike"), (5, "nan"), (1, ""), (6, "nan"), (7, "spike"), (2, ""))


class Trained(NamedTuple):
    """What a rank has in the end."""

    norms: list[float]
    skipped: list[bool]
    values: dict[str, Any]


def train(overrides: tuple[str, ...], steps: tuple[tuple[int, str], ...]) -> Trained:
    engine, runtime = built(overrides)
    config, dp = engine.config, runtime.groups.dp
    norms, skipped = [], []
    for number, fault in steps:
        micro_steps = range(derive.accumulation_steps(config, runtime.world_size))
        batches = [parity.random_tokens(config, number, m * dp.size + dp.place) for m in micro_steps]
        if fault == "nan" and runtime.rank == runtime.world_size - 1:
            poison_once(engine)
        accept = (lambda norm: False) if fault == "spike" else math.isfinite
        result, norm = train_step(engine, batches, 1.0, accept=accept)
        norms.append(norm)
        skipped.append(result.flags[SKIPPED])
    values = {"weight": record.weights(engine), **record.moments(engine), "statistic": record.statistics(engine)}
    engine.close()
    return Trained(norms, skipped, values)


def built(overrides: tuple[str, ...]) -> tuple[Engine, Runtime]:
    config, ranks = tiny_config(*overrides), collectives.world_size()
    groups = build_groups(topology_of(config.parallel, ranks), timedelta(seconds=LIMIT))
    runtime = Runtime(collectives.rank(), ranks, parity.CPU, groups)
    fill = partial(initialise, config=config.model, seed=config.training.seed)
    return build_engine(config, runtime, derive.vocab_size(config), fill), runtime


def poison_always(engine: Engine, after: Callable[[], None] = lambda: None) -> RemovableHandle:
    """NaN in what a block of this rank gives."""
    block = next(module for module in engine.model.modules() if isinstance(module, Block))

    def poison(module: Block, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        after()
        return output[0] * math.nan, output[1]

    return block.register_forward_hook(poison)


def poison_once(engine: Engine) -> None:
    """The same for the next micro-batch only."""
    handle = poison_always(engine, lambda: handle.remove())


@pytest.mark.parametrize(
    "ranks, overrides",
    [
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=0"), id="zero0", marks=THOROUGH),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=1", "moe.router.type=resonance"), id="zero1"),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=2"), id="zero2", marks=THOROUGH),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=3"), id="zero3", marks=THOROUGH),
        pytest.param(4, ("parallel.ep=2", "parallel.zero_stage=3"), id="zero3_edp2", marks=THOROUGH),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=1", BF16), id="zero1_bf16", marks=THOROUGH),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=2", BF16), id="zero2_bf16", marks=THOROUGH),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=3", BF16), id="zero3_bf16", marks=THOROUGH),
        pytest.param(2, ("parallel.pp=2", "parallel.zero_stage=1"), id="pp2", marks=THOROUGH),
        pytest.param(
            4, ("parallel.pp=2", "parallel.ep=2", "parallel.zero_stage=1", BF16), id="pp2_bf16", marks=THOROUGH
        ),
        pytest.param(2, ("parallel.tp=2", "parallel.ep=2", "parallel.zero_stage=1"), id="tp2", marks=THOROUGH),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=1", OFFLOAD), id="zero1_offload", marks=THOROUGH),
        pytest.param(
            2, ("parallel.ep=2", "parallel.zero_stage=2", OFFLOAD, BF16), id="zero2_bf16_offload", marks=THOROUGH
        ),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=3", OFFLOAD), id="zero3_offload", marks=THOROUGH),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=0", *MUON), id="zero0_muon", marks=THOROUGH),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=1", *MUON), id="zero1_muon", marks=THOROUGH),
        pytest.param(
            2, ("moe.num_experts=0", "parallel.zero_stage=1", BF16, *MUON), id="dense_zero1_bf16_muon", marks=THOROUGH
        ),
        pytest.param(2, ("parallel.ep=2", "parallel.zero_stage=2", BF16, *MUON), id="zero2_bf16_muon", marks=THOROUGH),
        pytest.param(
            2, ("parallel.ep=2", "parallel.zero_stage=0", "training.precision=fp64"), id="zero0_fp64", marks=THOROUGH
        ),
    ],
)
def test_a_skipped_step_leaves_nothing_behind(ranks: int, overrides: tuple[str, ...]) -> None:
    straight = run_ranks(train, ranks, overrides, GOOD, timeout=LIMIT)
    disturbed = run_ranks(train, ranks, overrides, BAD, timeout=LIMIT)
    for rank in range(ranks):
        expected, got = straight[rank], disturbed[rank]
        assert expected.skipped == [False] * len(GOOD)
        assert got.skipped == [fault != "" for _, fault in BAD]
        assert [norm for norm, skipped in zip(got.norms, got.skipped, strict=True) if not skipped] == expected.norms
        poisoned = [not math.isfinite(norm) for norm in got.norms]
        assert poisoned == [fault == "nan" for _, fault in BAD]
        assert_same_bits(got.values, expected.values)


def assert_same_bits(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for kind, tensors in expected.items():
        assert got[kind].keys() == tensors.keys()
        differing = [name for name, tensor in tensors.items() if not torch.equal(got[kind][name], tensor)]
        assert not differing, f"{kind} of {differing}"


class Dumped(NamedTuple):
    """What a rank left of a step, and what it has after the next one."""

    batches: list[dict[str, Tensor]]
    values: dict[str, Any]


def train_with_dump(overrides: tuple[str, ...], lasting: bool) -> Dumped:
    """A step, one with NaN that is dumped, and another step."""
    engine, runtime = built(overrides)
    config, place = engine.config, runtime.groups.dp.place
    batches = [[parity.random_tokens(config, step, 2 * m + place) for m in range(2)] for step in range(3)]
    train_step(engine, batches[0], 1.0)
    if runtime.rank == 1:
        poison_once(engine)
    _, norm = train_step(engine, batches[1], 1.0)
    handle = poison_always(engine) if lasting and runtime.rank == 1 else None
    dump_step(engine, config, batches[1], 1.0, norm, TrainState(2, 16, 512, 1, 1))
    if handle is not None:
        handle.remove()
    train_step(engine, batches[2], 1.0)
    values = {"weight": record.weights(engine), **record.moments(engine)}
    engine.close()
    return Dumped([{"tokens_BS": b.tokens_BS, "labels_BS": b.labels_BS} for b in batches[1]], values)


@THOROUGH
@pytest.mark.parametrize("lasting", [True, False])
def test_what_is_left_of_a_step(tmp_path: Path, lasting: bool) -> None:
    """Of a step that gives NaN again, and of one that does not: then a machine is to blame."""
    overrides = ("parallel.ep=2", f"training.output_dir={tmp_path}", "training.global_batch_size=8")
    dumped = run_ranks(train_with_dump, 2, overrides, lasting, timeout=LIMIT)
    folder = tmp_path / "faults" / "step_00000002"
    step = json.loads((folder / "step.json").read_text())
    assert (step["gradient_norm"], step["samples"], step["ranks"]) == ("inf", [8, 16], 2)
    assert (step["gradient_norm_again"] == "inf") is lasting
    for rank, of_rank in enumerate(dumped):
        left = json.loads((folder / f"rank_{rank:05d}.json").read_text())
        assert bool(left["not_finite"]) is lasting
        assert set(left["gradient_norms"]) == set(of_rank.values["exp_avg"])
        saved = load_file(folder / f"rank_{rank:05d}.safetensors")
        expected = {f"micro_batch_{m}.{name}": v for m, b in enumerate(of_rank.batches) for name, v in b.items()}
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in expected)
    straight = run_ranks(train, 2, overrides, ((0, ""), (2, "")), timeout=LIMIT)
    for rank in range(2):
        assert_same_bits(dumped[rank].values, {k: v for k, v in straight[rank].values.items() if k != "statistic"})


@THOROUGH
def test_a_dump_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("a file is in the way")
    overrides = ("parallel.ep=2", f"training.output_dir={tmp_path}")
    assert len(run_ranks(train_with_dump, 2, overrides, True, timeout=LIMIT)) == 2


def disagreeing() -> None:
    engine, runtime = built(("parallel.ep=2",))
    batches = [parity.random_tokens(engine.config, 0, m * 2 + runtime.rank) for m in range(2)]
    train_step(engine, batches, 1.0, accept=lambda norm: runtime.rank == 0)


def test_ranks_that_decide_differently_stop() -> None:
    with pytest.raises(RankError, match="some ranks did a step and others skipped it"):
        run_ranks(disagreeing, 2, timeout=LIMIT)
