"""What a node says about itself, and what is wrong with it beside the others."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CLOCK_SECONDS = 2.0
"""By how much clocks may differ: who is alive is told by the times that ranks write."""
BUSY_SHARE = 0.1
"""Of a GPU's memory may be in use before anything of this run is."""


@dataclass(frozen=True)
class Facts:
    """Of one node, by its first rank; further ranks only name it.

    Attributes:
        host: its name.
        versions: of what has to be the same everywhere, by name.
        gpus: names of those that torch sees.
        free_bytes: in the run's folder.
        problems: what it found wrong itself.
    """

    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    gpus: Sequence[str] = ()
    free_bytes: int = 0
    problems: Sequence[str] = ()


def facts(versions: Mapping[str, str], gpus: Sequence[str], folder: Path) -> Facts:
    """Look around on this node.

    Args:
        folder: where runs will write; a small file is written there, and removed.
    """
    problems = [*_unwritable(folder), *_busy_gpus()]
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return Facts(socket.gethostname(), versions, list(gpus), free, problems)


def _unwritable(folder: Path) -> list[str]:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [f"cannot write in {folder}: {error.strerror}"]
    return []


def _busy_gpus() -> list[str]:
    """By nvidia-smi, which does not occupy the GPUs itself."""
    if not shutil.which("nvidia-smi"):
        return []
    fields = "index,memory.used,memory.total,ecc.errors.uncorrected.volatile.total"
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer within 30 s"]
    if asked.returncode:
        return [f"nvidia-smi: {(asked.stdout + asked.stderr).strip().splitlines()[0]}"]
    return gpu_problems(asked.stdout)


def gpu_problems(table: str) -> list[str]:
    """From nvidia-smi's lines: index, MiB used, MiB in all, uncorrected memory errors (or [N/A])."""
    problems = []
    for line in table.splitlines():
        index, used, total, errors = (word.strip() for word in line.split(","))
        if used.isdigit() and total.isdigit() and int(used) > BUSY_SHARE * int(total):
            problems.append(f"GPU {index} is in use: {used} of {total} MiB")
        if errors.isdigit() and int(errors):
            problems.append(f"GPU {index} has {errors} uncorrected memory errors")
    return problems


def complaints(nodes: Sequence[Facts], clocks: Mapping[str, float], minimum_bytes: float) -> dict[str, list[str]]:
    """By host, what is wrong. What most nodes have is right.

    Args:
        clocks: seconds by which a host's clock is ahead of the first one's.
        minimum_bytes: that have to be free in the run's folder.
    """
    found = {node.host: list(node.problems) for node in nodes}
    for name in dict.fromkeys(name for node in nodes for name in node.versions):
        _add_odd_ones(found, name, {node.host: node.versions.get(name, "missing") for node in nodes})
    _add_odd_ones(found, "GPUs", {node.host: _counted(node.gpus) for node in nodes})
    middle = sorted(clocks.values())[len(clocks) // 2] if clocks else 0.0
    for node in nodes:
        if (off := clocks.get(node.host, middle) - middle) and abs(off) > CLOCK_SECONDS:
            found[node.host].append(f"clock {off:+.1f} s off the others'")
        if node.free_bytes < minimum_bytes:
            found[node.host].append(f"{node.free_bytes / 1e9:.1f} GB free, at least {minimum_bytes / 1e9:g} wanted")
    return {host: problems for host, problems in found.items() if problems}


def _add_odd_ones(found: dict[str, list[str]], name: str, values: Mapping[str, str]) -> None:
    usual = Counter(values.values()).most_common(1)[0][0]
    for host, value in values.items():
        if value != usual:
            found[host].append(f"{name} {value}, others {usual}")


def _counted(gpus: Sequence[str]) -> str:
    return ", ".join(f"{number} x {name}" for name, number in Counter(gpus).items()) or "none"
