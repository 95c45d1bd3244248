"""The manifest of a prepared folder: what it was made from, what it holds, and whether that is still true."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Strict, ValidationError

from megamoe.common.errors import DataError
from megamoe.config.base import Section
from megamoe.config.data import DataConfig
from megamoe.data.indexed import PREPARE_COMMAND, bin_path, idx_path

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)

_OVERWRITE = f"{PREPARE_COMMAND} --overwrite"
Setting = str | int | float | None


class SplitManifest(Section):
    """One .bin/.idx pair."""

    documents: int
    tokens: int
    text_bytes: int
    bin_bytes: int
    idx_bytes: int


class SourceManifest(Section):
    """Both splits of a source, and what was left out of it (see `corpus.Skipped`)."""

    name: str
    train: SplitManifest
    validation: SplitManifest
    empty: int
    unreadable: int
    unreadable_examples: Annotated[tuple[str, ...], Strict(False)]

    def split(self, split: Split) -> SplitManifest:
        """The counts of one split."""
        return self.train if split == "train" else self.validation


class Manifest(Section):
    """Everything known about a prepared folder; written last, so a folder that has it is complete.

    Attributes:
        format: version of this file and of the folder's layout.
        versions: of Python and the libraries that made the files.
        settings: the fields of `data` that decide the files' content, see `settings_of`.
        tokenizer_digest: sha256 of tokenizer.model.
        vocab_size: number of token ids.
        eod_id: the id that ends every document.
        sources: in the order of `data.sources`.
    """

    format: int
    versions: dict[str, str]
    settings: dict[str, Setting]
    tokenizer_digest: str
    vocab_size: int
    eod_id: int
    sources: Annotated[tuple[SourceManifest, ...], Strict(False)]

    def source(self, name: str) -> SourceManifest:
        """The source called `name`.

        Raises:
            DataError: there is none.
        """
        for source in self.sources:
            if source.name == name:
                return source
        known = ", ".join(source.name for source in self.sources)
        raise DataError(f"No source is called '{name}'.", expected=f"one of: {known}")


def pair_prefix(prepared_dir: str | Path, source: str, split: Split) -> Path:
    """Path of a source's .bin/.idx pair without the endings."""
    return Path(prepared_dir) / source / split


def settings_of(config: DataConfig) -> dict[str, Setting]:
    """The fields that decide the content of the prepared files, by path.

    Weights and sequence length are not among them: they only decide how the files are read.
    """
    settings: dict[str, Setting] = {
        "data.validation_fraction": config.validation_fraction,
        "data.tokenizer.path": config.tokenizer.path,
        "data.tokenizer.vocab_size": config.tokenizer.vocab_size,
        "data.tokenizer.sample_lines": config.tokenizer.sample_lines,
    }
    for source in config.sources:
        settings[f"data.sources[{source.name}].path"] = source.path
        settings[f"data.sources[{source.name}].text_key"] = source.text_key
    return settings


def load_manifest(prepared_dir: str | Path) -> Manifest:
    """Read the manifest of a folder and compare it with the files beside it.

    Raises:
        DataError: it is missing or damaged, or a file is missing or has another size or content than it says.
    """
    folder = Path(prepared_dir)
    manifest = _read(folder)
    digest = manifest.tokenizer_digest
    tokenizer = folder / TOKENIZER
    found = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else "no file"
    if found != digest:
        raise DataError(
            f"{tokenizer} is not the tokenizer that the data was made with.",
            got=f"sha256 {found}",
            expected=f"sha256 {digest}",
            todo=f"restore the file, or prepare the data again: {_OVERWRITE}",
        )
    for source in manifest.sources:
        for split in SPLITS:
            _check_pair(pair_prefix(folder, source.name, split), source.split(split))
    return manifest


def check_prepared(config: DataConfig) -> Manifest:
    """The manifest of `config.prepared_dir`, after checking that it was made with these settings.

    Raises:
        DataError: as `load_manifest`, and when settings (the vocabulary is one) differ, naming each one.
    """
    manifest = load_manifest(config.prepared_dir)
    wanted, made = settings_of(config), manifest.settings
    differing = [key for key in sorted(wanted.keys() | made.keys()) if wanted.get(key) != made.get(key)]
    if differing:
        raise DataError(
            f"{config.prepared_dir} was prepared with other settings.",
            got=", ".join(f"{key}={made.get(key, 'absent')}" for key in differing),
            expected=", ".join(f"{key}={wanted.get(key, 'absent')}" for key in differing),
            todo=f"name another data.prepared_dir, or replace this one: {_OVERWRITE}",
        )
    _check_tokenizer(config, manifest)
    return manifest


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{folder} holds no prepared data.",
            got=f"{path}: {error.strerror}",
            expected="a folder that was prepared completely",
            todo=f"prepare it: {PREPARE_COMMAND}",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path} is damaged.",
            got=f"{where} {first['msg']}",
            todo=f"prepare it again: {_OVERWRITE}",
        ) from error
    if manifest.format != FORMAT:
        raise DataError(
            f"{path} has another format.",
            got=f"format {manifest.format}",
            expected=f"format {FORMAT}",
            todo=f"prepare it again: {_OVERWRITE}",
        )
    return manifest


def _check_pair(prefix: Path, expected: SplitManifest) -> None:
    for path, size in ((bin_path(prefix), expected.bin_bytes), (idx_path(prefix), expected.idx_bytes)):
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise DataError(
                f"Token file {path} is missing." if found is None else f"Token file {path} is truncated or damaged.",
                got="no file" if found is None else f"{found} bytes",
                expected=f"{size} bytes",
                todo=f"restore the file, or prepare the data again: {_OVERWRITE}",
            )


def _check_tokenizer(config: DataConfig, manifest: Manifest) -> None:
    own = Path(config.tokenizer.path) if config.tokenizer.path else None
    if own is None or not own.is_file():
        return  # prepared_dir has its own copy
    found = hashlib.sha256(own.read_bytes()).hexdigest()
    if found != manifest.tokenizer_digest:
        raise DataError(
            f"{config.prepared_dir} was made with another tokenizer than {own}.",
            got=f"sha256 {found}",
            expected=f"sha256 {manifest.tokenizer_digest}",
            todo=f"restore it, or prepare the data again: {_OVERWRITE}",
        )
