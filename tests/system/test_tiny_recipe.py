"""The recipe of the README as it is, on real text: both routers learn on two ranks, and one rank learns the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.data.loader import BatchLoader
from megamoe.data.manifest import check_prepared
from megamoe.testing import parity
from megamoe.testing.launches import launch
from megamoe.testing.ranks import run_ranks
from megamoe.testing.runs import Run

pytestmark = pytest.mark.slow

RECIPE = "configs/tiny.yaml"
ROUTERS = ("topk", "resonance")
STEPS_ALIKE = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard library as token files."""
    folder = tmp_path_factory.mktemp("tiny") / "stdlib"
    result = launch("python", "megamoe/__main__.py", ["data", "prepare", *recipe("topk", folder)])
    assert result.returncode == 0, result.output
    return folder


def recipe(router: str, data: Path) -> list[str]:
    return ["--config", RECIPE, f"configs/moe/{router}.yaml", f"data.prepared_dir={data}"]


@pytest.fixture(scope="module", params=ROUTERS)
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    """The whole recipe on two ranks; nothing is changed but where the files lie."""
    folder = tmp_path_factory.mktemp("tiny") / request.param
    run = Run((*recipe(request.param, data), f"training.output_dir={folder}"), folder)
    result = launch("deepspeed", "launch/pretrain.py", run.words, ranks=2, timeout=600)
    assert result.returncode == 0, result.output
    return request.param, run


def test_it_learns(trained: tuple[str, Run]) -> None:
    """From knowing nothing, ln(vocabulary), to less than 60 % of it."""
    _, run = trained
    config = load_config([RECIPE])
    nothing = math.log(config.data.tokenizer.vocab_size)
    lines = run.metrics()
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert lines[0]["cross_entropy"] == pytest.approx(nothing, abs=0.3)
    assert lines[-1]["step"] == config.training.steps
    assert validation[-1] < 0.6 * nothing
    assert validation == sorted(validation, reverse=True)


def first_steps(words: list[str]) -> parity.ParityRun:
    """The recipe's first steps on its own samples, with every routing decision."""
    config = load_config(words[:2], words[2:])
    loader = BatchLoader(config.data, check_prepared(config.data), "train", config.training.seed)

    def batches(config: RunConfig, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        consumed = step * config.training.global_batch_size
        return loader.rank_batch(consumed, micro_batch, 0, 1, config.training.micro_batch_size)

    return parity.train_steps(config, STEPS_ALIKE, batches)


@pytest.mark.parametrize("router", ROUTERS)
def test_one_rank_gives_the_same_losses(router: str, data: Path) -> None:
    """The same samples in as many micro-batches on one rank and on two, without dropped tokens.

    Sums have another order, so at some step a token that is as near to two experts as rounding goes takes another
    one, and from then on the runs part as any two such runs do. Until that flip the losses agree to fp32 rounding;
    where the first flip happens in these steps, it is a near tie.
    """
    words = [RECIPE, f"configs/moe/{router}.yaml", f"data.prepared_dir={data}"]
    one = run_ranks(first_steps, 1, [*words, "parallel.ep=1"], timeout=300)[0]
    two = run_ranks(first_steps, 2, words, timeout=300)[0]
    flipped = [place for place in sorted(one.choices) if not torch.equal(one.choices[place], two.choices[place])]
    alike = flipped[0][0] if flipped else STEPS_ALIKE
    assert alike >= 5, parity.routing_flips(two, one)[:5]
    assert two.losses[:alike] == pytest.approx(one.losses[:alike], rel=1e-6)
    if flipped:
        first = flipped[0]
        differs_T = (one.choices[first] != two.choices[first]).any(-1)
        assert float(one.margins[first][differs_T].min()) < 1e-4
