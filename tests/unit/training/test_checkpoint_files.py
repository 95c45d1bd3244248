"""Files of pieces: what other readers find in them, and what a disk can do to them."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megamoe.testing.checkpoints import example_tensors, pieces_of
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.files import list_file, write_file
from megamoe.training.checkpoint.pieces import Piece


def piece(tensor: str, value: torch.Tensor) -> Piece:
    return Piece(tensor, tuple(value.shape), Box.of(value.shape), value)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def test_the_safetensors_library_reads_every_dtype_bit_for_bit(tmp_path: Path) -> None:
    tensors = example_tensors()
    write_file(tmp_path / "a.safetensors", [piece(name, value) for name, value in tensors.items()])
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


def test_pieces_have_their_box_in_the_name_and_the_whole_in_the_header(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, 5)
    boxes = [Box((0, 0, 0), (2, 6, 5)), Box((2, 3, 1), (1, 1, 4))]
    write_file(tmp_path / "a.safetensors", list(pieces_of("weight/w", whole, boxes)))
    assert load_file(tmp_path / "a.safetensors").keys() == {"weight/w[0:2,0:6,0:5]", "weight/w[2:3,3:4,1:5]"}
    assert sorted(list_file(tmp_path / "a.safetensors"), key=str) == [
        ("weight/w", torch.float32, (4, 6, 5), box) for box in boxes
    ]


def test_a_column_of_a_tensor_needs_no_copy_by_the_caller(tmp_path: Path) -> None:
    whole = torch.randn(6, 8).t()
    write_file(tmp_path / "a.safetensors", list(pieces_of("weight/w", whole, [Box((0, 2), (8, 3))])))
    assert same_bits(load_file(tmp_path / "a.safetensors")["weight/w[0:8,2:5]"], whole[:, 2:5])


def test_a_parameter_can_be_written(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    write_file(tmp_path / "a.safetensors", [piece("weight/w", parameter)])
    assert same_bits(load_file(tmp_path / "a.safetensors")["weight/w"], parameter.detach())


def test_size_and_digest_are_those_of_the_file_and_nothing_is_lost(tmp_path: Path) -> None:
    """Larger than what is written at once."""
    path, large = tmp_path / "a.safetensors", torch.randn(5 * 2**20)
    entry = write_file(path, [piece("weight/w", large), piece("step/w", torch.tensor(1.0))])
    content = path.read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert len(content) > 20 * 2**20
    assert same_bits(load_file(path)["weight/w"], large)


@pytest.mark.parametrize("length", range(8))
def test_every_entry_begins_at_a_multiple_of_its_size(tmp_path: Path, length: int) -> None:
    """Whatever the length of the header."""
    dtypes = {"a": torch.bool, "b": torch.bfloat16, "c": torch.float64, "d" * (1 + length): torch.float32}
    write_file(tmp_path / "a.safetensors", [piece(name, torch.ones(3, dtype=dtype)) for name, dtype in dtypes.items()])
    content = (tmp_path / "a.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    begins = {name: begin + header[name]["data_offsets"][0] for name in dtypes}
    assert {name: begins[name] % dtype.itemsize for name, dtype in dtypes.items()} == dict.fromkeys(dtypes, 0)


def test_an_empty_box_of_a_tensor_is_left_out_and_an_empty_tensor_is_not(tmp_path: Path) -> None:
    pieces = [
        *pieces_of("weight/some", torch.ones(4, 2), [Box((4, 0), (0, 2))]),
        *pieces_of("weight/none", torch.ones(0, 2), [Box((0, 0), (0, 2))]),
    ]
    write_file(tmp_path / "a.safetensors", pieces)
    assert [tensor for tensor, *_ in list_file(tmp_path / "a.safetensors")] == ["weight/none"]
    write_file(tmp_path / "b.safetensors", [])
    assert list(list_file(tmp_path / "b.safetensors")) == []


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    for pieces in (
        [piece("weight/w", torch.ones(2, dtype=torch.complex64))],
        [piece("weight/w", torch.ones(2)), piece("weight/w", torch.ones(2))],
        [piece("weight/w[0:1]", torch.ones(2))],
    ):
        with pytest.raises(ValueError, match="cannot be stored, or is there twice"):
            write_file(tmp_path / "a.safetensors", pieces)


def test_values_that_are_not_of_their_box_are_refused() -> None:
    with pytest.raises(ValueError, match="with values of"):
        Piece("weight/w", (4, 2), Box((0, 0), (2, 2)), torch.ones(4, 2))
    with pytest.raises(ValueError, match="with values of"):
        Piece("weight/w", (4, 2), Box((3, 0), (2, 2)), torch.ones(2, 2))


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may become larger than 1 MB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_becomes_too_large_is_an_error_with_a_number(tmp_path: Path, small_files: int) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        write_file(tmp_path / "a.safetensors", [piece("weight/w", torch.ones(small_files))])
    assert caught.value.errno == errno.EFBIG


def test_a_full_disk_is_an_error_with_a_number() -> None:
    full = Path("/dev/full")
    if not full.exists() or not stat.S_ISCHR(full.stat().st_mode):
        pytest.skip("needs the device /dev/full")
    for size in (1, 2**22):
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_file(full, [piece("weight/w", torch.ones(size))])
        assert caught.value.errno == errno.ENOSPC


def test_no_permission_is_an_error_with_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        write_file(tmp_path / "a.safetensors", [piece("weight/w", torch.ones(2))])
    assert caught.value.errno == errno.EISDIR


def test_a_file_of_someone_else_is_no_file_of_ours(tmp_path: Path) -> None:
    save_file({"weight/w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="EOF"):
        list(list_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "metadata, name",
    [
        ({"whole shapes": '{"weight/w": [4]}'}, "weight/w"),
        ({"whole shapes": '{"weight/w": [4]}'}, "weight/w[0:3]"),
        ({"whole shapes": '{"weight/w": [4]}'}, "weight/w[0:2,0:1]"),
        ({"whole shapes": '{"weight/w": [4]}'}, "weight/w[x:2]"),
        ({"whole shapes": '{"weight/v": [2]}'}, "weight/w"),
        ({"whole shapes": '{"weight/w": "four"}'}, "weight/w"),
        ({"whole shapes": "[2]"}, "weight/w"),
    ],
)
def test_a_header_that_contradicts_itself_is_found(tmp_path: Path, metadata: dict[str, str], name: str) -> None:
    save_file({name: torch.ones(2)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError):  # noqa: PT011  (of several kinds, all of them ValueError)
        list(list_file(tmp_path / "a.safetensors"))


def test_a_file_that_was_cut_off_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, [piece("weight/w", torch.ones(1000))])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        list(list_file(path))
