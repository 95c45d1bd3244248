"""Dispatchers: how rows reach their experts, one small file each."""

from __future__ import annotations

import torch.distributed as dist

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.dispatch.broadcast import BroadcastDispatcher
from megamoe.moe.dispatch.expert_tensor import ExpertTensorDispatcher
from megamoe.moe.dispatch.local import LocalDispatcher
from megamoe.moe.dispatch.padded import PaddedDispatcher
from megamoe.parallel.axis import SINGLE, Axis


def build_dispatcher(
    name: str,
    group: dist.ProcessGroup | None,
    *,
    broadcasts: bool = False,
    etp: Axis = SINGLE,
    ops: OpsConfig | None = None,
) -> Dispatcher:
    """The dispatcher called `name` (`moe.dispatcher`) over an expert-parallel group; None is a group of this rank.

    `auto` takes padded where the group has more than one rank, which is all_to_all for plans without a capacity.

    Args:
        broadcasts: whether plans may have rows to broadcast.
        etp: ranks that hold parts of the same experts.
        ops: with which implementations rows move.
    """
    ops = ops or OpsConfig()
    dispatcher = _build(name, group, ops)
    if broadcasts:
        dispatcher = BroadcastDispatcher(dispatcher, group)
    return ExpertTensorDispatcher(dispatcher, etp, ops) if etp.size > 1 else dispatcher


def _build(name: str, group: dist.ProcessGroup | None, ops: OpsConfig) -> Dispatcher:
    spread = group is not None and dist.get_world_size(group) > 1
    if name == "local" or (name == "auto" and not spread):
        return LocalDispatcher(ops)
    if group is None:
        raise ValueError(f"{name} needs a process group")
    return AllToAllDispatcher(group, ops) if name == "all_to_all" else PaddedDispatcher(group, ops)
