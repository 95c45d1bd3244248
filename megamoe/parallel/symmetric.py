"""Memory of every rank of a group that all its ranks reach: POSIX shared memory, on GPUs torch's symmetric memory.

Where it cannot be had, that is no error: whoever asks gets the reason, the same on all ranks, and goes another way.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.parallel.collectives import gather_objects
from megamoe.parallel.groups import ProcessGroup

FOLDER = Path("/dev/shm")
"""Where files are memory that processes of a machine share."""
DEFAULT_SECONDS = 600.0
BOOT = Path("/proc/sys/kernel/random/boot_id")

Made = TypeVar("Made")


@dataclass(frozen=True)
class SymmetricMemory:
    """As much memory of each rank, zeroed.

    Attributes:
        own: this rank's, uint8 [bytes].
        addresses: of each rank's, as this process (on a GPU, its device) reaches it.
        keeps: what holds it all.
    """

    own: Tensor
    addresses: tuple[int, ...]
    keeps: Any


def time_limit(group: ProcessGroup, device: torch.device) -> float:
    """Seconds after which a collective of the group gives up, which is also how long one may wait for its memory."""
    try:
        return float(group._get_backend(device).options._timeout.total_seconds())
    except (AttributeError, RuntimeError):  # a backend without
        return DEFAULT_SECONDS


def share(group: ProcessGroup, num_bytes: int, device: torch.device) -> SymmetricMemory | str:
    """Make it. Collective: all ranks of the group call it in the same order, with the same size.

    Returns:
        The memory; or why there is none, which is the same text on all ranks.
    """
    if reason := _disagreement(group, lambda: _apart(group), "no shared node"):
        return reason
    return _on_cuda(group, num_bytes, device) if device.type == "cuda" else _on_cpu(group, num_bytes)


def _apart(group: ProcessGroup) -> str:
    """Which rank is on another machine; empty: none is."""
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    machines = gather_objects((socket.gethostname(), boot), group)
    other = next((place for place, machine in enumerate(machines) if machine != machines[0]), None)
    if other is None:
        return ""
    first, second = (dist.get_global_rank(group, place) for place in (0, other))
    return (
        f"its group spans nodes: rank {first} is on {machines[0][0]}, rank {second} on {machines[other][0]}"
        if machines[0][0] != machines[other][0]
        else f"its group spans machines or containers that are all called {machines[0][0]}"
    )


def _disagreement(group: ProcessGroup, step: Callable[[], str], what: str) -> str:
    """The reason of the first rank that has one. An exception is a reason."""
    try:
        reason = step()
    except Exception as error:  # whatever a driver or an operating system thinks of: nobody may be left waiting
        reason = f"{what}: {_short(error)}"
    reasons = gather_objects(reason, group)
    place = next((place for place, found in enumerate(reasons) if found), None)
    if place is None:
        return ""
    return reasons[place] if len(set(reasons)) == 1 else f"rank {dist.get_global_rank(group, place)}: {reasons[place]}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _attempt(group: ProcessGroup, step: Callable[[], Made], what: str) -> tuple[Made | None, str]:
    """What the step made on this rank, and the reason if it failed on any."""
    made: list[Made] = []

    def run() -> str:
        made.append(step())
        return ""

    reason = _disagreement(group, run, what)
    return (made[0] if made else None), reason


# Processes of one machine


def _on_cpu(group: ProcessGroup, num_bytes: int) -> SymmetricMemory | str:
    """A file of each rank that lives in memory. It has a name only until all have mapped it: whatever ends a process
    later leaves nothing behind."""
    path = FOLDER / f"megamoe-{secrets.token_hex(8)}"
    try:
        _, reason = _attempt(group, lambda: _reserve(path, num_bytes), f"no shared memory of {num_bytes} bytes")
        if reason:
            return reason
        paths = gather_objects(str(path), group)
        maps, reason = _attempt(group, lambda: [_map(Path(each), num_bytes) for each in paths], "not mapped")
    finally:
        with contextlib.suppress(OSError):  # it was never made
            path.unlink()
    if reason or maps is None:
        return reason
    views = [torch.frombuffer(each, dtype=torch.uint8) for each in maps]
    addresses = tuple(view.data_ptr() for view in views)
    return SymmetricMemory(views[dist.get_rank(group)], addresses, views)


def _reserve(path: Path, num_bytes: int) -> None:
    """Memory that is there: what is only promised, as by a size without blocks, ends the process that writes to it."""
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(file, 0, num_bytes)
    finally:
        os.close(file)


def _map(path: Path, num_bytes: int) -> mmap.mmap:
    file = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(file, num_bytes)
    finally:
        os.close(file)


# GPUs of one node


def _on_cuda(group: ProcessGroup, num_bytes: int, device: torch.device) -> SymmetricMemory | str:
    """The ranks meet only when all have their memory: one that has none would leave the others waiting for it."""

    def reserve() -> Tensor:
        import torch.distributed._symmetric_memory as symmetric

        return symmetric.empty(num_bytes, dtype=torch.uint8, device=device)

    own, reason = _attempt(group, reserve, f"no symmetric memory of {num_bytes} bytes")
    if reason or own is None:
        return reason
    memory, reason = _attempt(group, lambda: _meet(group, own), "symmetric memory not mapped")
    return reason if reason or memory is None else memory


def _meet(group: ProcessGroup, own: Tensor) -> SymmetricMemory:
    import torch.distributed._symmetric_memory as symmetric

    handle = symmetric.rendezvous(own, group.group_name)
    own.zero_()
    torch.cuda.synchronize(own.device)
    return SymmetricMemory(own, tuple(int(address) for address in handle.buffer_ptrs), handle)
