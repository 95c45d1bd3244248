"""The one initialisation of all weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megamoe.common.determinism import stream_seed
from megamoe.config.model import ModelConfig
from megamoe.moe.placement import WHOLE, Placement
from megamoe.moe.routers.resonance import ResonanceRouter
from megamoe.parallel.axis import Axis
from megamoe.parallel.shards import Shard, part, shards_of, whole_shape

RESIDUAL_OUTPUTS = ("attention.wo.weight", "ffn.w2.weight", "shared_experts.w2.weight", "experts.w2")
"""Matrices that write into the residual stream."""


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter from its own named random stream.

    Matrices: normal with `init_std`; those that write into the residual stream are divided by sqrt(2 * layers), so
    that its variance does not grow with depth (GPT-2). Norm gains and ETR slice values: 1. ETR log scale: ln kappa_0.
    A weight depends on the seed, its name and, for an expert, its global number: not on the layout over ranks.
    """
    seen: set[nn.Parameter] = set()
    place: Placement = getattr(model, "place", WHOLE)
    axes = place.axes()
    for module_name, module in model.named_modules():
        for short_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{short_name}"
            if parameter in seen:
                continue  # a tied weight is one weight, under its first name
            seen.add(parameter)
            if isinstance(module, ResonanceRouter) and short_name == "log_scale":
                parameter.fill_(math.log(module.initial_scale))
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                _normal(parameter, _std(name, config), axes, seed, name)


def _std(name: str, config: ModelConfig) -> float:
    scale = math.sqrt(2 * config.num_layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    return config.init_std / scale


def _normal(parameter: Tensor, std: float, axes: Mapping[str, Axis], seed: int, name: str) -> None:
    """Draw the whole and keep this rank's part; of stacked experts each by itself, under its global number."""
    shape, shards = whole_shape(parameter, axes), shards_of(parameter)
    if not (shards and shards[0] == Shard(0, "ep")):
        parameter.copy_(part(_draw(shape, seed, name), shards, axes)).mul_(std)
        return
    first = axes["ep"].rank * len(parameter)
    inside = tuple(Shard(shard.dim - 1, shard.axis) for shard in shards[1:])
    for local, expert in enumerate(parameter):
        expert.copy_(part(_draw(shape[1:], seed, name, first + local), inside, axes)).mul_(std)


def _draw(shape: torch.Size, seed: int, *name: str | int) -> Tensor:
    # Always drawn on the CPU in fp32, so that device and dtype do not change the numbers.
    generator = torch.Generator().manual_seed(stream_seed(seed, "init", *name))
    return torch.randn(shape, generator=generator)
