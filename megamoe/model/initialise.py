"""The one initialisation of all weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megamoe.common.determinism import stream_seed
from megamoe.config.model import ModelConfig
from megamoe.moe.layer import MoELayer
from megamoe.moe.routers.resonance import ResonanceRouter

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
                _normal(parameter, _std(name, config), seed, name, _first_expert(model, module_name))


def _std(name: str, config: ModelConfig) -> float:
    scale = math.sqrt(2 * config.num_layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    return config.init_std / scale


def _first_expert(model: nn.Module, module_name: str) -> int | None:
    """Global number of the first expert of the stacked weights in that module; None for any other module."""
    parent_name, _, child = module_name.rpartition(".")
    parent = model.get_submodule(parent_name) if child == "experts" else None
    return parent.ep_rank * parent.num_local_experts if isinstance(parent, MoELayer) else None


def _normal(parameter: Tensor, std: float, seed: int, name: str, first_expert: int | None) -> None:
    if first_expert is None:
        parameter.copy_(_draw(parameter, seed, name)).mul_(std)
        return
    for local, expert in enumerate(parameter):
        expert.copy_(_draw(expert, seed, name, first_expert + local)).mul_(std)


def _draw(like: Tensor, seed: int, *name: str | int) -> Tensor:
    # Always drawn on the CPU in fp32, so that device and dtype do not change the numbers.
    generator = torch.Generator().manual_seed(stream_seed(seed, "init", *name))
    return torch.randn(like.shape, generator=generator)
