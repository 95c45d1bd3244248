"""A recipe through `launch/pretrain.py` on one GPU: tokens per second, MFU, peak memory.

python -m kernels.bench.train tiny --out FOLDER --runs FOLDER [--smoke] [section.field=value ...]
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.bench.results import write_part
from kernels.bench.run import device_of, parser
from kernels.bench.timing import NO_GPU
from megamoe.config.derive import flops_per_token
from megamoe.config.load import load_config
from megamoe.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
WARMUP_STEPS = 10
STEPS = "training.steps=50"
SMALL = (
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "moe.expert_ffn_size=32",
    "data.seq_length=64",
    "training.steps=12",
    "training.micro_batch_size=1",
    "training.global_batch_size=2",
    "training.validation.batches=0",
)
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 operations per second of the data sheets, by a part of the GPU's name."""


@dataclass(frozen=True)
class Recipe:
    """Files and overrides."""

    files: tuple[str, ...]
    overrides: tuple[str, ...]


RECIPES = {
    "tiny": Recipe(("configs/tiny.yaml",), ("parallel.ep=1", "training.precision=bf16", STEPS)),
    "1b": Recipe(("configs/tiny.yaml", "configs/gpu/1b.yaml"), (STEPS,)),
}


def train(name: str, runs: Path, extra: list[str], smoke: bool, seconds: float) -> dict[str, Any]:
    """Run a recipe and read what it wrote; one row of results."""
    device = device_of(smoke)
    recipe = RECIPES[name]
    folder = runs / name
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [*recipe.overrides, *(SMALL if smoke else ()), *extra, f"training.output_dir={folder}"]
    config = load_config([ROOT / file for file in recipe.files], overrides)
    memory = runs / f"{name}_memory.json"
    memory.unlink(missing_ok=True)
    status = _launch(recipe, overrides, memory, seconds)
    steps = _steps(folder / "metrics.jsonl")
    if smoke and status == "measured":
        status = NO_GPU
    return row(name, recipe, overrides, config, status, steps, memory, device)


def _launch(recipe: Recipe, overrides: list[str], memory: Path, seconds: float) -> str:
    """Train in a process of its own; "measured" or what went wrong."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*launcher, str(ROOT / "kernels/bench/watched.py"), "--config", *recipe.files, *overrides]
    variables = os.environ | {"MEMORY_FILE": str(memory)}
    running = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
    try:
        code = running.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)  # the launcher's ranks as well
        running.wait()
        return f"stopped after {seconds:.0f} s"
    return "measured" if code == 0 else f"failed with exit code {code}"


def _steps(metrics: Path) -> list[dict[str, Any]]:
    """The logged training steps, as far as there are any."""
    if not metrics.exists():
        return []
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    return [line for line in lines if "step_seconds" in line]


def row(
    name: str,
    recipe: Recipe,
    overrides: list[str],
    config: RunConfig,
    status: str,
    steps: list[dict[str, Any]],
    memory: Path,
    device: torch.device,
) -> dict[str, Any]:
    """A run with what follows from it. Numbers are of the steps after the first ten, and of a GPU only."""
    counted = steps[WARMUP_STEPS:] if device.type == "cuda" else []
    seconds = statistics.median(step["step_seconds"] for step in counted) if counted else None
    tokens = config.training.global_batch_size * config.data.seq_length
    speed = tokens / seconds if seconds else None
    flops = flops_per_token(config)
    peaks = json.loads(memory.read_text("utf-8")) if memory.exists() else {}
    peak = _peak(device)
    return {
        "recipe": name,
        "files": list(recipe.files),
        "overrides": [word for word in overrides if not word.startswith(("training.output_dir", "data.prepared_dir"))],
        "status": status,
        "steps": len(steps),
        "tokens_per_step": tokens,
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "flops_per_token": flops,
        "mfu": speed * flops / peak if speed and peak else None,
        "peak_flops": peak,
        "flops_per_second": speed * flops if speed else None,
        "peak_bytes_allocated": peaks.get("allocated"),
        "peak_bytes_reserved": peaks.get("reserved"),
        "first_loss": steps[0]["cross_entropy"] if counted else None,
        "last_loss": steps[-1]["cross_entropy"] if counted else None,
    }


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def main() -> None:
    arguments = parser("Measure training steps.")
    arguments.add_argument("name", choices=RECIPES)
    arguments.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    arguments.add_argument("--seconds", type=float, default=120.0, help="limit of the run (%(default)s)")
    arguments.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = arguments.parse_intermixed_args()
    found = train(args.name, args.runs.resolve(), args.overrides, args.smoke, args.seconds)
    write_part(args.out, "training", [found], args.name)
    _show(found)
    sys.exit(0 if found["status"] in ("measured", NO_GPU) else 1)


def _show(found: dict[str, Any]) -> None:
    if found["tokens_per_second"] is None:
        print(f"{found['recipe']}: {found['status']}, {found['steps']} steps")
        return
    mfu = f"{found['mfu']:.1%} of the data sheet's rate" if found["mfu"] else "peak rate not known"
    memory = f"{found['peak_bytes_allocated'] / 2**30:.1f} GiB" if found["peak_bytes_allocated"] else "not recorded"
    print(
        f"{found['recipe']}: {found['status']}, {found['steps']} steps, {found['tokens_per_second']:,.0f} tokens/s, "
        f"{mfu}, peak memory {memory}"
    )


if __name__ == "__main__":
    main()
