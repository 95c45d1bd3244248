"""Prepared conversations in a folder of the run: written by one rank, memory-mapped by all."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from megamoe.common.errors import DataError
from megamoe.common.log import get_logger
from megamoe.config.base import Section
from megamoe.config.finetune import FinetuneConfig
from megamoe.data.conversations import conversation_files
from megamoe.data.packing import Rows
from megamoe.data.sft import SFTData, SFTSummary
from megamoe.data.staging import exclusive, staged
from megamoe.data.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "sft.json"
# Settings that do not change what is prepared; the sources' files count by their content, not by their place.
_NOT_PREPARED: dict[str, Any] = {"checkpoint": True, "epochs": True, "sources": {"__all__": {"path", "validation"}}}
_PLAIN = ("tokens", "learnt", "ends", "answer_tokens", "sources")
_ROWS = ("train_members", "train_ends", "validation_members", "validation_ends")
_log = get_logger(__name__)


class SFTManifest(Section):
    """What a folder was made from, and what it holds; written last.

    Attributes:
        made_from: everything that decides the content, by name; see `ingredients`.
        seq_length: S.
        eod_id: the end-of-document id.
        files: bytes of each array's file.
        summary: what became of the sources.
    """

    made_from: dict[str, str]
    seq_length: int
    eod_id: int
    files: dict[str, int]
    summary: SFTSummary


def ingredients(config: FinetuneConfig, tokenizer: Tokenizer, seq_length: int, seed: int) -> dict[str, str]:
    """Everything that decides what is prepared: settings, tokenizer, and the content of the sources' files.

    Raises:
        DataError: a source is missing.
        OSError: a file cannot be read.
    """
    made_from = {
        "format": str(FORMAT),
        "finetune": config.model_dump_json(exclude=_NOT_PREPARED),
        "data.seq_length": str(seq_length),
        "training.seed": str(seed),
        "tokenizer": tokenizer.digest,
    }
    for source in config.sources:
        for kind, path in (("path", source.path), ("validation", source.validation)):
            for name, file in conversation_files(path) if path is not None else []:
                made_from[f"{source.name}.{kind}/{name}"] = _digest(file)
    return made_from


def prepare_sft(
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    seq_length: int,
    seed: int,
    folder: str | Path,
    *,
    progress: bool = False,
    under_way: bool = False,
) -> SFTSummary:
    """Fill `folder`, on one rank; return at once when it was made from the same, replace it when from something else.

    Args:
        config: the section `finetune`.
        tokenizer: the model's.
        seq_length: S.
        seed: of the run.
        folder: of this run alone; its parents are made.
        progress: show a bar on stderr.
        under_way: the run has learnt from these already, so they may not change any more.

    Raises:
        DataError: see `tokenize_sources`; something has changed in a run under way; or the folder is damaged, holds
            something else, is being prepared by another process or cannot be written.
    """
    target = Path(folder).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target):
            made_from = ingredients(config, tokenizer, seq_length, seed)
            if _is_current(target, made_from, under_way):
                _log.info("%s is already prepared", target)
                return open_sft(target).summary
            with staged(target, MANIFEST) as partial:
                data = SFTData.build(config, tokenizer, seq_length, seed, progress)
                _save(data, partial, made_from)
            return data.summary
    except OSError as error:
        raise DataError(
            f"{target} cannot be prepared.",
            got=str(error),
            expected="sources that can be read, and a folder that can be written",
            todo="correct finetune.sources or training.output_dir, or make room",
        ) from error


def open_sft(folder: str | Path) -> SFTData:
    """What `prepare_sft` wrote, memory-mapped.

    Raises:
        DataError: there is nothing, or it is damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    arrays = {name: _load(folder, name, manifest.files.get(name, 0)) for name in (*_PLAIN, *_ROWS)}
    return SFTData(
        **{name: arrays[name] for name in _PLAIN},
        train=Rows(arrays["train_members"], arrays["train_ends"]),
        validation=Rows(arrays["validation_members"], arrays["validation_ends"]),
        seq_length=manifest.seq_length,
        eod_id=manifest.eod_id,
        summary=manifest.summary,
    )


def _is_current(target: Path, made_from: dict[str, str], under_way: bool) -> bool:
    if not (target / MANIFEST).is_file():
        return False
    before = _read_manifest(target).made_from
    changed = sorted(key for key in before.keys() | made_from.keys() if before.get(key) != made_from.get(key))
    if changed and under_way:
        raise DataError(
            "The conversations are not those that this run has learnt from so far.",
            got=f"changed since it began: {', '.join(changed)}",
            expected="the same files and settings, so that it goes on with the samples that come next",
            todo="restore them, or start a new run: choose another training.output_dir",
        )
    if changed:
        _log.info("%s is prepared again, because these have changed: %s", target, ", ".join(changed))
    return not changed


def _save(data: SFTData, folder: Path, made_from: dict[str, str]) -> None:
    files = {}
    for name, array in _arrays(data).items():
        np.save(_array_path(folder, name), array)
        files[name] = _array_path(folder, name).stat().st_size
    manifest = SFTManifest(
        made_from=made_from, seq_length=data.seq_length, eod_id=data.eod_id, files=files, summary=data.summary
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _arrays(data: SFTData) -> dict[str, npt.NDArray[Any]]:
    rows = (*data.train, *data.validation)
    return {name: getattr(data, name) for name in _PLAIN} | dict(zip(_ROWS, rows, strict=True))


def _read_manifest(folder: Path) -> SFTManifest:
    path = folder / MANIFEST
    try:
        return SFTManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _damaged(folder, f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(folder, f"{path}: {'.'.join(map(str, first['loc']))} {first['msg']}") from error


def _load(folder: Path, name: str, size: int) -> npt.NDArray[Any]:
    """One array, memory-mapped."""
    path = _array_path(folder, name)
    try:
        if path.stat().st_size != size:
            raise _damaged(folder, f"{path}: {path.stat().st_size} bytes instead of {size}")
        return np.asarray(np.load(path, mmap_mode="r"))  # a plain view, since slices of a memmap cost ten times as much
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{path}: {error}") from error


def _array_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(folder: Path, got: str) -> DataError:
    return DataError(
        f"{folder} does not hold the complete conversations of a run.",
        got=got,
        todo="remove the folder; it is made again from finetune.sources when the run starts",
    )
