"""Dispatchers: how rows reach their experts, one small file each."""

from __future__ import annotations

from collections.abc import Callable

from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
from megamoe.moe.dispatch.base import Dispatcher
from megamoe.moe.dispatch.broadcast import BroadcastDispatcher
from megamoe.moe.dispatch.chunked import ChunkedDispatcher
from megamoe.moe.dispatch.deduplicated import DeduplicatedDispatcher
from megamoe.moe.dispatch.expert_tensor import ExpertTensorDispatcher
from megamoe.moe.dispatch.groupwise import GroupwiseDispatcher
from megamoe.moe.dispatch.hierarchical import HierarchicalDispatcher
from megamoe.moe.dispatch.local import LocalDispatcher
from megamoe.moe.dispatch.padded import PaddedDispatcher
from megamoe.moe.dispatch.push import PushDispatcher
from megamoe.parallel.axis import SINGLE, Axis
from megamoe.parallel.groups import ProcessGroup
from megamoe.parallel.link import Link
from megamoe.parallel.nodes import NodeGroups

_OVER_ONE_GROUP: dict[str, Callable[[Link, OpsConfig], Dispatcher]] = {
    "auto": PaddedDispatcher,
    "padded": PaddedDispatcher,
    "all_to_all": AllToAllDispatcher,
    "deduplicated": DeduplicatedDispatcher,
    "push": PushDispatcher,
}
_BETWEEN_AND_INSIDE = {"hierarchical": HierarchicalDispatcher, "groupwise": GroupwiseDispatcher}


def build_dispatcher(
    name: str,
    group: ProcessGroup | None,
    *,
    broadcasts: bool = False,
    etp: Axis = SINGLE,
    ops: OpsConfig | None = None,
    layer: int = 0,
    chunks: int = 1,
    nodes: NodeGroups | None = None,
) -> Dispatcher:
    """The dispatcher called `name` (`moe.dispatcher`) over an expert-parallel group; None is a group of this rank.

    `auto` takes padded where the group has more than one rank, which is all_to_all for plans without a capacity.

    Args:
        broadcasts: whether plans may have rows to broadcast.
        etp: ranks that hold parts of the same experts.
        ops: with which implementations rows move.
        layer: number of the block.
        chunks: of a rank's experts, in which rows are exchanged, where the dispatcher can do that.
        nodes: for hierarchical and groupwise.
    """
    ops = ops or OpsConfig()
    link = None if group is None else Link(group, layer)
    dispatcher = _build(name, link, ops, chunks, nodes)
    if broadcasts and not isinstance(dispatcher, DeduplicatedDispatcher | ChunkedDispatcher):
        dispatcher = BroadcastDispatcher(dispatcher, link)
    return ExpertTensorDispatcher(dispatcher, etp, ops, layer) if etp.size > 1 else dispatcher


def _build(name: str, link: Link | None, ops: OpsConfig, chunks: int, nodes: NodeGroups | None) -> Dispatcher:
    if name == "local" or (name == "auto" and (link is None or link.num_ranks == 1)):
        return LocalDispatcher(ops)
    if link is None:
        raise ValueError(f"{name} needs a process group")
    if name in _BETWEEN_AND_INSIDE:
        if nodes is None:
            raise ValueError(f"{name} needs groups between nodes and inside them")
        between, inside = (Link(part.handle, link.layer) for part in (nodes.between, nodes.inside))
        return _BETWEEN_AND_INSIDE[name](nodes.nodes, between, inside, ops)
    if chunks > 1 and name in ("auto", "padded", "all_to_all"):
        return ChunkedDispatcher(link, ops, chunks, padded=name != "all_to_all")
    if ops.expert_ffn == "by_source":  # who keeps rows of different ranks apart
        name = "all_to_all"
    return _OVER_ONE_GROUP[name](link, ops)
