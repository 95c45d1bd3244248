"""The one-sided exchange's kernels between ranks that run at the same time, in the emulator; and that a fault in its
order is reported by the build that is for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

PROGRAMS = {"emu": "emu_comm", "emu-asan": "emu_comm.asan", "emu-tsan": "emu_comm.tsan"}
REPORTED = {
    "relaxed_release": {"emu-tsan": "data race"},
    "dropped_wait": {"emu": "wrong result", "emu-tsan": "data race"},
    "no_ack": {"emu": "wrong result", "emu-tsan": "data race"},
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, build_tool: ModuleType, cxx: str) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("comm")
    record = build_tool.build(out, only=("comm",), targets=tuple(PROGRAMS))
    assert set(PROGRAMS) <= set(record["built"]), record["left_out"]
    return {target: out / name for target, name in PROGRAMS.items()}


def run(program: Path, *words: str, seed: int = 1, threads: int = 1) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MM_EMU_SEED": str(seed), "MM_EMU_THREADS": str(threads)}
    return subprocess.run([program, *words], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("target", PROGRAMS)
@pytest.mark.parametrize("seed, threads", [(1, 1), pytest.param(7, 2, marks=pytest.mark.thorough)])
def test_rows_arrive_and_come_home(programs: dict[str, Path], target: str, seed: int, threads: int) -> None:
    done = run(programs[target], seed=seed, threads=threads)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "comm: 14 comparisons, 0 wrong\n"


@pytest.mark.parametrize("control, target", [(name, target) for name, kinds in REPORTED.items() for target in kinds])
def test_a_fault_is_reported(programs: dict[str, Path], control: str, target: str) -> None:
    done = run(programs[target], control)
    assert done.returncode != 0
    assert REPORTED[control][target] in done.stdout + done.stderr


@pytest.mark.parametrize("target", PROGRAMS)
def test_without_a_fault_the_same_program_is_silent(programs: dict[str, Path], target: str) -> None:
    done = run(programs[target], "none")
    assert (done.returncode, done.stdout, done.stderr) == (0, "none: right\n", "")
