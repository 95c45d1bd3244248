"""DeepSpeed's ways that would train wrongly, stop without a reason or make noise, each with what is done about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from megamoe.common.errors import ConfigError
from megamoe.moe.marker import group_name, is_expert
from megamoe.parallel.groups import Groups

SUPPORTED = ("0.19.8", "0.20")
"""First version that is supported, and first that is not."""


@contextlib.contextmanager
def no_expert_group_asked_of_zero(model: nn.Module) -> Iterator[None]:
    """Let ZeRO-1 and -2 start where no expert is trained: for MoE layers they insist on a group of expert parameters.

    The engine itself goes on to know the layers; otherwise it would save the experts of rank 0 only.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def without_experts(optimizer: Any) -> None:
        optimizer.has_moe_layers = False

    none_trained = not any(is_expert(p) and p.requires_grad for p in model.parameters())
    values = {"_configure_moe_settings": without_experts} if none_trained else {}
    with attributes(BF16_Optimizer, values), attributes(DeepSpeedZeroOptimizer, values):
        yield


@contextlib.contextmanager
def no_memory_report() -> Iterator[None]:
    """Let the optimizer of bf16 at ZeRO-1 be built without a page of prints about memory."""
    from deepspeed.runtime import bf16_optimizer

    with attributes(bf16_optimizer, {"see_memory_usage": lambda *args, **kwargs: None}):
        yield


def norm_of_experts_alone(optimizer: Any) -> None:
    """The optimizer of bf16 at ZeRO-1 fails to add up the norm of an empty list where only experts are trained."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if not isinstance(optimizer, BF16_Optimizer):
        return
    original = optimizer.get_grads_for_norm

    def with_a_zero(for_clipping: bool = False) -> Any:
        gradients = original(for_clipping)
        if for_clipping or gradients[0]:
            return gradients
        return [torch.zeros(1, device=optimizer.fp32_groups_gradients_flat[0].device)], gradients[1]

    optimizer.get_grads_for_norm = with_a_zero


def forget_gradients(optimizer: Any) -> None:
    """ZeRO-1 and -2 that offload keep the gradients of a step that they discarded, and add the next ones to them."""
    if getattr(optimizer, "cpu_offload", False):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def momentum_held_back(optimizer: Any) -> Callable[[], None]:
    """Where ZeRO moves Muon's momentum before it steps the optimizer, keep it from that.

    Returns:
        Moves it; to be called right before a step that is done.
    """
    names = ("_commit_muon_momentum", "_prepare_muon_updates")  # of ZeRO-1 and -2; of bf16 at ZeRO-1
    moves = [getattr(optimizer, name) for name in names if hasattr(optimizer, name)]
    for name in names:
        if hasattr(optimizer, name):
            setattr(optimizer, name, lambda: None)

    def move() -> None:
        for each in moves:
            each()

    return move


@contextlib.contextmanager
def attributes(target: Any, values: dict[str, Any]) -> Iterator[None]:
    """Lay `values` over the attributes of an object or class for the duration."""
    own = {name: vars(target)[name] for name in values if name in vars(target)}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(target, name)
        for name, value in own.items():
            setattr(target, name, value)


def check_version(installed: str) -> None:
    """Refuse versions of DeepSpeed that the adapter was not written for."""
    from packaging.version import Version

    first, beyond = (Version(text) for text in SUPPORTED)
    if not first <= Version(installed) < beyond:
        raise ConfigError(
            "This version of DeepSpeed is not supported.",
            got=f"deepspeed {installed}",
            expected=f"at least {first} and below {beyond}",
            todo="install the version of docker/constraints.txt",
        )


def register_expert_groups(groups: Groups) -> None:
    """Give DeepSpeed our expert groups under its name for them, before it makes its own with other ranks."""
    from deepspeed.utils import groups as registry

    name = group_name(groups.ep.size)
    # Those that hold the experts once, their parts included: DeepSpeed adds up squared norms over them.
    registry._EXPERT_PARALLEL_GROUP[name] = groups.experts.handle
    registry._EXPERT_PARALLEL_GROUP_RANKS[name] = list(groups.experts.ranks)
    registry._EXPERT_DATA_PARALLEL_GROUP[name] = groups.edp.handle
    registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(groups.edp.ranks)


def prepare_deepspeed() -> None:
    import deepspeed.ops

    # Compiled with the first process group (22 s), used by inference only; a process killed meanwhile leaves a lock
    # behind that makes every later start wait for ever without a message.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def reduce_in_fp64(engine: Any) -> None:
    """DeepSpeed would refuse fp64 gradients, which its accelerators do not list, and reduce them in fp32."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    listed = accelerator.supported_dtypes()
    if torch.float64 not in listed:  # listed twice, they would be reduced twice
        accelerator.supported_dtypes = lambda: [*listed, torch.float64]
    engine.communication_data_type = torch.float64
