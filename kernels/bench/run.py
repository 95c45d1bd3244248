"""What the measuring modules share: their command line, and loading the library."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch


class Arguments(argparse.Namespace):
    """Of every measuring module."""

    out: Path
    smoke: bool


def parser(about: str) -> argparse.ArgumentParser:
    """With the arguments that all have."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--out", type=Path, default=Path("runs/kernels"), help="folder of the results (%(default)s)")
    made.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: does it run? No times")
    return made


def device_of(smoke: bool) -> torch.device:
    """The GPU, or the CPU for a smoke run.

    Raises:
        SystemExit: there is no GPU.
    """
    if smoke:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is false; --smoke runs tiny sizes on the CPU")
    return torch.device("cuda", 0)


def missing_library(*names: str) -> str:
    """Load the ops; why they, or those names among them, cannot be used, or an empty string."""
    try:
        importlib.import_module("megamoe_kernels").load()
    except Exception as error:
        return f"not run: no library: {in_short(error)}"
    absent = [name for name in names if not hasattr(torch.ops.megamoe, name)]
    return f"not run: the library has no op {', '.join(absent)}" if absent else ""


def in_short(error: BaseException, length: int = 120) -> str:
    """Kind and first line of an error, for a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    # A missing package says all there is to say.
    text = lines[0] if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= length else text[: length - 1] + "…"
