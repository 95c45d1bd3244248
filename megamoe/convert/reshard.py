"""The same checkpoint in another number of files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megamoe.common.errors import CheckpointError
from megamoe.convert.progress import Advance, bar
from megamoe.convert.verify import verify_digests, verify_index
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.boxes import Box, boxes_of_range
from megamoe.training.checkpoint.files import SUFFIX, write_file
from megamoe.training.checkpoint.index import INDEX, STATE, Index
from megamoe.training.checkpoint.pieces import STATISTIC, WEIGHT, Piece, split_name
from megamoe.training.checkpoint.reader import Reader

_OF_RANKS = "ranks/"
"""What only the ranks of a run can go on with."""


def reshard(source: Path, output: Path, num_files: int, weights_only: bool = False) -> Path:
    """Write a checkpoint anew, bit for bit, into files of equal size.

    The source is verified first, since the copy gets digests of its own. No more than one of the new files is in memory
    at a time, and the copy is invisible until it is complete.

    Args:
        source: the checkpoint's folder.
        output: a run's folder, new or not; the copy is `checkpoints/step_...` in it.
        num_files: at least 1.
        weights_only: leave out what only training goes on with: the optimizer's state and the ranks' random streams.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: the source is damaged, `output` has a checkpoint of that step, or it cannot be written.
    """
    manifest = folders.read_manifest(source)
    final = folders.root(output) / folders.final_name(manifest.step)
    if final.exists():
        raise CheckpointError(
            f"{final} exists already", got=f"a copy of {source} into {output}", todo="choose another folder"
        )
    verify_digests(source, manifest)
    index = verify_index(source, manifest)
    index.check()
    target = folders.incomplete_path(output, manifest.step)
    try:
        shutil.rmtree(target, ignore_errors=True)
        (target / STATE).mkdir(parents=True)
        files = _write_state(Reader(source), target, _shares(index, num_files, weights_only))
        files |= _copy_rest(source, target, manifest, weights_only)
        return folders.publish(target, replace(manifest, files=files))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written",
            got=str(error),
            expected=f"room and permission to write {output}",
            todo="free some space, or choose another folder",
        ) from error
    finally:
        shutil.rmtree(target, ignore_errors=True)  # a complete one has another name by now


_Share = list[tuple[str, Box]]


def _shares(index: Index, num_files: int, weights_only: bool) -> list[_Share]:
    """The boxes that go into each file: all tensors behind each other, cut at equal numbers of bytes."""
    kept = {
        name: entry
        for name, entry in index.tensors.items()
        if not weights_only or split_name(name)[0] in (WEIGHT, STATISTIC)
    }
    total = sum(entry.nbytes for entry in kept.values())
    shares: list[_Share] = [[] for _ in range(num_files)]
    before = 0
    for name, entry in kept.items():
        if entry.nbytes == 0:
            shares[0].append((name, Box.of(entry.shape)))
            continue
        after = before + entry.nbytes
        for file in range(before * num_files // total, (after - 1) * num_files // total + 1):
            # An element goes where its first byte does.
            edges = (-(-total * number // num_files) for number in (file, file + 1))
            start, end = (-((before - min(max(edge, before), after)) // entry.dtype.itemsize) for edge in edges)
            shares[file] += [(name, box) for box, _ in boxes_of_range(entry.shape, start, end)]
        before = after
    return shares


def _write_state(reader: Reader, target: Path, shares: Sequence[_Share]) -> dict[str, folders.FileEntry]:
    files = {}
    total = sum(box.volume * reader.index.tensors[name].dtype.itemsize for share in shares for name, box in share)
    with bar("reshard", total) as advance:
        for number, share in enumerate(shares):
            file = f"{STATE}/part_{number:05d}{SUFFIX}"
            files[file] = write_file(target / file, [_piece(reader, name, box, advance) for name, box in share])
    return files | {INDEX: Index.scan(target).write()}


def _piece(reader: Reader, name: str, box: Box, advance: Advance) -> Piece:
    values = reader.read(name, box)
    advance(values.nbytes)
    return Piece(name, reader.index.tensors[name].shape, box, values)


def _copy_rest(
    source: Path, target: Path, manifest: folders.Manifest, weights_only: bool
) -> dict[str, folders.FileEntry]:
    """Copy the files that hold no tensors: configuration, tokenizer, random streams."""
    copied = {}
    for name, entry in manifest.files.items():
        if name == INDEX or name.startswith(f"{STATE}/") or (weights_only and name.startswith(_OF_RANKS)):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with (target / name).open("wb") as file:
            file.write((source / name).read_bytes())
            file.flush()
            os.fsync(file.fileno())
        copied[name] = entry
    return copied
