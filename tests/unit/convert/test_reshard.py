"""The same tensors, bit for bit, in other files; complete or invisible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.common.errors import CheckpointError
from megamoe.convert import reshard as module
from megamoe.convert.reshard import reshard
from megamoe.convert.verify import verify
from megamoe.testing.checkpoints import example_tensors, write_checkpoint
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.reader import Reader


def bits(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Everything that a checkpoint holds."""
    reader, found = Reader(folder), {}
    for name in reader.index.tensors:
        value = reader.read(name)
        found[name] = value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("num_files", [1, 2, 5, 100])
def test_every_bit_of_every_tensor(tmp_path: Path, num_files: int) -> None:
    """Also in more files than there are tensors, which cuts each of them."""
    source = write_checkpoint(tmp_path / "run", 100, example_tensors())
    copy = reshard(source, tmp_path / "copy", num_files)
    verify(copy)
    assert copy == folders.locate(tmp_path / "copy")
    assert bits(copy) == bits(source)
    assert len(list((copy / "state").iterdir())) == num_files
    for name in ("config.json", "ranks/rank_00000.json"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
    before, after = folders.read_manifest(source), folders.read_manifest(copy)
    assert (after.state, after.architecture, after.topology) == (before.state, before.architecture, before.topology)


def test_back_and_forth_ends_in_the_same_files(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", 100, example_tensors())
    one = reshard(source, tmp_path / "one", 1)
    again = reshard(reshard(one, tmp_path / "seven", 7), tmp_path / "again", 1)
    assert folders.read_manifest(again) == folders.read_manifest(one)


def test_files_are_of_equal_size(tmp_path: Path) -> None:
    tensors = {
        "weight/large": torch.randn(301, 1000),
        "weight/small": torch.randn(7),
        "exp_avg/large": torch.randn(999),
    }
    source = write_checkpoint(tmp_path / "run", 100, tensors)
    for num_files in (3, 8):
        copy = reshard(source, tmp_path / f"{num_files}", num_files)
        sizes = [path.stat().st_size for path in (copy / "state").iterdir()]
        assert max(sizes) - min(sizes) < 2_000, "more than the headers differ by"


def test_no_more_than_one_file_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, write = [], module.write_file

    def watched(path: Path, pieces: Any) -> folders.FileEntry:
        held.append(sum(piece.value.nbytes for piece in pieces))
        return write(path, pieces)

    monkeypatch.setattr(module, "write_file", watched)
    tensors = {"weight/one": torch.randn(1000, 50), "weight/two": torch.randn(1000, 50)}
    reshard(write_checkpoint(tmp_path / "run", 100, tensors), tmp_path / "copy", 4)
    assert held == [100_000] * 4


def test_weights_only(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", 100, example_tensors())
    copy = reshard(source, tmp_path / "copy", 2, weights_only=True)
    verify(copy)
    expected = {name: found for name, found in bits(source).items() if name.startswith(("weight/", "statistic/"))}
    assert len(expected) == 5
    assert bits(copy) == expected
    assert not (copy / "ranks").exists()
    assert (copy / "config.json").exists()


def test_a_damaged_source_gets_no_copy_with_new_digests(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", 100, example_tensors())
    path = source / "state" / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        reshard(source, tmp_path / "copy", 2)
    assert not (tmp_path / "copy").exists()


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", 100, example_tensors())
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    with pytest.raises(CheckpointError, match="exists already"):
        reshard(source, tmp_path / "run", 2)
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_full_disk_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    source = write_checkpoint(tmp_path / "run", 100, example_tensors())
    write, seen = module.write_file, []

    def until_full(path: Path, pieces: Any) -> folders.FileEntry:
        seen.append(path)
        return write(path if len(seen) <= fails_at else Path("/dev/full"), pieces)

    monkeypatch.setattr(module, "write_file", until_full)
    with pytest.raises(CheckpointError, match=r"could not be written(?s:.)*No space left on device"):
        reshard(source, tmp_path / "copy", 4)
    assert len(seen) == fails_at + 1
    assert list((tmp_path / "copy" / "checkpoints").iterdir()) == []


def test_what_an_interrupted_copy_left_is_in_nobodys_way(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", 100, example_tensors())
    left = folders.incomplete_path(tmp_path / "copy", 100) / "state" / "part_00009.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of a file")
    assert bits(reshard(source, tmp_path / "copy", 2)) == bits(source)
