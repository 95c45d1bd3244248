"""Stopping and going on: bit for bit what the straight run gives, also after a rank was killed during a save."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.common import env
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import RankError, run_ranks
from megamoe.testing.runs import prepared_run
from megamoe.training.checkpoint import folder as folders
from megamoe.training.pretrain import pretrain

THOROUGH = pytest.mark.thorough
LAYOUTS = [
    pytest.param(1, 1, 0, (), id="one_rank"),
    pytest.param(2, 2, 0, (), id="ep2_zero0"),
    pytest.param(2, 2, 0, ("training.precision=fp64", "moe.router.type=resonance"), id="ep2_zero0_fp64"),
    pytest.param(2, 2, 1, ("moe.router.type=resonance",), id="ep2_zero1_resonance"),
    pytest.param(
        2,
        2,
        1,
        ("moe.router={type: resonance, affinity: cosine, centre: true}", "moe.capacity.mode=etr_success"),
        id="ep2_zero1_etr_success",
    ),
    pytest.param(2, 2, 0, ("moe.router.type=resonance", "moe.capacity.mode=locmoe"), id="ep2_zero0_locmoe"),
    pytest.param(2, 2, 1, ("training.precision=bf16", "moe.router.type=resonance"), id="ep2_zero1_bf16"),
    pytest.param(2, 2, 2, ("moe.router.score=sigmoid", "moe.router.bias_update_rate=0.01"), id="ep2_zero2_bias"),
    pytest.param(2, 1, 3, (), id="edp2_zero3"),
    pytest.param(4, 2, 3, ("moe.router.type=resonance",), id="ep2_edp2_zero3"),
    pytest.param(2, 1, 0, ("parallel.tp=2",), id="tp2_zero0"),
    pytest.param(2, 2, 1, ("parallel.tp=2", "training.precision=bf16"), id="tp2_ep2_zero1_bf16", marks=THOROUGH),
    pytest.param(
        2, 1, 3, ("parallel.tp=2", "moe.router.type=resonance", "training.frozen=[embedding*]"), id="tp2_zero3"
    ),
    pytest.param(4, 2, 2, ("parallel.tp=2", "parallel.etp=2", "moe.capacity.mode=static"), id="tp2_ep2_etp2_zero2"),
    pytest.param(2, 2, 1, ("parallel.cp=2", "moe.router.type=resonance"), id="cp2_ep2_zero1", marks=THOROUGH),
    pytest.param(2, 2, 1, ("training.optimizer.type=muon", "training.gradient_clipping=0.0"), id="ep2_zero1_muon"),
]
IGNORED = (
    "/ds_config/",  # holds the run's own path
    # DeepSpeed leaves the padding of ZeRO-3's partitions uninitialised; the masters themselves are in weights/.
    "/optimizer_state_dict/fp32_flat_groups/",
    "/optimizer/fp32_flat_groups/",
)
TIMING = ("tokens_per_second", "step_seconds")


def job(overrides: tuple[str, ...]) -> int:
    return pretrain(tiny_config(*overrides), env.world_size()).step


def killed_job(overrides: tuple[str, ...], victim: int, step: int) -> int:
    """As `job`, but the victim dies by SIGKILL in the middle of writing the checkpoint of that step."""
    original = torch.save
    name = folders.incomplete_path("", step).name

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if env.rank() == victim and f"{name}/engine" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        original(value, path, *args, **kwargs)

    torch.save = save
    return job(overrides)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def saved_tensors(folder: Path, step: int) -> dict[str, Any]:
    """The content of every file that holds weights or optimizer state."""
    root = folders.root(folder / "run") / folders.final_name(step)
    return {
        f"{path.relative_to(root)}:{key}": value
        for path in sorted(root.rglob("*.pt"))
        for key, value in flatten(torch.load(path, weights_only=False))
        if not key.startswith(IGNORED)
    }


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in flatten(item, f"{prefix}/{key}")]
    if isinstance(value, list | tuple):
        return [leaf for key, item in enumerate(value) for leaf in flatten(item, f"{prefix}/{key}")]
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [(prefix, (str(value.dtype), tuple(value.shape), hashlib.sha256(content).hexdigest()))]
    return [(prefix, value)] if isinstance(value, int | float | str) else []


def assert_same_run(resumed: Path, straight: Path) -> None:
    assert metrics(resumed) == metrics(straight)
    one, other = saved_tensors(resumed, 10), saved_tensors(straight, 10)
    differing = [name for name in one if one[name] != other.get(name)]
    assert one.keys() == other.keys()
    assert not differing, f"{len(differing)} of {len(one)} saved values differ, first: {differing[:3]}"


@pytest.mark.parametrize("world_size, ep, stage, more", LAYOUTS)
def test_resume_equals_the_straight_run(
    tmp_path: Path, world_size: int, ep: int, stage: int, more: tuple[str, ...]
) -> None:
    layout = (f"parallel.ep={ep}", f"parallel.zero_stage={stage}", *more)
    straight = prepared_run(tmp_path / "straight", *layout)
    resumed = prepared_run(tmp_path / "resumed", *layout)
    assert run_ranks(job, world_size, straight, init=False) == [10] * world_size
    assert run_ranks(job, world_size, (*resumed, "training.stop_after_step=5"), init=False) == [5] * world_size
    assert run_ranks(job, world_size, resumed, init=False) == [10] * world_size
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_in_the_middle_of_a_save(tmp_path: Path, victim: int) -> None:
    """The checkpoint of step 10 dies half-written; the run goes on from step 5 and ends as the straight one."""
    layout = ("parallel.ep=2", "training.steps=10", "training.checkpoint.every=5")
    straight = prepared_run(tmp_path / "straight", *layout)
    killed = prepared_run(tmp_path / "killed", *layout)
    run_ranks(job, 2, straight, init=False)
    with pytest.raises(RankError):
        run_ranks(killed_job, 2, killed, victim, 10, init=False)
    assert [p.name for p in folders.complete(tmp_path / "killed" / "run")] == ["step_00000005"]
    assert list(folders.root(tmp_path / "killed" / "run").glob(".incomplete-*")), "the save was not in the middle"
    assert run_ranks(job, 2, killed, init=False) == [10, 10]
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    assert not list(folders.root(tmp_path / "killed" / "run").glob(".incomplete-*"))
