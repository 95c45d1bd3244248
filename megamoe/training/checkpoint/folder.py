"""Checkpoint folders: names, the manifest that makes one complete, verification, retention.

    <output_dir>/checkpoints/step_00000100/
        manifest.json     written last; lists every other file with size and digest
        index.json        every tensor with its shape, and in which files its pieces are
        config.json       the run's configuration
        tokenizer.model
        state/            weights, the optimizer's state and running statistics: pieces of whole tensors, by global name
        ranks/            random streams of each rank

Tensors are in safetensors files, everything else is JSON: reading a checkpoint runs no code of whoever wrote it.

A checkpoint is written under a name that starts with a dot and renamed once its manifest is on the disk. One that is to
go is renamed before its files are deleted, so what has the name of a checkpoint is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from megamoe.common.errors import CheckpointError, DamagedCheckpointError
from megamoe.training.state import TrainState

FORMAT: Literal[2] = 2
MANIFEST = "manifest.json"
_PREFIX, _INCOMPLETE, _REPLACED, _DELETED = "step_", ".incomplete-", ".replaced-", ".deleted-"
_NAME = re.compile(rf"{_PREFIX}(\d+)")
_WENT_BACK = "went_back_to"
_CHUNK_BYTES = 16 * 2**20


class FileEntry(TypedDict):
    """What a file held when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    state: TrainState
    architecture: dict[str, Any]
    topology: dict[str, Any]
    """The layout that wrote it; any other can read it."""
    tokenizer_digest: str
    files: dict[Annotated[str, StringConstraints(pattern=r"^((state|ranks)/)?\w[\w.-]*$")], FileEntry]
    """By path relative to the checkpoint's folder, out of which none leads."""
    format: Literal[2] = FORMAT

    @property
    def step(self) -> int:
        """Steps of the run."""
        return self.state.step


def root(output_dir: str | Path) -> Path:
    """Folder of all checkpoints of a run."""
    return Path(output_dir) / "checkpoints"


def final_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"{_PREFIX}{step:08d}"


def incomplete_path(output_dir: str | Path, step: int, writer: str = "") -> Path:
    """Where the checkpoint is written.

    Args:
        writer: something of the process's own, so that one that was thought dead does not write into another's.
    """
    return root(output_dir) / f"{_INCOMPLETE}{final_name(step)}{writer and '-'}{writer}"


def final_name_of(incomplete: Path) -> str:
    """The name that the checkpoint is to have."""
    found = _NAME.search(incomplete.name)
    return found[0] if found else incomplete.name


def complete(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first. Others are invisible."""
    folders = [p for p in root(output_dir).glob(f"{_PREFIX}*") if step_of(p) is not None and (p / MANIFEST).is_file()]
    return sorted(folders, key=lambda p: step_of(p) or 0)


def locate(path: str | Path) -> Path:
    """The checkpoint that a path means: a checkpoint's folder itself, or the newest complete one of a run's folder.

    Raises:
        CheckpointError: the run has none.
    """
    folder = Path(path)
    if (folder / MANIFEST).exists() or not root(folder).is_dir():
        return folder
    found = complete(folder)
    if not found:
        raise CheckpointError(
            f"there is no complete checkpoint in {root(folder)}",
            got="an empty or interrupted run",
            expected="at least one folder step_... with a manifest.json",
            todo="train first: deepspeed launch/pretrain.py --config configs/tiny.yaml",
        )
    return found[-1]


def clear_incomplete(output_dir: str | Path) -> None:
    """Remove what interrupted saves and deletions left behind."""
    recover(output_dir)
    for prefix in (_INCOMPLETE, _DELETED, _REPLACED):
        for folder in root(output_dir).glob(f"{prefix}*"):
            shutil.rmtree(folder, ignore_errors=True)


def recover(output_dir: str | Path) -> None:
    """Give back its name to a checkpoint that was being replaced when the process died, before the new one had it."""
    for folder in root(output_dir).glob(f"{_REPLACED}*"):
        final = folder.with_name(folder.name.removeprefix(_REPLACED))
        if not final.exists():
            folder.rename(final)


def digests(folder: Path, but: Container[str] = ()) -> dict[str, FileEntry]:
    """Size and digest of every file below `folder` but those that are known already."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    names = (str(p.relative_to(folder)) for p in files)
    return {name: describe(folder / name) for name in names if name not in but}


def publish(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest and give the folder its final name. Replaces a checkpoint of the same step."""
    path = folder / MANIFEST
    with path.open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    final = folder.with_name(final_name(manifest.step))
    replaced = folder.with_name(f"{_REPLACED}{final.name}")
    for inner in {path.parent for path in folder.rglob("*")}:
        _sync(inner)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    folder.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def retain(output_dir: str | Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints and those whose step is a multiple of `keep_every` (0: none).

    Raises:
        OSError: one cannot be renamed.
    """
    for folder in complete(output_dir)[:-keep]:
        if keep_every == 0 or (step_of(folder) or 0) % keep_every:
            going = folder.with_name(f"{_DELETED}{folder.name}")
            shutil.rmtree(going, ignore_errors=True)
            folder.rename(going)
            shutil.rmtree(going, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        manifest = _parse(folder)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint",
            got="no manifest.json in it" if folder.exists() else "no such folder",
            expected="a folder such as <output_dir>/checkpoints/step_00000100",
            todo="correct the path",
        ) from error
    except ValidationError as error:
        _check_format(folder)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(folder, f"manifest.json cannot be read: {where} {first['msg']}") from error
    except OSError as error:
        raise damaged(folder, f"manifest.json cannot be read: {error}") from error
    return manifest


def _check_format(folder: Path) -> None:
    """Whether a manifest that does not fit is one of this version at all."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes()).get("format")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(found, int) and found != FORMAT:
        raise CheckpointError(
            f"{folder} has another format",
            got=f"format {found}",
            expected=f"format {FORMAT}",
            todo="use the version of megamoe that wrote it",
        )


def verify(
    folder: Path, manifest: Manifest, share: int = 0, shares: int = 1, progress: Callable[[], None] = lambda: None
) -> None:
    """Compare files with the manifest: all sizes, and the digests of one share of the files.

    Raises:
        DamagedCheckpointError: a file is missing or differs; names the previous complete checkpoint.
        CheckpointError: a file cannot be read, which may be this machine's fault and not the file's.
    """
    try:
        _verify(folder, manifest, share, shares, progress)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {folder} cannot be read",
            got=str(error),
            expected=f"a file system that {socket.gethostname()} can read",
            todo="look at this machine's mount of it and start again; or name an older checkpoint as "
            "training.checkpoint.resume",
        ) from error


def _verify(folder: Path, manifest: Manifest, share: int, shares: int, progress: Callable[[], None]) -> None:
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise damaged(folder, f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}")
    for name in sorted(manifest.files)[share::shares]:
        if describe(folder / name, progress) != manifest.files[name]:
            raise damaged(folder, f"the content of {name} does not match its digest")


def set_aside(folder: Path) -> None:
    """Give a damaged checkpoint a name that is no checkpoint's, for a person to look at."""
    _rename_away(folder, "damaged")


def _rename_away(folder: Path, why: str) -> None:
    aside = folder.with_name(f"{why}_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def went_back_to(output_dir: str | Path) -> str | None:
    """The name of the checkpoint that the run was last told to go back to, if it has gone on from there."""
    path = root(output_dir) / _WENT_BACK
    return path.read_text().strip() if path.is_file() else None


def go_back(output_dir: str | Path, checkpoint: Path | None) -> None:
    """Make a checkpoint of this run its newest: later ones are given names that are no checkpoint's. None: the run goes
    on from its newest, so nothing is to be remembered.

    That it went back is remembered, so that the same command again, as a batch system gives it, goes on from what was
    saved since and does not go back once more.
    """
    marker = root(output_dir) / _WENT_BACK
    if checkpoint is None:
        marker.unlink(missing_ok=True)
        return
    for folder in complete(output_dir):
        if (step_of(folder) or 0) > (step_of(checkpoint) or 0):
            _rename_away(folder, "abandoned")
    partial = marker.with_name(f".{_WENT_BACK}")
    partial.write_text(checkpoint.name)
    partial.replace(marker)


def damaged(folder: Path, what: str) -> DamagedCheckpointError:
    """The error for a damaged checkpoint, with the way back to the previous one."""
    step = step_of(folder)
    before = [p for p in complete(folder.parent.parent) if step is not None and (step_of(p) or 0) < step]
    sound = next((p for p in reversed(before) if _all_there(p)), None)
    todo = (
        f"go on from the previous complete one: training.checkpoint.resume={sound} (evaluate, generate: --checkpoint)"
        if sound
        else "there is no older checkpoint that is complete; move this one away to start again"
    )
    return DamagedCheckpointError(f"checkpoint {folder} is damaged", got=what, expected="files as written", todo=todo)


def step_of(folder: Path) -> int | None:
    """The step in a folder's name; None where a person gave it another name, to set it aside."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def _all_there(folder: Path) -> bool:
    """Whether the manifest can be read and every file has its size."""
    try:
        files = _parse(folder).files
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValidationError):
        return False


def _parse(folder: Path) -> Manifest:
    return TypeAdapter(Manifest).validate_json((folder / MANIFEST).read_bytes(), strict=True)


def describe(path: Path, progress: Callable[[], None] = lambda: None) -> FileEntry:
    """Size and digest of a file; `progress` is called again and again while it is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress()
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
