"""What makes a checkpoint complete, what makes it damaged, and which ones are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamoe.common.errors import CheckpointError
from megamoe.training.checkpoint import folder as folders


def write(run: Path, step: int, content: bytes = b"weights") -> Path:
    """A complete checkpoint with one file."""
    target = folders.incomplete_path(run, step)
    (target / "weights").mkdir(parents=True)
    (target / "weights" / "dense.pt").write_bytes(content)
    manifest = folders.Manifest(step, step * 8, step * 64, {}, {}, "digest", folders.digests(target))
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
    assert (manifest.step, manifest.consumed_samples, manifest.consumed_tokens) == (5, 40, 320)
    assert not list(folders.root(tmp_path).glob(".incomplete-*"))


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    write(tmp_path, 5, b"old")
    path = write(tmp_path, 5, b"new")
    assert (path / "weights" / "dense.pt").read_bytes() == b"new"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "manifest_keys"])
def test_damage_is_found_and_the_previous_checkpoint_named(tmp_path: Path, damage: str) -> None:
    before, path = write(tmp_path, 5), write(tmp_path, 10)
    file = path / "weights" / "dense.pt"
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


def test_digests_are_shared_among_ranks(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    (path / "more.pt").write_bytes(b"more")
    parts = [folders.digests(path, share, 3) for share in range(3)]
    assert {name for part in parts for name in part} == {"more.pt", "weights/dense.pt"}
    assert sum(len(part) for part in parts) == 2


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**values, "format": 99}))
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
