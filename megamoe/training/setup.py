"""Bring up one rank: device, threads, process groups."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megamoe.common import env
from megamoe.common.errors import LostPeerError, TopologyError
from megamoe.config.chunks import best_for
from megamoe.config.parallel import ParallelConfig
from megamoe.config.run import RunConfig
from megamoe.moe.placement import ExpertParallel, Placement
from megamoe.parallel import collectives
from megamoe.parallel.axis import axis_of
from megamoe.parallel.groups import Groups, build_groups
from megamoe.parallel.nodes import NodeGroups, NodeMap, build_node_groups, node_map, tensor_parallel_groups
from megamoe.parallel.topology import Topology

# What gloo says when a peer is gone or late; it has no exception type of its own.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket closed")


@dataclass(frozen=True)
class Runtime:
    """Where this rank runs and whom it talks to."""

    rank: int
    world_size: int
    device: torch.device
    groups: Groups


def topology_of(parallel: ParallelConfig, world_size: int) -> Topology:
    """The rank map of a configuration.

    Raises:
        TopologyError: where the degrees do not fit the world size.
    """
    return Topology(world_size, tp=parallel.tp, pp=parallel.pp, ep=parallel.ep, etp=parallel.etp, cp=parallel.cp)


@contextlib.contextmanager
def distributed(parallel: ParallelConfig, timeout_minutes: float) -> Iterator[Runtime]:
    """Join the ranks that the launcher started, make all groups, and leave them again at the end.

    Args:
        timeout_minutes: limit of every collective; a rank whose peers are gone fails after it instead of waiting.
    """
    topology = topology_of(parallel, env.world_size())
    device = _device()
    timeout = timedelta(minutes=timeout_minutes)
    _join(device, timeout)
    with _naming_lost_peers():
        yield Runtime(dist.get_rank(), dist.get_world_size(), device, build_groups(topology, timeout))
    # Not after a failure: a peer may be gone then, and leaving in good order would wait for it.
    dist.destroy_process_group()


@contextlib.contextmanager
def _naming_lost_peers() -> Iterator[None]:
    """Give the failure of a collective, which is another rank's failure, as one clear error."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise LostPeerError(
            "The connection to another rank broke, or it did not answer in time.",
            got=str(error).splitlines()[0],
            expected="all ranks running, each collective within training.timeout_minutes",
            todo="look for the first error of the other ranks; a rank killed by the system (memory) leaves none",
        ) from error


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed, which is another rank's failure."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)


def placement(runtime: Runtime, config: RunConfig) -> Placement:
    """This rank's place in its pipeline stage. Collective.

    Where a micro-batch is spread over nodes, the node of its first rank is its own: what routers know about nodes is
    the same on all of its ranks, and so is what they learn from it.
    """
    groups, ep = runtime.groups, runtime.groups.ep
    # From all ranks, so that all decide the same: each knows only how many there are on its own node.
    told = collectives.gather_objects((env.local_world_size(), socket.gethostname()))
    node_of = node_map(*zip(*told, strict=True))
    home = node_of[groups.micro_batch.ranks[0]]
    node = tuple(place for place, rank in enumerate(ep.ranks) if node_of[rank] == home)
    etp, tokens = axis_of(groups.etp), axis_of(groups.micro_batch)
    nodes, chunks = _node_groups(runtime, config, node_of), _chunks(runtime, config, min(size for size, _ in told))
    experts = ExpertParallel(ep.size, ep.place, ep.handle, node, etp, tokens, nodes, chunks)
    return Placement(experts, axis_of(groups.tp), axis_of(groups.cp))


def _node_groups(runtime: Runtime, config: RunConfig, node_of: NodeMap) -> NodeGroups | None:
    """The groups of dispatchers that go between nodes and then inside them."""
    topology, limit = runtime.groups.topology, timedelta(minutes=config.training.timeout_minutes)
    if config.moe.dispatcher == "groupwise":
        return build_node_groups(topology.groups("ep"), tensor_parallel_groups(topology), limit)
    if config.moe.dispatcher == "hierarchical":
        return build_node_groups(topology.groups("ep"), node_of, limit)
    return None


def _chunks(runtime: Runtime, config: RunConfig, per_node: int) -> int:
    """`moe.chunks`, or what the model of the costs says."""
    if config.moe.chunks != "auto":
        return config.moe.chunks
    return best_for(config, runtime.device.type == "cuda", per_node)


def _join(device: torch.device, timeout: timedelta) -> None:
    """Make the default process group.

    Raises:
        TopologyError: the ranks cannot meet.
    """
    alone = env.launcher() == "none"
    rank, world_size = env.rank(), env.world_size()
    env.export_rendezvous()
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # A process that was started alone meets nobody, so it needs no port that another run might hold.
            store=dist.HashStore() if alone else None,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistError as error:
        raise TopologyError(
            "The ranks could not meet.",
            got=str(error).splitlines()[0],
            expected=f"{world_size} ranks at {env.master_address()}:{env.master_port()}",
            todo="check that all ranks started; if another run holds the port, pass --master_port to the launcher",
        ) from error


def _device() -> torch.device:
    # DeepSpeed's own switch decides for both, else model and engine would be on different devices.
    if torch.cuda.is_available() and env.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", env.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if env.get("OMP_NUM_THREADS") is None:
        # Each process would take all cores for itself, and together they would fight for them.
        torch.set_num_threads(max(1, env.cpu_count() // env.local_world_size()))
    return torch.device("cpu")
