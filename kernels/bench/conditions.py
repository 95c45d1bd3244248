"""What a measurement was made on: machine, GPU as found, versions, libraries.

python -m kernels.bench.conditions --out FOLDER
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from kernels.bench.results import write_part
from kernels.bench.run import parser
from megamoe.bench.conditions import conditions as machine
from megamoe.bench.conditions import version

KERNELS = Path(__file__).resolve().parents[1]
GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "persistence_mode",
    "compute_mode",
)


def conditions(note: str = "") -> dict[str, Any]:
    """Machine and versions as in `megamoe.bench`, the GPU as nvidia-smi and torch see it, the libraries as loaded.

    Settings of the card are read and never changed.
    """
    return machine(note) | {
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "gpu": gpu(),
        "nvidia_smi": nvidia_smi(),
        "nvcc": first_line("nvcc", "--version", containing="release"),
        "libraries": libraries(),
        "sources": digest(KERNELS / "csrc"),
    }


def gpu() -> dict[str, Any] | None:
    """The first GPU; None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),
    }


def nvidia_smi() -> dict[str, str] | None:
    """Clocks, limits and modes as they are; None without nvidia-smi."""
    line = first_line("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    return dict(zip(GPU_FIELDS, (part.strip() for part in line.split(",")), strict=False)) if line else None


def libraries() -> dict[str, Any]:
    """What `megamoe_kernels` says of its libraries, or why there are none."""
    try:
        package = importlib.import_module("megamoe_kernels")
        package.load()
        return {"loaded": True, "build": _plain(package.what())}
    except Exception as error:
        return {"loaded": False, "reason": f"{type(error).__name__}: {error}".strip()}


def _plain(value: Any) -> Any:
    """The value if JSON can hold it, else its text."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return str(value)


def digest(folder: Path) -> str:
    """SHA-256 over names and contents of all files of a folder, 16 digits: which sources a library was built from."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def first_line(*command: str, containing: str = "") -> str | None:
    """First line of a command's output with that text in it; None where the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    lines = [line for line in done.stdout.splitlines() if containing in line]
    return lines[0].strip() if done.returncode == 0 and lines else None


def main() -> None:
    args = parser("Record what a run is made on.").parse_args()
    print(write_part(args.out, "conditions", conditions()).read_text("utf-8"))


if __name__ == "__main__":
    main()
