"""The adapter refuses what DeepSpeed would train wrongly without a message."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megamoe.common.errors import ConfigError
from megamoe.config import derive
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.moe.layer import MoELayer
from megamoe.moe.types import LayerAux
from megamoe.parallel.groups import build_groups
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import run_ranks
from megamoe.training.engine import Engine, check_version
from megamoe.training.setup import topology_of


class Disguised(nn.Module):
    """An MoE layer that the engine cannot recognise, because it is not of the marker's class."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.router, self.experts, self.dispatcher = layer.router, layer.experts, layer.dispatcher

    def forward(self, x: Tensor) -> tuple[Tensor, LayerAux]:
        raise AssertionError("the engine has to refuse before any forward pass")


def build_disguised(stage: int) -> str:
    config = tiny_config(f"parallel.zero_stage={stage}")
    model = Decoder(config, derive.vocab_size(config))
    initialise(model, config.model, 1)
    for block in model.blocks:
        block.ffn = Disguised(block.ffn)
    groups = build_groups(topology_of(config.parallel, 1))
    try:
        Engine(config, model, groups)
    except ConfigError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_experts_that_the_engine_does_not_see_are_refused(stage: int) -> None:
    message = run_ranks(build_disguised, 1, stage)[0]
    assert "did not recognise" in message
    assert "to do" in message


@pytest.mark.parametrize("version", ["0.19.7", "0.20", "0.20.1", "1.0"])
def test_other_versions_of_deepspeed_are_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=version):
        check_version(version)


def test_the_supported_versions_are_accepted() -> None:
    check_version("0.19.8")
    check_version("0.19.12")


def test_named_implementation_is_used() -> None:
    assert run_ranks(losses_with, 1, "reference")[0] == pytest.approx(run_ranks(losses_with, 1, "blocked")[0], abs=1e-6)


def losses_with(implementation: str) -> float:
    config = tiny_config(f"ops.expert_ffn={implementation}")
    model = Decoder(config, derive.vocab_size(config))
    initialise(model, config.model, 1)
    tokens = torch.arange(66).view(2, 33) % 300
    return float(model(tokens[:, :-1], tokens[:, 1:]).loss)
