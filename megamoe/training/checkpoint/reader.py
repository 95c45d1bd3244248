"""Reading boxes of a checkpoint's tensors, whatever pieces they are stored in."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamoe.common.errors import CheckpointError
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.files import DTYPES, entry_name
from megamoe.training.checkpoint.folder import damaged
from megamoe.training.checkpoint.index import Entry, Index, Stored
from megamoe.training.checkpoint.pieces import split_name

_MAX_OPEN = 4096
"""Mapped at once. A checkpoint of ZeRO-3 has a piece of every tensor in every file."""


class Reader:
    """The tensors of a checkpoint whose files were verified.

    Files are mapped when they are first needed, and of every piece only what is asked for is read.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: its index is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = Index.read(folder)
        self._open: OrderedDict[str, Any] = OrderedDict()

    def has(self, tensor: str) -> bool:
        """Whether there is such a tensor, as in `weight/embedding.weight`."""
        return tensor in self.index.tensors

    def dtype(self, tensor: str) -> torch.dtype:
        """In which it was saved.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._entry(tensor).dtype

    def names(self, kind: str) -> list[str]:
        """The parameters or buffers that have a tensor of this kind, by their own names (without the kind)."""
        return [name for tensor in self.index.tensors for its, name in [split_name(tensor)] if its == kind]

    def read(self, tensor: str, box: Box | None = None) -> Tensor:
        """A box of a tensor (default: all of it) on the CPU, in the dtype in which it was saved.

        Raises:
            CheckpointError: there is no such tensor or no such box in it, or a file is damaged.
        """
        entry = self._entry(tensor)
        box = Box.of(entry.shape) if box is None else box
        out = torch.empty(box.shape, dtype=entry.dtype)
        self.read_into(tensor, box, out)
        return out

    @torch.no_grad()
    def read_into(self, tensor: str, box: Box, out: Tensor) -> None:
        """Copy a box of a tensor.

        Args:
            out: of the box's shape, on any device; of the dtype in which the tensor was saved, or of a wider one where
                both are floating-point.

        Raises:
            CheckpointError: there is no such tensor or no such box in it, or a file is damaged.
            ValueError: `out` is not as said above.
        """
        entry = self._entry(tensor)
        self._check_request(tensor, entry, box, out)
        missing = box.volume
        for stored in _candidates(entry, box):
            if common := stored.box.intersect(box):
                values = self._values(tensor, entry, stored, common)
                out[common.slices(box.offsets)].copy_(values)
                missing -= common.volume
        if missing:
            raise damaged(self.folder, f"the pieces of {tensor} do not tile it: {missing} elements of {box}")

    def close(self) -> None:
        """Let go of the files; they are opened again when they are needed."""
        self._open.clear()

    def _entry(self, tensor: str) -> Entry:
        if tensor not in self.index.tensors:
            kinds = sorted({split_name(other)[0] for other in self.index.tensors})
            raise CheckpointError(
                f"checkpoint {self.folder} does not hold {tensor}",
                got=f"tensors of the kinds {', '.join(kinds)}",
                todo=f"see what it holds: python -m megamoe convert inspect {self.folder}",
            )
        return self.index.tensors[tensor]

    def _check_request(self, tensor: str, entry: Entry, box: Box, out: Tensor) -> None:
        if len(box.shape) != len(entry.shape) or not box.inside(Box.of(entry.shape)):
            raise CheckpointError(
                f"checkpoint {self.folder} is of another architecture",
                got=f"{tensor} of shape {list(entry.shape)}",
                expected=f"one that has the elements {list(box.offsets)} to {list(box.end)}",
            )
        if tuple(out.shape) != box.shape or not _takes(out.dtype, entry.dtype):
            raise ValueError(f"{tensor}: {box} of {entry.dtype} does not go into {out.shape} of {out.dtype}")

    def _values(self, tensor: str, entry: Entry, stored: Stored, box: Box) -> Tensor:
        """Part of a piece, as a view of the mapped file."""
        try:
            piece = self._file(stored.file).get_slice(entry_name(tensor, entry.shape, stored.box))
            found = DTYPES.get(piece.get_dtype()), tuple(piece.get_shape())
            if found != (entry.dtype, stored.box.shape):
                raise ValueError(f"{tensor} has {found} there, expected {entry.dtype}, {stored.box.shape}")
            values: Tensor = piece[box.slices(stored.box.offsets)]
        except (OSError, SafetensorError, ValueError) as error:
            raise damaged(self.folder, f"{stored.file} cannot be read: {str(error).splitlines()[0]}") from error
        return values

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]


def _candidates(entry: Entry, box: Box) -> tuple[Stored, ...]:
    """The pieces that do not begin behind the box in the first dim; they are in order of their offsets."""
    if not box.shape:
        return entry.pieces
    return entry.pieces[: bisect_left(entry.pieces, box.end[0], key=lambda stored: stored.box.offsets[0])]


def _takes(wanted: torch.dtype, saved: torch.dtype) -> bool:
    both = wanted.is_floating_point and saved.is_floating_point
    return wanted == saved or (both and torch.promote_types(wanted, saved) == wanted)
