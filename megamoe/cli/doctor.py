"""`doctor`: what is installed here, which implementation of every op runs, and why."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
from typing import Any

import torch

from megamoe.bench.conditions import version
from megamoe.common import env
from megamoe.ops import kernels
from megamoe.ops.all import OPS

SUMMARY = "show versions, compiled kernels, and which implementation of every op runs here"
DESCRIPTION = """\
Show the versions of what megamoe runs on, the state of the compiled kernels (built for what, what was left out and
why), and for every op the implementation that `auto` takes here, with the reason.

Exit code: 0; 1 if MEGAMOE_KERNELS_REQUIRE=1 and the compiled kernels are missing, or, where torch is built for CUDA,
those for CUDA.
"""
PACKAGES = ("megamoe", "torch", "deepspeed", "numpy", "sentencepiece")
DTYPES = (torch.float32, torch.bfloat16)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("doctor", help=SUMMARY, description=DESCRIPTION, formatter_class=layout)
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 if something that is required is missing."""
    found = examine()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return int(bool(found["missing"]))


def examine() -> dict[str, Any]:
    """All findings: versions, gpus, kernels, ops, and in `missing` what is required and not there."""
    return {
        "versions": versions(),
        "gpus": gpus(),
        "kernels": kernels.state(),
        "ops": [choice(op.name, device, dtype) for op in OPS for device in ("cpu", "cuda") for dtype in DTYPES],
        "missing": missing(),
    }


def versions() -> dict[str, str]:
    """By name; what is not there says so."""
    found = {"python": platform.python_version()} | {name: version(name) or "not installed" for name in PACKAGES}
    return found | {
        "CUDA of torch": torch.version.cuda or "none",
        "nvcc": _compiler(env.get("CUDACXX", "nvcc"), "release"),
        "C++ compiler": _compiler(env.get("CXX") or _first("g++", "c++", "clang++"), ""),
    }


def _first(*names: str) -> str:
    return next((name for name in names if shutil.which(name)), names[0])


def _compiler(command: str | None, line_with: str) -> str:
    """Of what its --version prints, the first line with that word."""
    words = shlex.split(command or "")
    if not words or not shutil.which(words[0]):
        return "not found"
    lines = subprocess.run([*words, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.strip() for line in lines if line_with in line), f"{words[0]} does not tell its version")


def gpus() -> list[str]:
    """Name and compute capability of every GPU that torch can use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]
    return [f"{name}, compute capability {major}.{minor}" for name, (major, minor) in names]


def choice(name: str, device: str, dtype: torch.dtype) -> dict[str, str | None]:
    """What `auto` takes for the op there, and why; nothing for CUDA where torch is built without it."""
    where: dict[str, str | None] = {"op": name, "device": device, "dtype": str(dtype).removeprefix("torch.")}
    if device == "cuda" and torch.version.cuda is None:
        return where | {"implementation": None, "reason": "this torch is built without CUDA"}
    op = next(op for op in OPS if op.name == name)
    chosen = op.choose("auto", torch.device(device), dtype)
    return where | {"implementation": chosen.name, "reason": chosen.reason}


def missing() -> list[str]:
    """What MEGAMOE_KERNELS_REQUIRE=1 asks for and is not here."""
    if not env.flag("MEGAMOE_KERNELS_REQUIRE"):
        return []
    if reason := kernels.problem():
        return [reason]
    reason = kernels.without_cuda()
    return [f"megamoe-kernels for CUDA: {reason}"] if reason and torch.version.cuda else []


def text(found: dict[str, Any]) -> str:
    """The findings for a reader."""
    parts = [
        _section("Versions", _columns(list(found["versions"].items()))),
        _section("GPUs", found["gpus"] or ["none that this torch can use"]),
        _section("Compiled kernels", _kernels(found["kernels"])),
        _section("Ops with `auto`", _columns([tuple(one.values()) for one in found["ops"]])),
    ]
    if found["missing"]:
        parts.append(_section("Required by MEGAMOE_KERNELS_REQUIRE=1 and missing", found["missing"]))
    return "\n\n".join(parts)


def _kernels(state: dict[str, Any]) -> list[str]:
    if not state:
        return [f"megamoe-kernels is not installed; {kernels.INSTALL}"]
    head = f"megamoe-kernels {state['version']} in {state['folder']}"
    if "problem" in state:
        return [head, state["problem"]]
    built = [f"{target}: {_built(one, state)}" for target, one in state["built"].items()]
    not_in_use = [f"{target}: not in use, {reason}" for target, reason in state["not_loaded"].items()]
    return [head, *built, *not_in_use, *(f"{target}: left out, {why}" for target, why in state["left_out"].items())]


def _built(target: dict[str, Any], state: dict[str, Any]) -> str:
    gpus = f", for GPUs {' '.join(target['architectures'])}" if "architectures" in target else ""
    return f"{' '.join(target['families'])}{gpus}; {target['compiler']}, torch {state['torch']}"


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([title, "-" * len(title), *lines])


def _columns(rows: list[tuple[str | None, ...]]) -> list[str]:
    """Each column as wide as its widest word."""
    cells = [[cell or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
