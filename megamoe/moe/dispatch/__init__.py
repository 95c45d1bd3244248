"""Dispatchers: how rows reach their experts, one small file each."""

from __future__ import annotations

import torch.distributed as dist

from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.dispatch.local import LocalDispatcher


def build_dispatcher(name: str, group: dist.ProcessGroup | None) -> Dispatcher:
    """The dispatcher called `name` (`moe.dispatcher`) over an expert-parallel group; None is a group of this rank.

    `auto` takes all_to_all where the group has more than one rank.
    """
    spread = group is not None and dist.get_world_size(group) > 1
    if group is not None and (name == "all_to_all" or (name == "auto" and spread)):
        return AllToAllDispatcher(group)
    if name == "all_to_all":
        raise ValueError("all_to_all needs a process group")
    return LocalDispatcher()
