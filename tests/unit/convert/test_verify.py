"""Every kind of damage is found, and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamoe.common.errors import CheckpointError
from megamoe.convert.verify import verify
from megamoe.testing.checkpoints import example_tensors, pieces_of, publish, write_checkpoint
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.files import write_file
from megamoe.training.checkpoint.index import INDEX, Index


def test_a_sound_checkpoint_passes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 5, example_tensors())
    assert verify(path) == Index.scan(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])],
    ids=["flipped bit", "deleted", "cut off"],
)
@pytest.mark.parametrize("name", ["state/rank_00001.safetensors", INDEX, "config.json", "ranks/rank_00000.json"])
def test_every_file_is_compared_with_its_digest(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    before, path = (write_checkpoint(tmp_path, step, example_tensors()) for step in (5, 10))
    damage(path / name)
    with pytest.raises(CheckpointError, match=name) as caught:
        verify(path)
    assert str(before) in caught.value.todo


def anew(path: Path, change: Callable[[Path], None]) -> Path:
    """The checkpoint with something changed and all digests right again: what a defect of a writer would leave."""
    target = path.with_name(".incomplete-" + path.name)
    path.rename(target)
    change(target)
    return publish(target, 5)


def test_an_index_that_says_something_else_than_the_files(tmp_path: Path) -> None:
    def change(target: Path) -> None:
        listed = json.loads((target / INDEX).read_text())
        listed["weight/embedding.weight"]["dtype"] = "I32"
        (target / INDEX).write_text(json.dumps(listed))

    path = anew(write_checkpoint(tmp_path, 5, example_tensors()), change)
    with pytest.raises(CheckpointError, match=r"weight/embedding\.weight as int32 .* float32"):
        verify(path)


def test_a_file_that_the_index_does_not_know(tmp_path: Path) -> None:
    def change(target: Path) -> None:
        more = list(pieces_of("weight/more", torch.ones(3), [Box((0,), (3,))]))
        write_file(target / "state" / "more.safetensors", more)

    path = anew(write_checkpoint(tmp_path, 5, example_tensors()), change)
    with pytest.raises(CheckpointError, match="lists weight/more as nothing"):
        verify(path)


@pytest.mark.parametrize("name", [INDEX, "state/rank_00000.safetensors"])
def test_a_file_that_the_manifest_does_not_list(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, 5, example_tensors())
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"does not list {name}"):
        verify(path)


def test_a_hole(tmp_path: Path) -> None:
    def change(target: Path) -> None:
        whole = torch.ones(4, 3)
        write_file(target / "state" / "more.safetensors", list(pieces_of("weight/more", whole, [Box((0, 0), (4, 2))])))
        Index.scan(target).write()

    path = anew(write_checkpoint(tmp_path, 5, example_tensors()), change)
    with pytest.raises(CheckpointError, match=r"weight/more \[4, 3\] do not tile it: no piece holds \[0, 2\]"):
        verify(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind, dtype", [("weight", torch.float32), ("exp_avg_sq", torch.bfloat16)])
def test_a_value_that_is_not_finite(tmp_path: Path, value: float, kind: str, dtype: torch.dtype) -> None:
    moment = torch.ones(9, 4, dtype=dtype)
    moment[7, 1] = value
    path = write_checkpoint(tmp_path, 5, example_tensors() | {f"{kind}/last": moment})
    with pytest.raises(CheckpointError, match=rf"not finite(?s:.)*1 of \d+ values of {kind}/last"):
        verify(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        verify(folders.incomplete_path(tmp_path, 5))
