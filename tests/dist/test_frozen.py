"""Training a part of the parameters: the same numbers as one process, and checkpoints that hold the rest as well."""

from __future__ import annotations

import functools
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megamoe.common import env
from megamoe.config import derive
from megamoe.config.model import ModelConfig
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.testing import parity
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import run_ranks
from megamoe.testing.runs import TIMING, prepared_run
from megamoe.training import pretrain
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.reader import Reader

STEPS = 3
PARTS = {
    "experts": ("*.experts.*", ('training.trainable=["*.experts.*"]',)),
    "router": ("*.router.*", ('training.trainable=["*.router.*"]',)),
    "attention": ("*.attention.*", ('training.trainable=["*.attention.*"]',)),
    "all_but_router": ("*", ('training.frozen=["*.router.*"]',)),
    # Frozen experts beside trained ones, and a frozen matrix of these.
    "some_experts": ("blocks.1.ffn.experts.w[12]", ('training.trainable=["blocks.1.ffn.experts.w[12]"]',)),
}
CLIPPING = "training.gradient_clipping=0.0004"
"""Below the norm of every part's gradients (the router's are 0.0007), so that clipping is active."""


def is_trained(part: str, name: str) -> bool:
    return fnmatchcase(name, PARTS[part][0]) and not (part == "all_but_router" and ".router." in name)


def train(overrides: tuple[str, ...]) -> parity.ParityRun:
    return parity.train_steps(tiny_config(CLIPPING, *overrides), STEPS)


def train_parts(overrides: tuple[str, ...]) -> dict[str, parity.ParityRun]:
    return {part: train((*overrides, *words)) for part, (_, words) in PARTS.items()}


@functools.cache
def parts_of(ranks: int, overrides: tuple[str, ...]) -> list[dict[str, parity.ParityRun]]:
    """Every part trained in turn, per rank; one start of processes for all of them."""
    return run_ranks(train_parts, ranks, overrides)


def reference(part: str) -> parity.ParityRun:
    return parts_of(1, ("parallel.zero_stage=0",))[0][part]


@functools.cache
def start() -> dict[str, Tensor]:
    config = tiny_config()
    model = Decoder(config, derive.vocab_size(config))
    initialise(model, config.model, config.training.seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_only_these_moved(part: str, weights: dict[str, Tensor], begin: dict[str, Tensor]) -> None:
    assert weights.keys() == begin.keys()
    moved = {name for name in begin if not torch.equal(weights[name], begin[name])}
    assert moved == {name for name in begin if is_trained(part, name)}


def layout(ep: int, stage: int) -> tuple[str, ...]:
    """At ZeRO-3 no parameter is kept whole, as DeepSpeed would keep these small ones."""
    everything = "deepspeed_extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    return (f"parallel.ep={ep}", f"parallel.zero_stage={stage}", *((everything,) if stage == 3 else ()))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("part", PARTS)
def test_parts_equal_one_process(part: str, stage: int) -> None:
    """Also that experts of different ranks stay different ones, trained or not: the reference has them all."""
    for one in (rank[part] for rank in parts_of(2, layout(2, stage))):
        assert_only_these_moved(part, one.weights, start())
        assert one.gradients.keys() == {name for name in start() if is_trained(part, name)}
        assert min(one.norms) > 0.0004, "clipping is not active"
        parity.compare(one, reference(part))


@pytest.mark.parametrize("part, stage", [("router", 1), ("some_experts", 3)])
def test_experts_that_both_ranks_hold(part: str, stage: int) -> None:
    for one in run_ranks(train, 2, (*layout(1, stage), *PARTS[part][1])):
        parity.compare(one, reference(part))


@pytest.mark.parametrize("part", ["experts", "router"])
def test_parts_in_bf16(part: str) -> None:
    """What is frozen keeps its value in bf16; what is trained has fp32 masters and follows fp32."""
    one = run_ranks(train, 2, (*layout(2, 1), "training.precision=bf16", *PARTS[part][1]))[1]
    begin = {name: w if is_trained(part, name) else w.bfloat16().float() for name, w in start().items()}
    assert_only_these_moved(part, one.weights, begin)
    assert abs(one.losses[0] - reference(part).losses[0]) < 5e-3
    assert abs(one.norms[0] - reference(part).norms[0]) < 0.05 * reference(part).norms[0]


def test_recomputation_of_frozen_blocks() -> None:
    """The input of a recomputed block needs no gradient where nothing before it is trained."""
    one = run_ranks(train, 2, (*layout(2, 3), "training.recompute=full", *PARTS["some_experts"][1]))[0]
    parity.compare(one, reference("some_experts"))


def test_muon_leaves_the_frozen_ones() -> None:
    muon = ("training.optimizer.type=muon", "training.gradient_clipping=0.0")
    one = run_ranks(train, 2, (*layout(2, 1), *PARTS["some_experts"][1], *muon))[1]
    assert_only_these_moved("some_experts", one.weights, start())


def job(overrides: tuple[str, ...], shift: int = 0) -> int:
    """Pretraining that starts from the weights of another seed, so that only the checkpoint can bring these back."""
    original = pretrain.initialise

    def shifted(model: nn.Module, config: ModelConfig, seed: int) -> None:
        original(model, config, seed + shift)

    pretrain.initialise = shifted
    return pretrain.pretrain(tiny_config(*overrides), env.world_size()).step


def outcome(run: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """What is written about the last two steps, and everything that is saved after them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [{k: v for k, v in line.items() if k not in TIMING} for line in lines if line["step"] > 2]
    reader = Reader(folders.root(run) / folders.final_name(4))
    return values, {tensor: reader.read(tensor) for tensor in reader.index.tensors}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    short = ("training.steps=4", "training.checkpoint.every=2", "training.validation.every=4")
    return prepared_run(tmp_path_factory.mktemp("frozen"), *short)


@pytest.mark.parametrize(
    "part, stage, precision",
    [
        *((part, stage, "fp32") for part in ("experts", "router") for stage in (1, 3)),
        ("router", 2, "fp32"),
        ("some_experts", 3, "bf16"),
        ("router", 1, "bf16"),
    ],
)
def test_resume_brings_back_what_is_frozen(
    tmp_path: Path, prepared: tuple[str, ...], part: str, stage: int, precision: str
) -> None:
    run = (*prepared, *layout(2, stage), f"training.precision={precision}", *PARTS[part][1])
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run_ranks(job, 2, (*run, f"training.output_dir={straight}"), init=False) == [4, 4]
    middle = folders.root(straight) / folders.final_name(2)
    again = (*run, f"training.output_dir={resumed}", f"training.checkpoint.resume={middle}")
    assert run_ranks(job, 2, again, 1, init=False) == [4, 4]
    (lines, weights), (expected_lines, expected) = outcome(resumed), outcome(straight)
    assert lines == expected_lines
    assert len(lines) == 3, "two steps and a validation"
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
