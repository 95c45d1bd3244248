"""Is a checkpoint whole, consistent and finite?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megamoe.common.errors import CheckpointError
from megamoe.convert.progress import bar
from megamoe.convert.statistics import nonfinite, parts
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.index import INDEX, Entry, Index
from megamoe.training.checkpoint.reader import Reader


def verify(folder: Path) -> Index:
    """Check everything that can be checked of a checkpoint by itself; returns what it holds.

    In this order: every file that the manifest lists is there with its digest; the index says what the files' headers
    say, and the manifest lists these files; the pieces of every tensor cover each element once; every value is finite.

    Raises:
        CheckpointError: names the first thing that is wrong.
    """
    manifest = folders.read_manifest(folder)
    verify_digests(folder, manifest)
    index = verify_index(folder, manifest)
    index.check()
    verify_values(folder)
    return index


def verify_digests(folder: Path, manifest: folders.Manifest) -> None:
    """Compare size and digest of every file.

    Raises:
        CheckpointError: one is missing or differs.
    """
    with bar("digests", sum(entry["bytes"] for entry in manifest.files.values())) as advance:
        for name, entry in sorted(manifest.files.items()):
            folders.verify(folder, replace(manifest, files={name: entry}))
            advance(entry["bytes"])


def verify_index(folder: Path, manifest: folders.Manifest) -> Index:
    """Compare the index with the headers of the files; returns it.

    Raises:
        CheckpointError: they differ, or the manifest does not list one of the files.
    """
    index, found = Index.read(folder), Index.scan(folder)
    for name in sorted(index.tensors.keys() | found.tensors.keys()):
        listed, stored = index.tensors.get(name), found.tensors.get(name)
        if listed != stored:
            what = f"{INDEX} lists {name} as {_describe(listed)}, the files hold {_describe(stored)}"
            raise folders.damaged(folder, what)
    files = {stored.file for entry in index.tensors.values() for stored in entry.pieces}
    for name in sorted({INDEX, *files} - manifest.files.keys()):
        raise folders.damaged(folder, f"the manifest does not list {name}, so nothing vouches for its content")
    return index


def verify_values(folder: Path) -> None:
    """Look at every value.

    Raises:
        CheckpointError: one is NaN or infinite.
    """
    reader = Reader(folder)
    with bar("values", sum(entry.nbytes for entry in reader.index.tensors.values())) as advance:
        for name in reader.index.tensors:
            for box, values in parts(reader, name):
                if count := nonfinite(values):
                    raise CheckpointError(
                        f"checkpoint {folder} holds values that are not finite",
                        got=f"{count} of {values.numel()} values of {name} from {list(box.offsets)} on",
                        expected="finite values",
                        todo="go on from a checkpoint before that, and see what its steps do to the loss",
                    )
                advance(values.nbytes)


def _describe(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)} in {len(entry.pieces)} pieces"
