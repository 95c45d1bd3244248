"""The emulator of CUDA kernels finds what it promises to find: every broken kernel of emu_controls.cpp is reported, in
the build that its kind of fault is for, and the right ones pass in all builds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

PROGRAMS = {"emu": "emu_controls", "emu-asan": "emu_controls.asan", "emu-tsan": "emu_controls.tsan"}
WRONG, REFUSED = 1, 2
REPORTED = {
    "barrier": {"emu": "wrong result", "emu-tsan": "data race"},
    "warp_sync": {"emu": "wrong result", "emu-tsan": "data race"},
    "shuffle_order": {"emu-tsan": "data race"},
    "blocks": {"emu-tsan": "data race"},
    "fence": {"emu-tsan": "data race"},
    "global_bounds": {"emu-asan": "heap-buffer-overflow"},
    "shared_bounds": {"emu-asan": "heap-buffer-overflow"},
    "dynamic_bounds": {"emu-asan": "heap-buffer-overflow"},
    "misaligned": {"emu-asan": "misaligned address"},
    "unwritten": dict.fromkeys(PROGRAMS, "wrong result"),
    "left_barrier": dict.fromkeys(PROGRAMS, "64 of 96 threads wait for others that will not come"),
    "other_barrier": dict.fromkeys(PROGRAMS, "waits at the __syncthreads of line"),
    "left_lane": dict.fromkeys(PROGRAMS, "20 of 32 threads wait for others that will not come"),
    "spinning": dict.fromkeys(PROGRAMS, "spinning without end"),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, build_tool: ModuleType, cxx: str) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("emulator")
    record = build_tool.build(out, only=("controls",), targets=tuple(PROGRAMS))
    assert set(PROGRAMS) <= set(record["built"]), record["left_out"]
    return {target: out / name for target, name in PROGRAMS.items()}


def run(
    program: Path, *words: str, seed: int = 1, threads: int = 2, limit: int = 120
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MM_EMU_SEED": str(seed), "MM_EMU_THREADS": str(threads)}
    return subprocess.run([program, *words], env=environment, capture_output=True, text=True, timeout=limit)


@pytest.mark.parametrize("target", PROGRAMS)
@pytest.mark.parametrize("seed, threads", [(0, 1), (1, 2), (7, 3)])
def test_right_kernels_pass(programs: dict[str, Path], target: str, seed: int, threads: int) -> None:
    done = run(programs[target], seed=seed, threads=threads)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right\n") == len(REPORTED)


def test_every_control_is_expected(programs: dict[str, Path]) -> None:
    assert set(run(programs["emu"], "--list").stdout.split()) == set(REPORTED)


@pytest.mark.parametrize("control, target", [(name, target) for name, kinds in REPORTED.items() for target in kinds])
def test_broken_kernel_is_reported(programs: dict[str, Path], control: str, target: str) -> None:
    done = run(programs[target], control)
    assert done.returncode != 0
    assert REPORTED[control][target] in done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(1, 6))
def test_race_detection_does_not_depend_on_the_order(programs: dict[str, Path], seed: int) -> None:
    for control in ("barrier", "warp_sync", "blocks"):
        done = run(programs["emu-tsan"], control, seed=seed)
        assert "data race" in done.stderr, control


def test_exit_codes_tell_a_wrong_result_from_a_refusal(programs: dict[str, Path]) -> None:
    assert run(programs["emu"], "barrier").returncode == WRONG
    assert run(programs["emu"], "left_barrier").returncode == REFUSED


@pytest.mark.parametrize("target", PROGRAMS)
@pytest.mark.parametrize("family", ["rows", "glu", "router"])
def test_the_kernels_for_gpus_are_right(
    tmp_path: Path, build_tool: ModuleType, cxx: str, family: str, target: str
) -> None:
    record = build_tool.build(tmp_path, only=(family,), targets=(target,))
    assert target in record["built"], record["left_out"]
    done = run(tmp_path / PROGRAMS[target].replace("controls", family), limit=300)
    assert done.returncode == 0, done.stdout + done.stderr
