"""Stages in a row, in one process, against the whole decoder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megamoe.config.run import RunConfig
from megamoe.config.stages import stage_bounds
from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.model.decoder import Decoder, ModelOutput
from megamoe.model.initialise import initialise
from megamoe.model.pipeline import DecoderStage, with_losses
from megamoe.testing.configs import tiny_config

VOCABULARY = 320


def in_stages(config: RunConfig) -> list[DecoderStage]:
    stages = [DecoderStage(config, VOCABULARY, stage=stage) for stage in range(config.parallel.pp)]
    for stage in stages:
        initialise(stage, config.model, seed=7)
    return stages


def whole(config: RunConfig) -> Decoder:
    decoder = Decoder(config, VOCABULARY)
    initialise(decoder, config.model, seed=7)
    return decoder


def one_after_the_other(stages: list[DecoderStage], batch: Batch, each: bool = False) -> Iterator[ModelOutput]:
    hidden_BSD = None
    for stage in stages:
        hidden_BSD, output = stage(hidden_BSD, batch, each=each)
        yield output


def batch_of(documents: bool) -> Batch:
    tokens = torch.randint(0, VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(3))
    if not documents:
        return Batch(tokens[:, :-1], tokens[:, 1:])
    documents_BS = torch.full((2, 32), PADDING)
    documents_BS[:, :10], documents_BS[:, 10:25] = 0, 1
    return Batch(tokens[:, :-1], tokens[:, 1:].masked_fill(documents_BS < 1, IGNORED), documents_BS, targets=30.0)


def gradients(*models: torch.nn.Module) -> dict[str, Tensor]:
    """By name, summed over the models."""
    total: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, torch.zeros(())) + parameter.grad
    return total


SETTINGS = (
    ("model.tie_embeddings=true", "moe.router.balance_loss=5.0", "training.recompute=full"),
    ("model.tie_embeddings=false", "moe.router.type=resonance", "moe.num_shared_experts=1"),
    ("model.tie_embeddings=true", "moe.first_k_dense=1", "moe.router.z_loss=0.5", "training.recompute=attention"),
)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_stages_are_the_decoder(settings: tuple[str, ...], documents: bool) -> None:
    config = tiny_config("parallel.pp=3", "model.num_layers=5", *settings)
    decoder, stages, batch = whole(config), in_stages(config), batch_of(documents)
    expected = decoder(*batch)
    outputs = list(one_after_the_other(stages, batch))
    torch.testing.assert_close(sum(output.loss for output in outputs), expected.loss)
    torch.testing.assert_close(sum(output.cross_entropy for output in outputs), expected.cross_entropy)
    expected.loss.backward()
    outputs[-1].loss.backward()
    torch.testing.assert_close(gradients(*stages), gradients(decoder))


def test_every_block_says_its_own() -> None:
    config = tiny_config("parallel.pp=3", "model.num_layers=5", "moe.first_k_dense=1")
    expected = whole(config)(*batch_of(False)).layers
    for stage, output in zip(in_stages(config), one_after_the_other(in_stages(config), batch_of(False)), strict=True):
        assert len(output.layers) == 5
        for number, layer in enumerate(output.layers):
            here = number in stage.numbered_blocks()
            torch.testing.assert_close(layer.losses, expected[number].losses if here else {})
            assert layer.metrics.keys() == (expected[number].metrics.keys() if here else set())


def test_the_last_stage_scores() -> None:
    config = tiny_config("parallel.pp=2")
    expected = whole(config)(*batch_of(True), each=True)
    first, last = one_after_the_other(in_stages(config), batch_of(True), each=True)
    assert first.scores is None
    torch.testing.assert_close(last.scores, expected.scores)
    torch.testing.assert_close(last.cross_entropy, expected.cross_entropy)


@pytest.mark.parametrize("tie", ["true", "false"])
def test_names_are_those_of_the_decoder(tie: str) -> None:
    config = tiny_config("parallel.pp=3", "model.num_layers=4", f"model.tie_embeddings={tie}")
    stages, expected = in_stages(config), dict(whole(config).named_parameters())
    held = [name for stage in stages for name, _ in stage.named_parameters()]
    tied = ["embedding.weight"] if tie == "true" else []
    assert sorted(held) == sorted([*expected, *tied])
    for stage, (first, end) in zip(stages, pairwise(stage_bounds(config)), strict=True):
        assert list(stage.numbered_blocks()) == list(range(first, end))
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, expected[name])


def test_losses_ride_on_the_hidden_state() -> None:
    hidden, loss = torch.ones(2, 3, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    carried = with_losses(hidden, loss, 0.25)
    assert torch.equal(carried, hidden)
    carried.backward(torch.full((2, 3), 7.0))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.full((2, 3), 7.0))
    assert loss.grad == 0.25
