"""Bring up one rank: device, threads, process groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megamoe.common import env
from megamoe.common.errors import TopologyError
from megamoe.config.parallel import ParallelConfig
from megamoe.parallel.groups import Groups, build_groups
from megamoe.parallel.topology import Topology


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
    _join(device, timedelta(minutes=timeout_minutes))
    yield Runtime(dist.get_rank(), dist.get_world_size(), device, build_groups(topology))
    # Not after a failure: a peer may be gone then, and leaving in good order would wait for it.
    dist.destroy_process_group()


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
    if torch.cuda.is_available():
        device = torch.device("cuda", env.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if env.get("OMP_NUM_THREADS") is None:
        # Each process would take all cores for itself, and together they would fight for them.
        torch.set_num_threads(max(1, env.cpu_count() // env.local_world_size()))
    return torch.device("cpu")
