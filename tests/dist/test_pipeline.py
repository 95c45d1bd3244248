"""Blocks spread over the stages of a pipeline, against one process on the same micro-batches."""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.common.errors import MegamoeError
from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.model.pipeline import DecoderStage
from megamoe.moe.layer import MoELayer
from megamoe.parallel import collectives
from megamoe.parallel.groups import build_groups
from megamoe.testing import parity
from megamoe.testing.configs import tiny_config
from megamoe.testing.saving import save_now
from megamoe.testing.ranks import RankError, run_ranks
from megamoe.training.engine import Engine
from megamoe.training.checkpoint.folder import read_manifest
from megamoe.training.checkpoint.load import load_checkpoint
from megamoe.training.job import build_engine
from megamoe.training.metrics import Accumulator
from megamoe.training.state import TrainState
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.step import train_step

STEPS = 4
THOROUGH = pytest.mark.thorough
ZERO_0, ZERO_1 = "parallel.zero_stage=0", "parallel.zero_stage=1"
FP64 = "training.precision=fp64"
UNTIED = "model.tie_embeddings=false"
RESONANCE = "moe.router.type=resonance"
STATIC = (RESONANCE, "moe.capacity.mode=static", "moe.router.threshold=0.9")
FOLLOWING = (RESONANCE, "moe.capacity={mode: etr_success, momentum: 0.5, tile: 4}")
STRONG = "moe.router.balance_loss=5.0"
MIXED = ("model.num_layers=5", "moe.first_k_dense=1", "moe.every_n_layers=2", "moe.num_shared_experts=1")


def train(overrides: tuple[str, ...]) -> parity.ParityRun:
    return parity.train_steps(tiny_config(*overrides), STEPS)


@functools.cache
def reference(*settings: str) -> parity.ParityRun:
    return run_ranks(train, 1, (ZERO_0, *settings))[0]


def layout(pp: int, ep: int = 1) -> tuple[str, ...]:
    return f"parallel.pp={pp}", f"parallel.ep={ep}"


@pytest.mark.parametrize(
    "ranks, pp, ep, settings",
    [
        pytest.param(2, 2, 1, (), id="pp2-tied"),
        pytest.param(4, 2, 2, (UNTIED, RESONANCE), id="pp2-ep2-untied-resonance"),
        pytest.param(4, 2, 1, FOLLOWING, id="pp2-dp2-following-capacity", marks=THOROUGH),
        pytest.param(2, 2, 1, MIXED, id="pp2-mixed-blocks"),
        pytest.param(3, 3, 1, ("model.num_layers=4", UNTIED), id="pp3-untied"),
    ],
)
def test_stages_equal_one_process(ranks: int, pp: int, ep: int, settings: tuple[str, ...]) -> None:
    parity.compare(run_ranks(train, ranks, (*layout(pp, ep), ZERO_1, *settings))[0], reference(*settings))


@pytest.mark.parametrize(
    "ranks, pp, ep, settings",
    [
        pytest.param(2, 2, 1, (), id="pp2-tied", marks=THOROUGH),
        pytest.param(4, 2, 2, (UNTIED, RESONANCE), id="pp2-ep2-untied-resonance", marks=THOROUGH),
        pytest.param(4, 2, 2, STATIC, id="pp2-ep2-static-capacity"),
        pytest.param(2, 2, 1, MIXED, id="pp2-mixed-blocks", marks=THOROUGH),
        pytest.param(3, 3, 1, ("model.num_layers=3", STRONG), id="pp3-tied-strong-balance"),
    ],
)
def test_in_fp64_only_rounding_is_left(ranks: int, pp: int, ep: int, settings: tuple[str, ...]) -> None:
    run = run_ranks(train, ranks, (*layout(pp, ep), ZERO_0, *settings, FP64))[0]
    parity.compare(run, reference(*settings, FP64), parity.EXACT)


@pytest.mark.parametrize("axis, zero", [("tp", ZERO_1), ("cp", ZERO_0)])
def test_stages_whose_sequences_are_spread(axis: str, zero: str) -> None:
    """Only the rank's own positions travel to the next stage."""
    run = run_ranks(train, 4, (*layout(2, 2), f"parallel.{axis}=2", zero))[0]
    parity.compare(run, reference())


@pytest.mark.parametrize("recompute", ["full", *(pytest.param(name, marks=THOROUGH) for name in ("attention", "moe"))])
def test_recomputation_changes_nothing(recompute: str) -> None:
    overrides = (*layout(2, 2), ZERO_1, *FOLLOWING, f"training.recompute={recompute}")
    parity.compare(run_ranks(train, 4, overrides)[0], reference(*FOLLOWING))


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_balance_loss_counts_once_on_every_stage(micro_batch_size: int) -> None:
    """Its coefficient is raised until it dominates. The stages before the last one have no loss of their own, and take
    its gradients another way."""
    settings = (STRONG, "model.num_layers=3", f"training.micro_batch_size={micro_batch_size}")
    run = run_ranks(train, 3, (*layout(3), ZERO_1, *settings))[0]
    parity.compare(run, reference(*settings))
    assert run.auxiliary[0] > 0.5 * run.losses[0]


@THOROUGH
def test_muon_equals_one_process() -> None:
    """Without clipping: DeepSpeed's ZeRO would clip the orthogonalised matrices."""
    settings = ("training.optimizer.type=muon", "training.gradient_clipping=0.0", UNTIED)
    one, two = (run_ranks(train, ranks, (*more, ZERO_1, *settings))[0] for ranks, more in ((1, ()), (2, layout(2))))
    parity.compare(two, one)


def packed(config: RunConfig, step: int, micro_batch: int) -> Batch:
    """Two documents and padding per sequence; the labels of the first one do not count."""
    tokens_BS, labels_BS = parity.random_tokens(config, step, micro_batch)[:2]
    documents_BS = torch.full_like(tokens_BS, PADDING)
    documents_BS[:, :12], documents_BS[:, 12:28] = 0, 1
    labels_BS = labels_BS.masked_fill(documents_BS < 1, IGNORED)
    return Batch(tokens_BS, labels_BS, documents_BS, targets=30.0)


def train_packed(overrides: tuple[str, ...]) -> parity.ParityRun:
    return parity.train_steps(tiny_config(*overrides), 3, packed)


def test_documents_and_targets_reach_every_stage() -> None:
    run = run_ranks(train_packed, 4, (*layout(2, 2), ZERO_1, RESONANCE))[0]
    parity.compare(run, run_ranks(train_packed, 1, (ZERO_0, RESONANCE))[0])


@pytest.mark.parametrize("settings", [(RESONANCE,), (UNTIED,)], ids=["tied", "untied"])
def test_bf16_follows_fp32(settings: tuple[str, ...]) -> None:
    bf16 = run_ranks(train, 4, (*layout(2, 2), ZERO_1, *settings, "training.precision=bf16"))[0]
    fp32 = reference(*settings)
    assert abs(bf16.losses[0] - fp32.losses[0]) < 5e-3
    assert abs(bf16.norms[0] - fp32.norms[0]) < 0.05 * fp32.norms[0]
    assert max(abs(a - b) for a, b in zip(bf16.losses, fp32.losses, strict=True)) < 3e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_optimizer_on_the_cpu(precision: str) -> None:
    """In bf16 ZeRO accumulates beside `grad`, where DeepSpeed's sum over a tied embedding's stages does not look."""
    settings = ("parallel.offload_optimizer=true", ZERO_1, f"training.precision={precision}")
    run, fp32 = run_ranks(train, 2, (*layout(2), *settings))[0], reference()
    if precision == "fp32":
        parity.compare(run, fp32)
    assert abs(run.norms[0] - fp32.norms[0]) < 0.05 * fp32.norms[0]
    assert max(abs(a - b) for a, b in zip(run.losses, fp32.losses, strict=True)) < 2e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_experts_are_trained(precision: str) -> None:
    """DeepSpeed's optimizer for bf16 fails to add up the norm of no dense gradients at all."""
    settings = ('training.trainable=["*.experts.*"]', f"training.precision={precision}")
    one, two = (run_ranks(train, ranks, (*more, ZERO_1, *settings))[0] for ranks, more in ((1, ()), (2, layout(2))))
    if precision == "fp32":
        parity.compare(two, one)
    assert abs(two.norms[0] - one.norms[0]) < 0.05 * one.norms[0]
    assert all(".experts." in name for name in two.gradients)


# --- One engine, by hand


def engine_of(config: RunConfig) -> tuple[Engine, Runtime]:
    groups = build_groups(topology_of(config.parallel, collectives.world_size()))
    runtime = Runtime(groups.rank, groups.topology.world_size, torch.device("cpu"), groups)
    fill = partial(initialise, config=config.model, seed=config.training.seed)
    return build_engine(config, runtime, derive.vocab_size(config), fill), runtime


def batch_of(size: int, length: int, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    samples = torch.randint(0, 320, (size, length + 1), generator=generator)
    return Batch(samples[:, :-1], samples[:, 1:])


def scored(overrides: tuple[str, ...], shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Validation of batches of several shapes, with a step of training between them."""
    config = tiny_config(*overrides)
    engine, runtime = engine_of(config)
    results = []
    for number, (size, length) in enumerate(shapes):
        batch = batch_of(size, length, number)
        accumulator = Accumulator()
        with engine.evaluating():
            accumulator.add(engine.evaluate(batch))
            scores = engine.evaluate(batch, each=True).scores
        values = accumulator.reduce(runtime.groups).scalars()
        results.append({"scores": scores, **{name: values[name] for name in ("loss", "cross_entropy", "balance_loss")}})
        steps = derive.accumulation_steps(config, runtime.world_size)
        train_step(engine, [batch_of(2, 32, number)] * steps, 1.0)
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_is_known_on_every_stage(precision: str) -> None:
    shapes, settings = [(2, 32), (1, 32), (3, 16), (2, 32)], (f"training.precision={precision}",)
    (one,) = run_ranks(scored, 1, (ZERO_1, *settings), shapes)
    tolerance = 1e-5 if precision == "fp32" else 0.05
    for results in run_ranks(scored, 2, (*layout(2), ZERO_1, *settings), shapes):
        for mine, expected in zip(results, one, strict=True):
            torch.testing.assert_close(mine["scores"].losses_BS, expected["scores"].losses_BS, atol=tolerance, rtol=0)
            assert torch.equal(mine["scores"].counted_BS, expected["scores"].counted_BS)
            assert mine["scores"].losses_BS.dtype == expected["scores"].losses_BS.dtype == torch.float32
            assert precision == "bf16" or torch.equal(mine["scores"].right_BS, expected["scores"].right_BS)
            for name in ("loss", "cross_entropy", "balance_loss"):
                assert mine[name] == pytest.approx(expected[name], abs=tolerance)


def test_batches_that_do_not_fit_are_refused() -> None:
    assert run_ranks(trained_with, 2, [(2, 32)] * 3) == ["refused"] * 2
    assert run_ranks(trained_with, 2, [(2, 32)] * 3 + [(1, 32)]) == ["refused"] * 2
    assert run_ranks(trained_with, 2, [(2, 32)] * 4) == ["trained"] * 2


def trained_with(shapes: list[tuple[int, int]]) -> str:
    engine, _ = engine_of(tiny_config(*layout(2)))
    try:
        train_step(engine, [batch_of(*shape, number) for number, shape in enumerate(shapes)], 1.0)
    except ValueError:
        return "refused"
    return "trained"


# --- Names and checkpoints


def names_on(overrides: tuple[str, ...]) -> tuple[list[str], list[str]]:
    engine, _ = engine_of(tiny_config(*overrides))
    return [name for name, _ in engine.full_weights()], [name for name, _ in engine.model.named_parameters()]


@pytest.mark.parametrize("tie", [True, False])
def test_every_weight_is_on_one_stage_under_its_global_name(tie: bool) -> None:
    overrides = (*layout(3), "model.num_layers=4", f"model.tie_embeddings={str(tie).lower()}")
    whole = {name for name, _ in Decoder(tiny_config(*overrides[2:]), 320).named_parameters()}
    stages = run_ranks(names_on, 3, overrides)
    given = [name for names, _ in stages for name in names]
    assert sorted(given) == sorted(whole)
    assert all(any(name.startswith("blocks.") for name in names) for names, _ in stages)
    assert ("embedding.weight" in stages[2][1]) == tie
    assert "embedding.weight" in stages[0][0]


def resumed(overrides: tuple[str, ...], folder: Path, straight: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and norms of four steps, and the weights after them; half-way into a new engine, or not."""
    config = tiny_config(*overrides)
    engine, runtime = engine_of(config)
    numbers: list[float] = []
    for step in range(4):
        if step == 2 and not straight:
            checkpoint = save_now(engine, folder, TrainState(2))
            engine.close()
            engine, runtime = engine_of(config.model_copy(update={"training": other_seed(config)}))
            load_checkpoint(engine, checkpoint, read_manifest(checkpoint))
        steps = derive.accumulation_steps(config, runtime.world_size)
        own = [runtime.groups.dp.size * micro_step + runtime.groups.dp.place for micro_step in range(steps)]
        result, norm = train_step(engine, [parity.random_tokens(config, step, number) for number in own], 1.0)
        numbers += [float(result.values["loss"]), norm]
    return numbers, {name: tensor.clone() for name, tensor in engine.full_weights()}


def other_seed(config: RunConfig) -> Any:
    return config.training.model_copy(update={"seed": config.training.seed + 1})


@pytest.mark.parametrize(
    "ranks, overrides",
    [
        pytest.param(2, (*layout(2), ZERO_1), id="pp2"),
        pytest.param(2, (*layout(2), ZERO_0, UNTIED), id="pp2-zero0", marks=THOROUGH),
        pytest.param(4, (*layout(2, 2), ZERO_1, "training.precision=bf16", *FOLLOWING), id="pp2-ep2-bf16"),
        pytest.param(4, (*layout(2, 2), "parallel.tp=2", ZERO_1), id="pp2-tp2-ep2", marks=THOROUGH),
    ],
)
def test_goes_on_where_it_stopped(tmp_path: Path, ranks: int, overrides: tuple[str, ...]) -> None:
    whole = run_ranks(resumed, ranks, overrides, tmp_path, True)
    halves = run_ranks(resumed, ranks, overrides, tmp_path, False)
    for (numbers, weights), (expected, straight) in zip(halves, whole, strict=True):
        assert numbers == expected
        assert weights.keys() == straight.keys()
        assert all(torch.equal(weights[name], straight[name]) for name in weights)


# --- What would hang or train wrongly is refused on every rank


@pytest.mark.parametrize("pattern", ["blocks.1.ffn.experts.*", "norm.*"])
def test_stages_that_train_other_kinds_are_refused(pattern: str) -> None:
    """DeepSpeed waits for ever in the first step where a stage has fewer parameter groups than another."""
    trainable = f'training.trainable=["{pattern}", "*.ffn.router.*"]'
    with pytest.raises(RankError, match="do not train the same kinds"):
        run_ranks(engine_of_overrides, 2, (*layout(2), trainable), timeout=60)


def engine_of_overrides(overrides: tuple[str, ...]) -> str:
    engine_of(tiny_config(*overrides))
    return "accepted"


def test_a_stage_whose_experts_the_engine_does_not_see_is_refused() -> None:
    for message in run_ranks(with_disguised_experts, 2):
        assert "did not recognise" in message


def with_disguised_experts() -> str:
    """Stage 1 has experts outside of any layer that DeepSpeed knows."""
    config = tiny_config(*layout(2))
    groups = build_groups(topology_of(config.parallel, 2))
    runtime = Runtime(groups.rank, 2, torch.device("cpu"), groups)

    def fill(stage: torch.nn.Module) -> None:
        assert isinstance(stage, DecoderStage)
        for block in stage.numbered_blocks().values() if groups.rank == 1 else ():
            layer = block.ffn
            assert isinstance(layer, MoELayer)
            block.ffn = torch.nn.ModuleDict({"router": layer.router, "experts": layer.experts})

    try:
        build_engine(config, runtime, derive.vocab_size(config), fill)
    except MegamoeError as error:
        return str(error)
    return "accepted"
