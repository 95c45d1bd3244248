"""The index: what it finds in the files, and what it does not accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.common.errors import CheckpointError
from megamoe.testing.checkpoints import example_tensors, pieces_of, write_state
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.files import write_file
from megamoe.training.checkpoint.index import INDEX, Index


def write(folder: Path, name: str, tensor: str, value: torch.Tensor, *boxes: Box) -> None:
    (folder / "state").mkdir(exist_ok=True)
    write_file(folder / "state" / f"{name}.safetensors", list(pieces_of(tensor, value, boxes)))


def test_scanned_and_read_are_equal_and_complete(tmp_path: Path) -> None:
    tensors = write_state(tmp_path, example_tensors(), num_files=5)
    index = Index.scan(tmp_path)
    index.check()
    assert list(index.tensors) == sorted(tensors)
    for name, value in tensors.items():
        entry = index.tensors[name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (value.dtype, tuple(value.shape), value.nbytes)
    assert max(len(entry.pieces) for entry in index.tensors.values()) > 3
    entry = index.write()
    assert entry["bytes"] == (tmp_path / INDEX).stat().st_size
    assert Index.read(tmp_path) == index


def test_only_the_headers_are_read(tmp_path: Path) -> None:
    write(tmp_path, "a", "weight/w", torch.ones(4), Box.of((4,)))
    path = tmp_path / "state" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-16] + b"\xff" * 16)
    Index.scan(tmp_path).check()


@pytest.mark.parametrize(
    "boxes, wrong",
    [
        ((Box((0, 0), (2, 3)),), r"weight/w \[4, 3\].*no piece holds \[2, 0\]"),
        ((Box((0, 0), (3, 3)), Box((2, 1), (2, 2))), r"weight/w \[4, 3\].*2 pieces hold \[2, 1\]"),
    ],
)
def test_a_hole_and_an_overlap_are_named(tmp_path: Path, boxes: tuple[Box, ...], wrong: str) -> None:
    for number, box in enumerate(boxes):
        write(tmp_path, f"rank_{number}", "weight/w", torch.ones(4, 3), box)
    write(tmp_path, "other", "weight/a", torch.ones(2), Box.of((2,)))
    index = Index.scan(tmp_path)
    with pytest.raises(CheckpointError, match=wrong):
        index.check()


@pytest.mark.parametrize("other", [torch.ones(4).double(), torch.ones(5)])
def test_pieces_that_do_not_belong_together_are_named(tmp_path: Path, other: torch.Tensor) -> None:
    write(tmp_path, "rank_0", "weight/w", torch.ones(4), Box((0,), (2,)))
    write(tmp_path, "rank_1", "weight/w", other, Box((2,), (2,)))
    with pytest.raises(CheckpointError, match=r"weight/w do not belong together.*state/rank_1\.safetensors"):
        Index.scan(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "rank_0", "weight/w", torch.ones(4), Box.of((4,)))
    (tmp_path / "state" / "rank_1.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match=r"state/rank_1\.safetensors cannot be read"):
        Index.scan(tmp_path)


def good() -> dict[str, Any]:
    return {"weight/w": {"dtype": "F32", "shape": [4, 2], "pieces": [["state/a.safetensors", [0, 0], [4, 2]]]}}


def changed(key: str, value: Any) -> str:
    found = good()
    found["weight/w"][key] = value
    return json.dumps(found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        json.dumps(good())[:-2],
        changed("dtype", "C64"),
        changed("shape", [4, -2]),
        changed("shape", [8]),
        changed("shape", ["4", "2"]),
        changed("pieces", [["state/../../a.safetensors", [0, 0], [4, 2]]]),
        changed("pieces", [["/etc/passwd", [0, 0], [4, 2]]]),
        changed("pieces", [["state/a.safetensors", [0], [4, 2]]]),
        changed("pieces", [["state/a.safetensors", [0, -1], [4, 2]]]),
        changed("pieces", [["state/a.safetensors", [0, 0]]]),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        Index.read(tmp_path)


def test_the_index_they_are_damaged_from_is_accepted(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps(good()))
    assert Index.read(tmp_path).tensors["weight/w"].shape == (4, 2)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        Index.read(tmp_path)
