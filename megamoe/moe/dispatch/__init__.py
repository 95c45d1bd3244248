"""Dispatchers: how rows reach their experts, one small file each."""

from __future__ import annotations

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.dispatch.broadcast import BroadcastDispatcher
from megamoe.moe.dispatch.expert_tensor import ExpertTensorDispatcher
from megamoe.moe.dispatch.local import LocalDispatcher
from megamoe.moe.dispatch.padded import PaddedDispatcher
from megamoe.parallel.axis import SINGLE, Axis
from megamoe.parallel.groups import ProcessGroup
from megamoe.parallel.link import Link


def build_dispatcher(
    name: str,
    group: ProcessGroup | None,
    *,
    broadcasts: bool = False,
    etp: Axis = SINGLE,
    ops: OpsConfig | None = None,
    layer: int = 0,
) -> Dispatcher:
    """The dispatcher called `name` (`moe.dispatcher`) over an expert-parallel group; None is a group of this rank.

    `auto` takes padded where the group has more than one rank, which is all_to_all for plans without a capacity.

    Args:
        broadcasts: whether plans may have rows to broadcast.
        etp: ranks that hold parts of the same experts.
        ops: with which implementations rows move.
        layer: number of the block.
    """
    ops = ops or OpsConfig()
    link = None if group is None else Link(group, layer)
    dispatcher = _build(name, link, ops)
    if broadcasts:
        dispatcher = BroadcastDispatcher(dispatcher, link)
    return ExpertTensorDispatcher(dispatcher, etp, ops, layer) if etp.size > 1 else dispatcher


def _build(name: str, link: Link | None, ops: OpsConfig) -> Dispatcher:
    if name == "local" or (name == "auto" and (link is None or link.num_ranks == 1)):
        return LocalDispatcher(ops)
    if link is None:
        raise ValueError(f"{name} needs a process group")
    return AllToAllDispatcher(link, ops) if name == "all_to_all" else PaddedDispatcher(link, ops)
