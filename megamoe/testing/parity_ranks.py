"""What a rank of the parity suite does: inside `run_ranks`, or as a program that a launched rank starts beside itself.

A case under a launcher is a program of its own on every rank, so that what one leaves behind in DeepSpeed's globals, or
a crash, or a hang, is not the next one's. One process is the same program without the launcher's variables: the engine
takes the world size from the default group, of which a program has only one.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megamoe
from megamoe.common import env
from megamoe.common.errors import MegamoeError
from megamoe.common.log import get_logger, setup_logging
from megamoe.common.main import run_main
from megamoe.config.parallel import ParallelConfig
from megamoe.config.run import RunConfig
from megamoe.parallel import collectives
from megamoe.testing.parity import CPU, ParityRun, train_steps
from megamoe.testing.parity_judge import Measurement, measurement_of, worst_of
from megamoe.training.setup import distributed

# By these a process knows that a launcher started it.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED_BY = ("SLURM_", "TORCHELASTIC_", "PMI")
START_SECONDS = 120.0
"""For a program to import what it needs and meet the others."""


@dataclass(frozen=True)
class Request:
    """What a program is asked for."""

    config: RunConfig
    steps: int
    flips_count: bool = True
    alone: bool = False
    """One process: train, and answer with the run. Else measure, and answer with a measurement, on rank 0."""
    reference: Path | None = None
    """The run of one process, on rank 0."""


@dataclass(frozen=True)
class Failed:
    """The answer of a program that failed."""

    why: str


def train_alone(config: RunConfig, steps: int) -> ParityRun:
    """One process inside `run_ranks`."""
    quieten()
    return _train(config, steps, CPU)


def measure_on_this_rank(
    config: RunConfig, steps: int, reference: ParityRun, flips_count: bool, device: torch.device = CPU
) -> Measurement:
    """Train a layout and compare every rank's result with one process. Collective; the worst of all ranks."""
    quieten(collectives.rank())
    run = _train(config, steps, device)
    return worst_of(collectives.gather_objects(measurement_of(run, reference, flips_count)))


def _train(config: RunConfig, steps: int, device: torch.device) -> ParityRun:
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints tables of its own
        return train_steps(config, steps, device=device)


def quieten(rank: int = 0) -> None:
    """Show our progress and every warning; not what each of many engines says about itself."""
    setup_logging(rank)
    get_logger("megamoe.job").setLevel("WARNING")


def ask_program(request: Request, variables: Mapping[str, str | None]) -> ParityRun | Measurement | Failed | None:
    """Start the program, wait for its end and return its answer; what it prints goes to this process's stderr.

    Args:
        variables: changes to this process's environment; None: to be left out.
    """
    limit = 60.0 * request.config.training.timeout_minutes + START_SECONDS
    with tempfile.TemporaryDirectory(prefix="megamoe-parity-") as name:
        asked, answered = Path(name) / "request", Path(name) / "answer"
        asked.write_bytes(pickle.dumps(request))
        words = [sys.executable, "-m", __name__, str(asked), str(answered)]
        # It reads its standard input to the end to notice that this process is gone.
        with subprocess.Popen(
            words, env=program_environment(variables), stdin=subprocess.PIPE, stdout=sys.stderr
        ) as program:
            try:
                code = program.wait(limit)
            except subprocess.TimeoutExpired:
                program.kill()
                return Failed(f"no end within {limit:.0f} s")
        answer = pickle.loads(answered.read_bytes()) if answered.exists() else None
        return answer if code == 0 or isinstance(answer, Failed) else Failed(f"exit code {code}")


def without_launcher() -> dict[str, str | None]:
    """Changes to the environment that make a process think it was started alone."""
    return {name: None for name in env.copy_with({}) if name in LAUNCHED or name.startswith(LAUNCHED_BY)}


def meeting_at(port: int) -> dict[str, str | None]:
    """Changes to the environment of this rank's program, whose rank 0 serves the store there."""
    return {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": None}


def program_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The variables of a program that finds this same package, however this process did."""
    path = [str(Path(megamoe.__file__).parents[1]), env.get("PYTHONPATH") or ""]
    variables = {**env.copy_with({"PYTHONPATH": os.pathsep.join(filter(None, path))}), **changes}
    return {name: value for name, value in variables.items() if value is not None}


def main() -> None:
    """The program: read the request, train, leave an answer."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    request: Request = pickle.loads(Path(sys.argv[1]).read_bytes())
    answer: ParityRun | Measurement | Failed | None = None
    try:
        answer = _carry_out(request)
    except Exception as error:
        what = error.what if isinstance(error, MegamoeError) else str(error)
        answer = Failed(f"{type(error).__name__}: {(what.splitlines() or [''])[0]}")
        raise
    finally:
        if answer is not None:
            Path(sys.argv[2]).write_bytes(pickle.dumps(answer))


def _carry_out(request: Request) -> ParityRun | Measurement | None:
    with distributed(ParallelConfig(), request.config.training.timeout_minutes) as runtime:
        quieten(runtime.rank)
        if request.alone:
            return _train(request.config, request.steps, runtime.device)
        box: list[Any] = [pickle.loads(request.reference.read_bytes()) if request.reference is not None else None]
        dist.broadcast_object_list(box, src=0)
        measurement = measure_on_this_rank(request.config, request.steps, box[0], request.flips_count, runtime.device)
        return measurement if runtime.rank == 0 else None


def _leave_with_parent() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock would be held at the end
    os._exit(1)


if __name__ == "__main__":
    run_main(main)
