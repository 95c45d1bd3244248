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
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamoe.common.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_PREFIX, _INCOMPLETE = "step_", ".incomplete-"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    architecture: dict[str, Any]
    topology: dict[str, Any]
    tokenizer_digest: str
    files: dict[str, dict[str, Any]]
    """Relative path to {"bytes": size, "sha256": digest}."""
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
    folders = [p for p in root(output_dir).glob(f"{_PREFIX}*") if (p / MANIFEST).is_file()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def clear_incomplete(output_dir: str | Path) -> None:
    """Remove what interrupted saves left behind."""
    for folder in root(output_dir).glob(f"{_INCOMPLETE}*"):
        shutil.rmtree(folder, ignore_errors=True)


def digests(folder: Path, share: int = 0, shares: int = 1) -> dict[str, dict[str, Any]]:
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
        step = int(folder.name.removeprefix(_PREFIX))
        if keep_every == 0 or step % keep_every:
            shutil.rmtree(folder, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text())
        manifest = Manifest(**values)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint",
            got="no manifest.json in it" if folder.exists() else "no such folder",
            expected="a folder such as <output_dir>/checkpoints/step_00000100",
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise damaged(folder, f"manifest.json cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{folder} has another format", got=str(manifest.format), expected=str(FORMAT))
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
    before = [p for p in complete(folder.parent.parent) if p.name < folder.name]
    todo = (
        f"resume from the previous complete one: training.checkpoint.resume={before[-1]}"
        if before
        else ("there is no older checkpoint; move this one away to start again")
    )
    return CheckpointError(f"checkpoint {folder} is damaged", got=what, expected="files as written", todo=todo)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
