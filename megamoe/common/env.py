"""The one reader of environment variables: who this process is among all, and where they meet.

Three launchers are understood, told apart by what they set:

- ``torchrun``, ``deepspeed``: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` or
  ``LOCAL_SIZE``;
- ``srun``: ``SLURM_PROCID`` and relatives, honoured only inside a job *step*. A batch script sees them as
  well, but the program it starts without ``srun`` is a single process and must not wait for others;
- none: one process, rank 0 of 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import product
from typing import Literal

from megamoe.common.errors import TopologyError

Launcher = Literal["torchrun", "srun", "none"]

_DEFAULT_PORT = 29500


def get(name: str, default: str | None = None) -> str | None:
    """The value of a variable; an empty one counts as absent."""
    return os.environ.get(name) or default


def set_default(name: str, value: str) -> None:
    """Set a variable unless the user has set it."""
    os.environ.setdefault(name, value)


def export(name: str, value: str) -> None:
    """Set a variable for this process and those it starts."""
    os.environ[name] = value


def unset(name: str) -> None:
    """Remove a variable, if it is there."""
    os.environ.pop(name, None)


def copy_with(values: Mapping[str, str]) -> dict[str, str]:
    """This process's variables with `values` over them, for a process that is to be started."""
    return {**os.environ, **values}


def flag(name: str) -> bool:
    """Whether a switch is on: 1, true, yes or on, in any case."""
    return (get(name) or "").lower() in {"1", "true", "yes", "on"}


def launcher() -> Launcher:
    """Who started this process. DeepSpeed's launcher sets what torchrun sets, so both are ``torchrun``.

    Raises:
        TopologyError: only one of ``RANK`` and ``WORLD_SIZE`` is set.
    """
    present = [name for name in ("RANK", "WORLD_SIZE") if get(name) is not None]
    if len(present) == 1:
        raise TopologyError(
            "The process was started with an incomplete set of launcher variables.",
            got=f"{present[0]} alone",
            expected="RANK and WORLD_SIZE together, or neither",
            todo="start it with deepspeed, torchrun or srun, or unset the variable for a single process",
        )
    if present:
        return "torchrun"
    return "srun" if get("SLURM_STEP_ID") is not None and get("SLURM_PROCID") is not None else "none"


def world_size() -> int:
    """Number of processes of this run."""
    match launcher():
        case "torchrun":
            return _integer("WORLD_SIZE", minimum=1)
        case "srun":
            return _integer("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", minimum=1)
        case _:
            return 1


def rank() -> int:
    """This process's number, 0 ≤ rank < world size.

    Raises:
        TopologyError: the rank does not fit the world size, or is no number.
    """
    match launcher():
        case "torchrun":
            value = _integer("RANK")
        case "srun":
            value = _integer("SLURM_PROCID")
        case _:
            value = 0
    if value >= world_size():
        raise TopologyError(
            "The rank given by the launcher lies outside its world size.",
            got=f"rank {value} of {world_size()}",
            expected=f"a rank from 0 to {world_size() - 1}",
            todo="check RANK and WORLD_SIZE (or the SLURM_* variables) of this process",
        )
    return value


def local_rank() -> int:
    """This process's number on its own machine."""
    match launcher():
        case "torchrun":
            return _integer("LOCAL_RANK", default=rank() if local_world_size() == world_size() else None)
        case "srun":
            return _integer("SLURM_LOCALID")
        case _:
            return 0


def local_world_size() -> int:
    """Number of processes of this run on this machine."""
    match launcher():
        case "torchrun":
            return _integer("LOCAL_WORLD_SIZE", "LOCAL_SIZE", minimum=1, default=world_size())
        case "srun":
            per_node = get("SLURM_STEP_TASKS_PER_NODE") or get("SLURM_TASKS_PER_NODE") or str(world_size())
            return _tasks_on_node(per_node, _integer("SLURM_NODEID", default=0))
        case _:
            return 1


def master_address() -> str:
    """Where the ranks meet: ``MASTER_ADDR``, else the first host of the SLURM step, else this machine."""
    address = get("MASTER_ADDR")
    if address is None and launcher() == "srun":
        hosts = get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST")
        address = first_host(hosts) if hosts else None
    return address or "127.0.0.1"


def master_port() -> int:
    """The port they meet at: ``MASTER_PORT``, else under SLURM one that follows from the job's number."""
    if get("MASTER_PORT") is None and launcher() == "srun":
        job, step = _integer("SLURM_JOB_ID", default=0), _integer("SLURM_STEP_ID", default=0)
        return 20000 + (31 * job + step) % 10000
    return _integer("MASTER_PORT", minimum=1, default=_DEFAULT_PORT)


def export_rendezvous() -> None:
    """Write what ``torch.distributed`` reads (``RANK``, …, ``MASTER_PORT``), whoever the launcher was."""
    values = {
        "RANK": rank(),
        "LOCAL_RANK": local_rank(),
        "WORLD_SIZE": world_size(),
        "LOCAL_WORLD_SIZE": local_world_size(),
        "MASTER_ADDR": master_address(),
        "MASTER_PORT": master_port(),
    }
    for name, value in values.items():
        export(name, str(value))


def host_of(rank: int) -> str | None:
    """Name of the host that a rank was started on, where the launcher tells: srun, which fills one after the other."""
    names, per_node = get("SLURM_STEP_NODELIST"), get("SLURM_STEP_TASKS_PER_NODE")
    if launcher() != "srun" or names is None or per_node is None:
        return None
    places = [host for host, tasks in zip(hosts(names), _tasks_per_node(per_node), strict=False) for _ in range(tasks)]
    return places[rank] if rank < len(places) else None


def first_host(node_list: str) -> str:
    """First host of a SLURM node list: ``gpu[07-09,12],login1`` gives ``gpu07``."""
    return next(iter(hosts(node_list)), "")


def hosts(node_list: str) -> list[str]:
    """All hosts of a SLURM node list: ``gpu[07-08,12],login1`` gives gpu07, gpu08, gpu12 and login1."""
    found: list[str] = []
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", node_list.strip()):
        parts = re.split(r"\[([^\]]*)\]", item)
        choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
        found += map("".join, product(*choices))
    return found


def _numbers(ranges: str) -> list[str]:
    """``07-09,12`` gives 07, 08, 09 and 12."""
    found: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        wide = range(int(first), int(last) + 1) if last else None
        found += [first] if wide is None else [str(number).zfill(len(first)) for number in wide]
    return found


def _tasks_on_node(per_node: str, node: int) -> int:
    """Entry ``node`` of SLURM's run-length list: ``4(x2),3`` means 4, 4 and 3 tasks."""
    counts = _tasks_per_node(per_node)
    if node >= len(counts):
        raise TopologyError(
            "SLURM's node number lies outside its list of tasks per node.",
            got=f"node {node} of {per_node}",
            expected=f"a node from 0 to {len(counts) - 1}",
            todo="start the job with srun, or set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE",
        )
    return counts[node]


def _tasks_per_node(per_node: str) -> list[int]:
    counts: list[int] = []
    for item in per_node.split(","):
        parsed = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", item)
        if parsed is None:
            raise TopologyError(
                "SLURM's list of tasks per node cannot be read.",
                got=per_node,
                expected="a list such as 4(x2),3",
                todo="start the job with srun, or set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE",
            )
        counts += [int(parsed[1])] * int(parsed[2] or 1)
    return counts


def _integer(*names: str, minimum: int = 0, default: int | None = None) -> int:
    """The first of ``names`` that is set, as an integer of at least ``minimum``."""
    name = next((candidate for candidate in names if get(candidate) is not None), None)
    if name is None and default is not None:
        return default
    text = get(name) if name else None
    if text is None or not re.fullmatch(r"\d+", text.strip()) or int(text) < minimum:
        raise TopologyError(
            f"The launcher variable {name or ' or '.join(names)} is missing or unusable.",
            got="nothing" if text is None else repr(text),
            expected=f"a whole number of at least {minimum}",
            todo="start the program with deepspeed, torchrun or srun, or alone without their variables",
        )
    return int(text)


def cpu_count() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
