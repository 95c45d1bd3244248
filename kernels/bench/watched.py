"""launch/pretrain.py with a record of its peak GPU memory: what a torchrun of `kernels.bench.train` starts.

MEMORY_FILE=memory.json python kernels/bench/watched.py --config ...    (arguments of launch/pretrain.py)
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
SECONDS = 1.0
"""Between two writings: what a killed process leaves is at most so old."""


def record(path: Path) -> None:
    """Write the peaks so far, in bytes."""
    if torch.cuda.is_initialized():
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(peaks), encoding="utf-8")
        partial.replace(path)


def keep_recording(path: Path, stop: threading.Event) -> None:
    """Until stopped."""
    while not stop.wait(SECONDS):
        record(path)


def main() -> None:
    path, stop = Path(os.environ["MEMORY_FILE"]), threading.Event()
    watcher = threading.Thread(target=keep_recording, args=(path, stop), daemon=True)
    watcher.start()
    sys.argv[0] = str(SCRIPT)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        stop.set()
        watcher.join()
        record(path)


if __name__ == "__main__":
    main()
