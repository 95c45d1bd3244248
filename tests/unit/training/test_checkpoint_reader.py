"""Any box of any tensor, out of any pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from megamoe.common.errors import CheckpointError
from megamoe.testing.checkpoints import example_tensors, pieces_of, write_state
from megamoe.training.checkpoint import reader as readers
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.files import write_file
from megamoe.training.checkpoint.index import INDEX, Index
from megamoe.training.checkpoint.reader import Reader


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def reader_of(folder: Path, tensors: dict[str, torch.Tensor], num_files: int = 4, seed: int = 0) -> Reader:
    write_state(folder, tensors, num_files, seed)
    Index.scan(folder).write()
    return Reader(folder)


@pytest.mark.parametrize("seed", range(4))
def test_every_tensor_whole_and_in_boxes(tmp_path: Path, seed: int) -> None:
    tensors, draw = example_tensors(seed), random.Random(seed)
    reader = reader_of(tmp_path, tensors, num_files=1 + seed * 2, seed=seed)
    for name, value in tensors.items():
        assert same_bits(reader.read(name), value), name
        for _ in range(40):
            starts = tuple(draw.randint(0, size) for size in value.shape)
            shape = tuple(draw.randint(0, size - start) for size, start in zip(value.shape, starts, strict=True))
            box = Box(starts, shape)
            assert same_bits(reader.read(name, box), value[box.slices()]), f"{name} {box}"


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_OPEN", 2)
    tensors = {f"weight/{number}": torch.randn(8, 3) for number in range(20)}
    reader = reader_of(tmp_path, tensors, num_files=9)
    for _ in range(2):
        for name, value in tensors.items():
            assert same_bits(reader.read(name), value)
            assert len(reader._open) <= 2
    reader.close()
    assert not reader._open
    assert same_bits(reader.read("weight/3"), tensors["weight/3"])


def test_a_file_that_is_not_needed_is_not_opened(tmp_path: Path) -> None:
    whole = torch.randn(4, 3)
    (tmp_path / "state").mkdir()
    for number in range(4):
        pieces = list(pieces_of("weight/w", whole, [Box((number, 0), (1, 3))]))
        write_file(tmp_path / "state" / f"{number}.safetensors", pieces)
    Index.scan(tmp_path).write()
    for number in (0, 3):
        (tmp_path / "state" / f"{number}.safetensors").unlink()
    reader = Reader(tmp_path)
    assert same_bits(reader.read("weight/w", Box((1, 1), (2, 2))), whole[1:3, 1:])
    with pytest.raises(CheckpointError, match=r"state/3\.safetensors cannot be read"):
        reader.read("weight/w", Box((2, 0), (2, 3)))


def test_names_and_kinds(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, example_tensors())
    assert reader.names("weight") == ["blocks.0.moe.experts.w1", "embedding.weight"]
    assert reader.names("momentum_buffer") == []
    assert reader.has("weight/embedding.weight")
    assert not reader.has("exp_avg/embedding.weight")
    with pytest.raises(CheckpointError, match=r"does not hold exp_avg/embedding\.weight"):
        reader.read("exp_avg/embedding.weight")


def test_reading_into_a_part_of_a_parameter_that_is_wider(tmp_path: Path) -> None:
    whole = torch.randn(4, 6).bfloat16()
    reader = reader_of(tmp_path, {"weight/w": whole})
    parameter = torch.nn.Parameter(torch.zeros(6, 2).t())
    reader.read_into("weight/w", Box((1, 0), (2, 6)), parameter)
    assert torch.equal(parameter, whole[1:3].float())


@pytest.mark.parametrize(
    "saved, wanted",
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.int64, torch.float64),
        (torch.float32, torch.int64),
        (torch.bool, torch.int64),
    ],
)
def test_nothing_is_rounded_on_the_way(tmp_path: Path, saved: torch.dtype, wanted: torch.dtype) -> None:
    reader = reader_of(tmp_path, {"weight/w": torch.ones(4).to(saved)})
    with pytest.raises(ValueError, match="does not go into"):
        reader.read_into("weight/w", Box((0,), (4,)), torch.zeros(4, dtype=wanted))


def test_another_shape_than_the_box_is_refused(tmp_path: Path) -> None:
    """Also one that broadcasting would fill."""
    reader = reader_of(tmp_path, {"weight/w": torch.ones(4, 1)})
    with pytest.raises(ValueError, match="does not go into"):
        reader.read_into("weight/w", Box.of((4, 1)), torch.zeros(4, 3))


@pytest.mark.parametrize("box", [Box((2, 0), (3, 3)), Box((0,), (4,)), Box((-1, 0), (2, 3))])
def test_a_box_outside_of_the_tensor_is_another_architecture(tmp_path: Path, box: Box) -> None:
    reader = reader_of(tmp_path, {"weight/w": torch.ones(4, 3)})
    with pytest.raises(CheckpointError, match=r"another architecture(?s:.)*weight/w of shape \[4, 3\]"):
        reader.read("weight/w", box)


def test_a_hole_is_found_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    pieces = list(pieces_of("weight/w", torch.ones(4, 3), [Box((0, 0), (2, 3)), Box((3, 0), (1, 3))]))
    write_file(tmp_path / "state" / "a.safetensors", pieces)
    Index.scan(tmp_path).write()
    reader = Reader(tmp_path)
    assert torch.equal(reader.read("weight/w", Box((0, 0), (2, 3))), torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="do not tile it: 3 elements"):
        reader.read("weight/w")


def test_an_index_that_promises_what_the_file_does_not_hold(tmp_path: Path) -> None:
    reader_of(tmp_path, {"weight/w": torch.ones(4, 3)}, num_files=1)
    original = json.loads((tmp_path / INDEX).read_text())
    for key, value in (("dtype", "I32"), ("shape", [5, 3])):
        found = json.loads(json.dumps(original))
        found["weight/w"][key] = value
        (tmp_path / INDEX).write_text(json.dumps(found))
        with pytest.raises(CheckpointError, match=r"cannot be read|do not tile"):
            Reader(tmp_path).read("weight/w")
    original["weight/v"] = original.pop("weight/w")
    (tmp_path / INDEX).write_text(json.dumps(original))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reader(tmp_path).read("weight/v")
