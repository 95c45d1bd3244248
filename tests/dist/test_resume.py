"""Stopping and going on: bit for bit what the straight run gives, also after a rank was killed during a save."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megamoe.common import env
from megamoe.common.errors import ConfigError
from megamoe.testing.configs import tiny_config
from megamoe.testing.parity_topologies import LADDER, degree_words, parse
from megamoe.testing.ranks import RankError, run_ranks
from megamoe.testing.runs import TIMING, prepared_run
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint import saver
from megamoe.training.checkpoint.pieces import Piece
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


def job(overrides: tuple[str, ...]) -> int:
    return pretrain(tiny_config(*overrides), env.world_size()).step


def killed_job(overrides: tuple[str, ...], victim: int, step: int) -> int:
    """As `job`, but the victim dies by SIGKILL in the middle of writing the checkpoint of that step."""
    original = saver.write_file
    name = folders.incomplete_path("", step).name

    def write(path: Path, pieces: Sequence[Piece]) -> folders.FileEntry:
        if env.rank() == victim and name in str(path):
            original(path, pieces[: len(pieces) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, pieces)

    saver.write_file = write
    return job(overrides)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def saved_files(folder: Path, step: int) -> dict[str, str]:
    """The digest of every file that holds weights, optimizer state, running statistics or random streams."""
    checkpoint = folders.root(folder / "run") / folders.final_name(step)
    files = folders.read_manifest(checkpoint).files
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith(("state/", "ranks/"))}


def assert_same_run(resumed: Path, straight: Path) -> None:
    assert metrics(resumed) == metrics(straight)
    assert saved_files(resumed, 10) == saved_files(straight, 10)


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


@THOROUGH
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", LADDER)
def test_every_layout_of_the_parity_suite_resumes(tmp_path: Path, name: str, stage: int) -> None:
    topology = parse(name).topology
    if topology.pp > 1 and stage > 1:
        assert problems_of(*degree_words(topology), f"parallel.zero_stage={stage}"), "it could be tested"
        return
    more = ("moe.router.type=resonance", *degree_words(topology))
    test_resume_equals_the_straight_run(tmp_path, topology.world_size, topology.ep, stage, more)


def problems_of(*overrides: str) -> str:
    """Why a configuration is refused."""
    try:
        tiny_config(*overrides)
    except ConfigError as error:
        return str(error)
    return ""


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


CHANGES = [
    pytest.param(2, ("parallel.ep=2",), 1, (), id="ep2_to_one_rank", marks=THOROUGH),
    pytest.param(
        4,
        ("parallel.pp=2", "parallel.tp=2", "parallel.ep=2"),
        2,
        ("parallel.ep=2", "parallel.zero_stage=3"),
        id="pp2_tp2_ep2_to_ep2_zero3",
    ),
    pytest.param(
        2,
        ("parallel.ep=2", "parallel.zero_stage=2"),
        4,
        ("parallel.tp=2", "parallel.ep=4"),
        id="ep2_zero2_to_tp2_ep4",
        marks=THOROUGH,
    ),
]


@pytest.mark.parametrize("before, layout, after, other", CHANGES)
def test_going_on_with_other_ranks(
    tmp_path: Path, before: int, layout: tuple[str, ...], after: int, other: tuple[str, ...]
) -> None:
    """The same samples, and the losses of the straight run to what rounding in another order leaves."""
    common = ("training.precision=fp32", "moe.router.type=resonance", "training.seed=3")
    straight = prepared_run(tmp_path / "straight", *common, *layout)
    moved = prepared_run(tmp_path / "moved", *common)
    run_ranks(job, before, straight, init=False)
    run_ranks(job, before, (*moved, *layout, "training.stop_after_step=5"), init=False)
    assert run_ranks(job, after, (*moved, *other), init=False) == [10] * after
    expected, found = metrics(tmp_path / "straight"), metrics(tmp_path / "moved")
    assert [line["consumed_samples"] for line in found] == [line["consumed_samples"] for line in expected]
    for one, its in zip(found, expected, strict=True):
        for name in {"loss", "gradient_norm", "validation_loss"} & its.keys():
            assert one[name] == pytest.approx(its[name], rel=0 if its["step"] <= 5 and name == "loss" else 2e-5)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in folders.root(run).iterdir() if not path.name.startswith("."))


def test_going_back(tmp_path: Path) -> None:
    """To an older checkpoint of the same run: later ones make room, and the same command again goes on, as a batch
    system gives it, with what was saved since."""
    one_rank = ("training.checkpoint.every=2", "training.checkpoint.keep=3", "parallel.zero_stage=0")
    words, run = prepared_run(tmp_path, *one_rank), tmp_path / "run"
    run_ranks(job, 1, words, init=False)
    assert [path.name for path in folders.complete(run)] == ["step_00000006", "step_00000008", "step_00000010"]
    back = (f"training.checkpoint.resume={folders.root(run) / 'step_00000006'}", "training.optimizer.lr=1e-4")
    run_ranks(job, 1, (*words, *back, "training.stop_after_step=7"), init=False)
    assert names(run) == [
        *("abandoned_step_00000008", "abandoned_step_00000010", "step_00000006", "step_00000007", "went_back_to"),
    ]
    assert run_ranks(job, 1, (*words, *back), init=False) == [10]
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == list(range(1, 11))
    assert [line["learning_rate"] < 1e-4 for line in metrics(tmp_path) if "loss" in line] == [False] * 6 + [True] * 4
    assert [path.name for path in folders.complete(run)] == ["step_00000007", "step_00000008", "step_00000010"]
    run_ranks(job, 1, words, init=False)
    assert "went_back_to" not in names(run), "another command: going back to the same one would do so again"


def test_beginning_elsewhere(tmp_path: Path) -> None:
    words = prepared_run(tmp_path, "parallel.zero_stage=0")
    run_ranks(job, 1, words, init=False)
    start = f"training.checkpoint.resume={folders.root(tmp_path / 'run') / 'step_00000005'}"
    branch = (*words, start, f"training.output_dir={tmp_path / 'branch'}")
    run_ranks(job, 1, (*branch, "training.stop_after_step=7"), init=False)
    assert run_ranks(job, 1, branch, init=False) == [10]
    lines = [json.loads(line) for line in (tmp_path / "branch" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [6, 7, 8, 9, 10], "not from the beginning twice"
