"""Files of pieces, in the format safetensors: a header in JSON and raw little-endian bytes, nothing that runs.

A file's entry is called by the tensor's name, with the box behind it where it is not all of the tensor, as in
`weight/blocks.0.moe.experts.w1[0:2,0:64,16:32]`. The header's metadata has the shapes of the whole tensors.

The safetensors library reads them. It does not write them: its writer gives no errno (a full disk is one error among
others), does not sync, and would have the file read once more for the digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor

from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.folder import FileEntry
from megamoe.training.checkpoint.pieces import Piece

SUFFIX = ".safetensors"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What the format calls the dtypes that a checkpoint may hold."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_WHOLES = "whole shapes"
_SHAPES = TypeAdapter(dict[str, tuple[int, ...]])
_CHUNK_BYTES = 8 * 2**20
_ALIGNMENT = 8


def write_file(path: Path, pieces: Sequence[Piece]) -> FileEntry:
    """Write pieces into a new file, or over an old one, and wait until it is on the disk.

    A piece without elements is left out, unless the whole tensor has none. Values are taken one after the other, so
    that no more than one is copied at a time (from a GPU, or into row-major order).

    Returns:
        Size and digest of what was written.

    Raises:
        OSError: it could not be written; its errno says why (no space, no permission, ...).
        ValueError: two pieces are the same box, a dtype is one that a checkpoint does not hold, or a name has a "[".
    """
    # Wider elements first, so that each begins at a multiple of its size, as readers that map the file need it.
    kept = sorted((piece for piece in pieces if _has_content(piece)), key=lambda piece: -piece.value.itemsize)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in _chunks(kept):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def entry_name(tensor: str, whole: Sequence[int], box: Box) -> str:
    """What a piece is called in its file."""
    if box == Box.of(whole):
        return tensor
    return f"{tensor}[{','.join(f'{start}:{end}' for start, end in zip(box.offsets, box.end, strict=True))}]"


def list_file(path: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Box]]:
    """The pieces in a file: (tensor, dtype, shape of the whole, box); reads the header only.

    Raises:
        OSError, SafetensorError: the file cannot be read.
        ValueError: it is not one of ours.
    """
    with safe_open(path, framework="pt") as file:
        wholes = _SHAPES.validate_json((file.metadata() or {}).get(_WHOLES, ""))
        for name in file.keys():  # noqa: SIM118  (no mapping)
            entry = file.get_slice(name)
            yield _parse_entry(name, entry.get_dtype(), tuple(entry.get_shape()), wholes)


def _has_content(piece: Piece) -> bool:
    return piece.value.numel() > 0 or prod(piece.whole) == 0


def _chunks(pieces: Sequence[Piece]) -> Iterator[bytes | memoryview]:
    if sys.byteorder != "little":
        raise NotImplementedError("the format is little-endian, and this machine is not")
    yield _header(pieces)
    for piece in pieces:
        content = _bytes_of(piece.value)
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]


def _header(pieces: Sequence[Piece]) -> bytes:
    wholes = {piece.tensor: list(piece.whole) for piece in pieces}
    entries: dict[str, object] = {"__metadata__": {"format": "pt", _WHOLES: json.dumps(wholes)}}
    position = 0
    for piece in pieces:
        name, dtype = entry_name(piece.tensor, piece.whole, piece.box), DTYPE_NAMES.get(piece.value.dtype)
        if name in entries or dtype is None or "[" in piece.tensor:
            raise ValueError(f"{name} of {piece.value.dtype} cannot be stored, or is there twice")
        end = position + piece.value.nbytes
        entries[name] = {"dtype": dtype, "shape": list(piece.box.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(value: Tensor) -> memoryview:
    # Flat first: a tensor without dims cannot be seen as another dtype.
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _parse_entry(
    name: str, dtype: str, shape: tuple[int, ...], wholes: Mapping[str, tuple[int, ...]]
) -> tuple[str, torch.dtype, tuple[int, ...], Box]:
    tensor, _, bounds = name.removesuffix("]").partition("[")
    if tensor not in wholes or dtype not in DTYPES:
        raise ValueError(f"{name} of {dtype} is nothing that a checkpoint holds")
    offsets = tuple(int(bound.split(":")[0]) for bound in bounds.split(",")) if bounds else (0,) * len(shape)
    box = Box(offsets, shape)
    if name != entry_name(tensor, wholes[tensor], box):
        raise ValueError(f"{name} has shape {shape}")
    return tensor, DTYPES[dtype], wholes[tensor], box
