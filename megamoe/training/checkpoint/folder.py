"""Checkpoint folders: names, the manifest that makes one complete, verification, retention.

    <output_dir>/checkpoints/step_00000100/
        manifest.json     written last; lists every other file with size and digest
        config.json       the run's configuration
        tokenizer.model
        weights/          parameters and running statistics in fp32, by global name, independent of the layout
        engine/           DeepSpeed's own files: weights and optimizer state, for the same layout only
        ranks/            random streams of each rank

A checkpoint is written under a name that starts with a dot and renamed once its manifest is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from megamoe.common.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_PREFIX, _INCOMPLETE = "step_", ".incomplete-"
_NAME = re.compile(rf"{_PREFIX}(\d+)")


class FileEntry(TypedDict):
    """What a file held when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    architecture: dict[str, Any]
    topology: dict[str, Any]
    tokenizer_digest: str
    files: dict[str, FileEntry]
    """By path relative to the checkpoint's folder."""
    format: int = FORMAT


def root(output_dir: str | Path) -> Path:
    """Folder of all checkpoints of a run."""
    return Path(output_dir) / "checkpoints"


def final_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"{_PREFIX}{step:08d}"


def incomplete_path(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint is written."""
    return root(output_dir) / f"{_INCOMPLETE}{final_name(step)}"


def complete(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first. Others are invisible."""
    folders = [p for p in root(output_dir).glob(f"{_PREFIX}*") if _step_of(p) is not None and (p / MANIFEST).is_file()]
    return sorted(folders, key=lambda p: _step_of(p) or 0)


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
    """Remove what interrupted saves left behind."""
    for folder in root(output_dir).glob(f"{_INCOMPLETE}*"):
        shutil.rmtree(folder, ignore_errors=True)


def digests(folder: Path, share: int = 0, shares: int = 1) -> dict[str, FileEntry]:
    """Size and digest of every file below `folder`, or of one share of them (for several ranks side by side)."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): _describe(p) for p in files[share::shares]}


def publish(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest and give the folder its final name. Replaces a checkpoint of the same step."""
    path = folder / MANIFEST
    with path.open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    final = folder.with_name(final_name(manifest.step))
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    return final


def retain(output_dir: str | Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints and those whose step is a multiple of `keep_every` (0: none)."""
    for folder in complete(output_dir)[:-keep]:
        if keep_every == 0 or (_step_of(folder) or 0) % keep_every:
            shutil.rmtree(folder, ignore_errors=True)


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
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(folder, f"manifest.json cannot be read: {where} {first['msg']}") from error
    except OSError as error:
        raise damaged(folder, f"manifest.json cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{folder} has another format",
            got=f"format {manifest.format}",
            expected=f"format {FORMAT}",
            todo="use the version of megamoe that wrote it",
        )
    return manifest


def verify(folder: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> None:
    """Compare files with the manifest: all sizes, and the digests of one share of the files.

    Raises:
        CheckpointError: a file is missing or differs; names the previous complete checkpoint.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise damaged(folder, f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}")
    for name in sorted(manifest.files)[share::shares]:
        if _describe(folder / name) != manifest.files[name]:
            raise damaged(folder, f"the content of {name} does not match its digest")


def damaged(folder: Path, what: str) -> CheckpointError:
    """The error for a damaged checkpoint, with the way back to the previous one."""
    step = _step_of(folder)
    before = [p for p in complete(folder.parent.parent) if step is not None and (_step_of(p) or 0) < step]
    sound = next((p for p in reversed(before) if _all_there(p)), None)
    todo = (
        f"go on from the previous complete one: training.checkpoint.resume={sound} (evaluate, generate: --checkpoint)"
        if sound
        else "there is no older checkpoint that is complete; move this one away to start again"
    )
    return CheckpointError(f"checkpoint {folder} is damaged", got=what, expected="files as written", todo=todo)


def _step_of(folder: Path) -> int | None:
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


def _describe(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
