"""What makes a checkpoint complete, what makes it damaged, and which ones are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamoe.common.errors import CheckpointError
from megamoe.training.checkpoint import folder as folders
from megamoe.training.state import TrainState


def write(run: Path, step: int, content: bytes = b"weights") -> Path:
    """A complete checkpoint with one file."""
    target = folders.incomplete_path(run, step)
    (target / "state").mkdir(parents=True)
    (target / "state" / "rank_00000.safetensors").write_bytes(content)
    state = TrainState(step, step * 8, step * 64)
    manifest = folders.Manifest(state, {}, {}, "digest", folders.digests(target))
    return folders.publish(target, manifest)


def test_complete_means_named_and_with_a_manifest(tmp_path: Path) -> None:
    first, second = write(tmp_path, 5), write(tmp_path, 10)
    folders.incomplete_path(tmp_path, 15).mkdir()
    (folders.root(tmp_path) / "step_00000020").mkdir()
    assert folders.complete(tmp_path) == [first, second]
    assert folders.complete(tmp_path / "nothing") == []


def test_order_is_by_step_and_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999)
    write(tmp_path, 100_000_000)
    assert [p.name for p in folders.complete(tmp_path)] == ["step_99999999", "step_100000000"]


def test_a_published_checkpoint_verifies(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    manifest = folders.read_manifest(path)
    folders.verify(path, manifest)
    assert (manifest.step, manifest.state) == (5, TrainState(5, 40, 320))
    assert not list(folders.root(tmp_path).glob(".incomplete-*"))


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    write(tmp_path, 5, b"old")
    path = write(tmp_path, 5, b"new")
    assert (path / "state" / "rank_00000.safetensors").read_bytes() == b"new"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "manifest_keys"])
def test_damage_is_found_and_the_previous_checkpoint_named(tmp_path: Path, damage: str) -> None:
    before, path = write(tmp_path, 5), write(tmp_path, 10)
    file = path / "state" / "rank_00000.safetensors"
    match damage:
        case "flip":
            file.write_bytes(b"weightz")
        case "truncate":
            file.write_bytes(b"weight")
        case "delete":
            file.unlink()
        case "manifest":
            (path / "manifest.json").write_text('{"step": 10')
        case "manifest_keys":
            (path / "manifest.json").write_text('{"step": 10}')
    with pytest.raises(CheckpointError, match="damaged") as caught:
        folders.verify(path, folders.read_manifest(path))
    assert str(before) in caught.value.todo


def test_digests_that_are_known_are_not_computed_again(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    (path / "more").write_bytes(b"more")
    assert folders.digests(path, but={"state/rank_00000.safetensors"}).keys() == {"more"}


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**values, "format": 1, "step": 5}))
    with pytest.raises(CheckpointError, match="another format"):
        folders.read_manifest(path)


def test_no_checkpoint_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        folders.read_manifest(tmp_path)


@pytest.mark.parametrize("keep, every, left", [(2, 0, [4, 5]), (1, 2, [2, 4, 5]), (9, 0, [1, 2, 3, 4, 5]), (1, 0, [5])])
def test_retention(tmp_path: Path, keep: int, every: int, left: list[int]) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    folders.retain(tmp_path, keep, every)
    assert [int(p.name.split("_")[1]) for p in folders.complete(tmp_path)] == left


def test_leftovers_are_cleared(tmp_path: Path) -> None:
    kept = write(tmp_path, 5)
    (folders.incomplete_path(tmp_path, 10) / "engine").mkdir(parents=True)
    folders.clear_incomplete(tmp_path)
    assert list(folders.root(tmp_path).iterdir()) == [kept]


@pytest.mark.parametrize("died_at", ["renaming the old one", "renaming the new one", "deleting the old one"])
def test_replacing_loses_nothing_wherever_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died_at: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    renames = iter([None, None])
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        which = {"step_00000005": "renaming the old one", ".incomplete-step_00000005": "renaming the new one"}
        if died_at == which[path.name]:
            raise Killed
        next(renames)
        return original(path, target)

    write(tmp_path, 5, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if died_at == "deleting the old one":
            patch.setattr(folders.shutil, "rmtree", lambda path, **kwargs: die() if path.exists() else None)
        with pytest.raises(Killed):
            write(tmp_path, 5, b"new")
    folders.recover(tmp_path)
    (left,) = folders.complete(tmp_path)
    folders.verify(left, folders.read_manifest(left))
    folders.clear_incomplete(tmp_path)
    assert list(folders.root(tmp_path).iterdir()) == [left]


def test_a_deletion_that_dies_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write(tmp_path, step)

    def die(path: Path, **kwargs: object) -> None:
        if path.exists():
            next(path.rglob("rank_*")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            folders.retain(tmp_path, 1, 0)
    (left,) = folders.complete(tmp_path)
    folders.verify(left, folders.read_manifest(left))
    assert left.name == "step_00000002"


def test_a_damaged_one_that_was_set_aside_is_none(tmp_path: Path) -> None:
    kept, bad = write(tmp_path, 5), write(tmp_path, 10)
    folders.set_aside(bad)
    assert folders.complete(tmp_path) == [kept]
    assert (folders.root(tmp_path) / "damaged_step_00000010" / "manifest.json").is_file()
