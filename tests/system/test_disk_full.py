"""A disk that fills up: one clear error, what was saved before stays whole, and the run goes on once there is room."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamoe.common import env
from megamoe.testing.launches import Outcome, launch, one_error, run_script, script_on_this_rank
from megamoe.testing.ranks import run_ranks
from megamoe.testing.runs import Run
from megamoe.training.checkpoint import folder as folders

PRETRAIN = "launch/pretrain.py"
FIRST, SECOND = "step_00000005", "step_00000010"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True, timeout=10
    )
    if mount.returncode != 0:
        pytest.skip(f"needs permission to mount a small file system: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=10)


def ballast(disk: Path, leave: int) -> Path:
    """A file beside the run that takes all room but `leave` bytes."""
    path, block = disk / "ballast", b"\0" * 4096
    path.unlink(missing_ok=True)
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(block):
                pass
        except OSError:
            pass
    keep = path.stat().st_size - leave
    assert keep > 0
    with path.open("r+b") as file:
        file.truncate(keep)
    return path


def size_of(folder: Path) -> int:
    """Bytes on the disk, in blocks."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def run_to_step_5(run: Run, ranks: int) -> int:
    """Train up to the first checkpoint; its size."""
    outcomes = run_script(PRETRAIN, [*run.words, "training.stop_after_step=5"], ranks)
    assert [outcome.returncode for outcome in outcomes] == [0] * ranks, outcomes
    return size_of(run.checkpoints / FIRST)


def assert_only_the_first_is_there_and_whole(run: Run) -> None:
    assert [path.name for path in folders.complete(run.folder)] == [FIRST]
    folders.verify(run.checkpoints / FIRST, folders.read_manifest(run.checkpoints / FIRST))
    assert not list(run.checkpoints.glob(".incomplete-*")), "the half that was written takes the room that is needed"


def assert_goes_on(run: Run, ranks: int) -> None:
    outcomes = run_script(PRETRAIN, run.words, ranks)
    assert [outcome.returncode for outcome in outcomes] == [0] * ranks, outcomes
    assert f"resumed from {run.checkpoints / FIRST}" in outcomes[0].stderr
    assert [path.name for path in folders.complete(run.folder)] == [FIRST, SECOND]
    steps = [line["step"] for line in run.metrics() if "loss" in line]
    assert steps == list(range(1, 11))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_will_not_fit_is_not_begun(prepared: Run, small_disk: Path, ranks: int) -> None:
    run = prepared.elsewhere(small_disk / "run", f"parallel.ep={ranks}")
    size = run_to_step_5(run, ranks)
    weight = ballast(small_disk, leave=size // 2)
    text = one_error(*run_script(PRETRAIN, run.words, ranks))
    assert text.startswith(f"CheckpointError: checkpoint {SECOND} could not be written")
    assert "MB free, about" in text
    assert "MB needed" in text
    assert_only_the_first_is_there_and_whole(run)
    weight.unlink()
    assert_goes_on(run, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_during_the_save(prepared: Run, small_disk: Path, ranks: int) -> None:
    """There is room for the estimate, but not for all: file formats add to it."""
    run = prepared.elsewhere(small_disk / "run", f"parallel.ep={ranks}")
    size = run_to_step_5(run, ranks)
    weight = ballast(small_disk, leave=size * 95 // 100)
    text = one_error(*run_script(PRETRAIN, run.words, ranks))
    assert text.startswith(f"CheckpointError: checkpoint {SECOND} could not be written")
    assert "MB needed" not in text, "the estimate refused it, so nothing was written"
    assert_only_the_first_is_there_and_whole(run)
    weight.unlink()
    assert_goes_on(run, ranks)


def test_a_full_disk_between_saves_under_deepspeed(prepared: Run, small_disk: Path) -> None:
    """Rank 0 cannot write a line of metrics while rank 1 is in a collective: both end, and the reason is given once."""
    run = prepared.elsewhere(small_disk / "run")
    run_to_step_5(run, ranks=2)
    weight = ballast(small_disk, leave=32_768)
    words = [*run.words, "training.steps=1000", "training.checkpoint.every=0", "training.validation.every=0"]
    text = one_error(launch("deepspeed", PRETRAIN, words, ranks=2, timeout=60))
    assert "The run folder cannot be written." in text
    assert "No space left on device" in text
    assert run.metrics()[-1]["step"] > 5, "it was refused at the start already"
    assert_only_the_first_is_there_and_whole(run)
    weight.unlink()
    assert_goes_on(run, 2)


def limited(words: list[str], victim: int, largest: int) -> Outcome:
    """Pretraining on a rank that may not write files above a size, if it is the victim."""
    if env.rank() == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    return script_on_this_rank(PRETRAIN, words)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_alone_cannot_write(prepared: Run, tmp_path: Path, victim: int) -> None:
    """The others learn it before the next collective; the error is that rank's, told by rank 0."""
    run = prepared.elsewhere(tmp_path / "run")
    run_to_step_5(run, ranks=2)
    sizes = {name: entry["bytes"] for name, entry in folders.read_manifest(run.checkpoints / FIRST).files.items()}
    largest = 60_000
    assert all(size > largest for name, size in sizes.items() if name.startswith("state/")), "the limit is not reached"
    outcomes = run_ranks(limited, 2, list(run.words), victim, largest, init=False)
    assert one_error(*outcomes).startswith(f"CheckpointError: checkpoint {SECOND} could not be written")
    assert "CheckpointError" in outcomes[0].stderr
    assert_only_the_first_is_there_and_whole(run)
    assert_goes_on(run, 2)
