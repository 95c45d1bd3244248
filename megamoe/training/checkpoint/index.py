"""The index of a checkpoint: its tensors, and which file has which box of them.

    index.json   {tensor: {"dtype": "F32", "shape": [8, 64, 32], "pieces": [[file, offsets, shape], ...]}}

It says no more than the headers of the files in `state/` do, in one place, so that a reader opens the files that it
needs and no others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import NonNegativeInt, StringConstraints, TypeAdapter
from safetensors import SafetensorError
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from megamoe.training.checkpoint.boxes import Box, tiles
from megamoe.training.checkpoint.files import DTYPE_NAMES, DTYPES, SUFFIX, list_file
from megamoe.training.checkpoint.folder import FileEntry, damaged

INDEX = "index.json"
STATE = "state"


class Stored(NamedTuple):
    """Where a piece is."""

    file: str
    """Relative to the checkpoint's folder."""
    box: Box


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole."""
    pieces: tuple[Stored, ...]
    """In order of their offsets."""

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return Box.of(self.shape).volume * self.dtype.itemsize


@dataclass(frozen=True)
class Index:
    """What a checkpoint's folder holds. Two are equal where they list the same pieces."""

    folder: Path = field(compare=False)
    tensors: dict[str, Entry]
    """By name, in alphabetical order."""

    @classmethod
    def scan(cls, folder: Path, files: Sequence[str] | None = None) -> Index:
        """From the headers of the files.

        Args:
            files: relative to the folder; None: all that `state/` lists.

        Raises:
            CheckpointError: a file cannot be read, or two pieces of a tensor differ in dtype or shape of the whole.
        """
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        pieces: dict[str, list[Stored]] = {}
        for tensor, dtype, whole, stored in _scan(folder, files):
            if kinds.setdefault(tensor, (dtype, whole)) != (dtype, whole):
                first = kinds[tensor]
                what = f"{first[0]} {list(first[1])} and in {stored.file} {dtype} {list(whole)}"
                raise damaged(folder, f"the pieces of {tensor} do not belong together: {what}")
            pieces.setdefault(tensor, []).append(stored)
        return cls(folder, {name: _entry(*kinds[name], pieces[name]) for name in sorted(pieces)})

    @classmethod
    def read(cls, folder: Path) -> Index:
        """From `index.json`.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            found = _FORMAT.validate_json((folder / INDEX).read_bytes(), strict=True)
        except (OSError, ValueError) as error:  # a ValidationError is a ValueError
            raise damaged(folder, f"{INDEX} cannot be read: {str(error).splitlines()[0]}") from error
        tensors = {}
        for name, entry in sorted(found.items()):
            pieces = [Stored(file, Box(offsets, shape)) for file, offsets, shape in entry["pieces"]]
            dtype, dims = DTYPES.get(entry["dtype"]), len(entry["shape"])
            if dtype is None or any(not len(box.offsets) == len(box.shape) == dims for _, box in pieces):
                raise damaged(folder, f"{INDEX} cannot be read: the entry of {name} makes no sense")
            tensors[name] = _entry(dtype, entry["shape"], pieces)
        return cls(folder, tensors)

    def write(self) -> FileEntry:
        """Write `index.json` into the folder, and wait until it is on the disk; its size and digest.

        Raises:
            OSError: it could not be written.
        """
        lines = (f"{json.dumps(name)}: {json.dumps(_as_json(entry))}" for name, entry in self.tensors.items())
        text = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
        with (self.folder / INDEX).open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}

    def check(self) -> None:
        """Whether the pieces of every tensor cover it, each element once.

        Raises:
            CheckpointError: not so; names the tensor and the first element.
        """
        for name, entry in self.tensors.items():
            if wrong := tiles(entry.shape, (stored.box for stored in entry.pieces)):
                raise damaged(self.folder, f"the pieces of {name} {list(entry.shape)} do not tile it: {wrong}")


class _EntryFormat(TypedDict):
    dtype: str
    shape: tuple[NonNegativeInt, ...]
    pieces: list[
        tuple[
            # No way out of the folder.
            Annotated[str, StringConstraints(pattern=rf"^{STATE}/\w[\w.-]*$")],
            tuple[NonNegativeInt, ...],
            tuple[NonNegativeInt, ...],
        ]
    ]


_FORMAT = TypeAdapter(dict[str, _EntryFormat])


def _scan(folder: Path, files: Sequence[str] | None) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Stored]]:
    listed = [f"{STATE}/{path.name}" for path in (folder / STATE).glob(f"*{SUFFIX}")] if files is None else files
    for file in sorted(listed):
        try:
            for tensor, dtype, whole, box in list_file(folder / file):
                yield tensor, dtype, whole, Stored(file, box)
        except (OSError, SafetensorError, ValueError) as error:
            raise damaged(folder, f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def _entry(dtype: torch.dtype, shape: tuple[int, ...], pieces: list[Stored]) -> Entry:
    return Entry(dtype, shape, tuple(sorted(pieces, key=lambda stored: (stored.box, stored.file))))


def _as_json(entry: Entry) -> dict[str, object]:
    pieces = [[stored.file, stored.box.offsets, stored.box.shape] for stored in entry.pieces]
    return {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "pieces": pieces}
