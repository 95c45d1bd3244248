"""Parameter groups of the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megamoe.config.training import OptimizerConfig
from megamoe.model.decoder import Head
from megamoe.moe.marker import is_expert
from megamoe.moe.routers.base import Router

PEAK = "peak_lr"
"""Key of a group's peak learning rate, which the schedule multiplies."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups by {AdamW, Muon} x {decay, no decay} x {dense, experts} of what is trained; there are no empty ones.

    Matrices decay; norms, scales and other vectors do not. With Muon, the matrices of attention, feed-forward and
    experts are orthogonalised; embedding, head, routers and vectors stay with AdamW (as Muon's author advises).
    """
    not_muon = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | Head | Router) for p in m.parameters()}
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        decay, expert = parameter.dim() > 1, is_expert(parameter)
        use_muon = config.type == "muon" and decay and id(parameter) not in not_muon
        group = groups.setdefault(
            (use_muon, decay, expert),
            {"params": [], **_settings(config, use_muon, decay), **_tags(parameter)},
        )
        group["params"].append(parameter)
        _tag_for_muon(parameter, use_muon, expert)
    return list(groups.values())


def _tags(parameter: nn.Parameter) -> dict[str, Any]:
    """How DeepSpeed tells expert groups: by `moe`, and the name of their expert-parallel group."""
    if is_expert(parameter):
        return {"name": parameter.group_name, "moe": True}  # type: ignore[attr-defined]
    return {"name": "dense"}


def _tag_for_muon(parameter: nn.Parameter, use_muon: bool, expert: bool) -> None:
    """Read by DeepSpeed's ZeRO, which orthogonalises whole matrices, and stacked experts one by one."""
    parameter.use_muon = use_muon  # type: ignore[attr-defined]
    parameter.is_expert_group = expert  # type: ignore[attr-defined]


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group[PEAK]


def _settings(config: OptimizerConfig, use_muon: bool, decay: bool) -> dict[str, Any]:
    weight_decay = config.weight_decay if decay else 0.0
    lr = config.muon_lr if use_muon else config.lr
    settings: dict[str, Any] = {"lr": lr, PEAK: lr, "weight_decay": weight_decay}
    if config.type == "muon":
        settings["use_muon"] = use_muon
    if use_muon:
        return {**settings, "momentum": config.muon_momentum}
    return {**settings, "betas": config.betas, "eps": config.eps}
