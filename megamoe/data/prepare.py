"""Preparing data: tokenizer, token files and manifest, complete or not there at all.

The work happens in a hidden folder beside the target, which takes the target's name at the very end.
Documents are read in a fixed order and tokenized on sentencepiece's threads, so the files do not depend on
the number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from megamoe.common.errors import DataError
from megamoe.common.log import get_logger
from megamoe.config.data import DataConfig, SourceConfig
from megamoe.data.corpus import Document, Skipped, read_documents
from megamoe.data.indexed import IndexedWriter, bin_path, idx_path
from megamoe.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    SourceManifest,
    Split,
    SplitManifest,
    check_prepared,
    load_manifest,
    pair_prefix,
    settings_of,
)
from megamoe.data.staging import exclusive, staged
from megamoe.data.tokenizer import Tokenizer, train_tokenizer

_BATCH_CHARS = 1_000_000  # text per thread and turn: large against the start of a thread, small against memory
_log = get_logger(__name__)


def prepare(config: DataConfig, progress: bool = False, overwrite: bool = False) -> Manifest:
    """Fill `config.prepared_dir`; return at once when it is already there with the same settings.

    An interrupted preparation leaves the target as it was; the next one clears up after it.

    Args:
        config: the `data` section.
        progress: show a bar on stderr.
        overwrite: replace a folder that was prepared before, whatever its settings.

    Raises:
        DataError: a source or tokenizer is unusable, the folder holds something else or was made with other
            settings, another process is preparing it, or the files cannot be written.
    """
    target = Path(config.prepared_dir).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target):
            if not overwrite and is_prepared(config):
                _log.info("%s is already prepared", target)
                return load_manifest(target)
            with staged(target, MANIFEST) as folder:
                return _fill(config, folder, progress)
    except OSError as error:
        raise DataError(
            f"{target} cannot be written.", got=str(error), todo="make room or correct data.prepared_dir"
        ) from error


def is_prepared(config: DataConfig) -> bool:
    """Whether `prepare` would return at once.

    Raises:
        DataError: the folder holds data that is damaged or was made with other settings.
    """
    if not (Path(config.prepared_dir) / MANIFEST).exists():
        return False
    check_prepared(config)
    return True


def split_position(document_id: str) -> float:
    """A number in [0, 1] that depends on nothing but the id; the lowest ones are held out for validation."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass
class _Survey:
    """What a first reading of all sources tells.

    Attributes:
        text_bytes: of all documents, for the progress bar.
        limits: per source, documents whose split position lies below it are for validation.
        lines: a uniform sample of lines with their document's source and split position.
    """

    text_bytes: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    lines: list[tuple[str, float, str]] = field(default_factory=list)

    def training_lines(self) -> Iterator[str]:
        """The sampled lines of documents that are not held out."""
        return (line for source, position, line in self.lines if position >= self.limits[source])


def _fill(config: DataConfig, folder: Path, progress: bool) -> Manifest:
    """Write everything into the empty `folder`, the manifest last."""
    survey = _survey(config)
    tokenizer = _provide_tokenizer(config, survey, folder)
    workers = config.num_workers or len(os.sched_getaffinity(0))
    with _bar(survey.text_bytes, progress) as advance:
        sources = tuple(
            _encode(source, tokenizer, survey.limits[source.name], folder, workers, advance)
            for source in config.sources
        )
    manifest = Manifest(
        format=FORMAT,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("sentencepiece", "deepspeed", "numpy")},
        settings=settings_of(config),
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        sources=sources,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, as the function that moves it on by so many bytes."""
    columns = (
        *Progress.get_default_columns()[:2],
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("tokenize", total=total)
        yield lambda amount: progress.advance(task, amount)


def _survey(config: DataConfig) -> _Survey:
    """Read everything once: sizes, the split, and (reservoir sampling) the lines for the tokenizer."""
    survey, draw, seen = _Survey(), random.Random(0), 0
    wanted = 0 if config.tokenizer.path else config.tokenizer.sample_lines
    for source in config.sources:
        lowest = 1.0
        for document in read_documents(source, Skipped()):
            position = split_position(document.id)
            lowest = min(lowest, position)
            survey.text_bytes += _num_bytes(document.text)
            if wanted:
                seen = _sample(survey.lines, wanted, seen, draw, source.name, position, document.text)
        # A small source may have no document below the fraction: then the lowest one is held out.
        survey.limits[source.name] = max(config.validation_fraction, math.nextafter(lowest, 2.0))
    return survey


def _sample(
    lines: list[tuple[str, float, str]],
    wanted: int,
    seen: int,
    draw: random.Random,
    source: str,
    position: float,
    text: str,
) -> int:
    """Offer the lines of `text` to the sample of `wanted` lines; return how many were offered so far."""
    for line in text.split("\n"):
        if not line.strip():
            continue
        seen += 1
        if len(lines) < wanted:
            lines.append((source, position, line))
        elif (slot := int(draw.random() * seen)) < wanted:
            lines[slot] = (source, position, line)
    return seen


def _provide_tokenizer(config: DataConfig, survey: _Survey, folder: Path) -> Tokenizer:
    path, wanted = folder / TOKENIZER, config.tokenizer
    if wanted.path is None:
        path.write_bytes(train_tokenizer(survey.training_lines(), wanted.vocab_size))
    else:
        Tokenizer(wanted.path)  # refuses a missing or damaged one by its own name
        shutil.copyfile(wanted.path, path)
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size != wanted.vocab_size:
        raise DataError(
            f"Tokenizer {wanted.path or path} has another vocabulary.",
            got=f"{tokenizer.vocab_size} token ids",
            expected=f"data.tokenizer.vocab_size={wanted.vocab_size}",
            todo=f"set data.tokenizer.vocab_size={tokenizer.vocab_size}, or name another tokenizer",
        )
    return tokenizer


def _encode(
    source: SourceConfig,
    tokenizer: Tokenizer,
    limit: float,
    folder: Path,
    workers: int,
    advance: Callable[[int], None],
) -> SourceManifest:
    """Write both splits of one source."""
    (folder / source.name).mkdir()
    writers = {s: IndexedWriter(pair_prefix(folder, source.name, s), tokenizer.vocab_size) for s in SPLITS}
    text_bytes, skipped = dict.fromkeys(SPLITS, 0), Skipped()
    for batch in _batches(read_documents(source, skipped), workers * _BATCH_CHARS):
        encoded = tokenizer.encode_batch([document.text for document in batch], workers)
        for document, ids in zip(batch, encoded, strict=True):
            split: Split = "validation" if split_position(document.id) < limit else "train"
            writers[split].add([*ids, tokenizer.eod_id])
            num_bytes = _num_bytes(document.text)
            text_bytes[split] += num_bytes
            advance(num_bytes)
    splits = {split: _close(source, split, writers[split], text_bytes[split]) for split in SPLITS}
    return SourceManifest(
        name=source.name,
        train=splits["train"],
        validation=splits["validation"],
        empty=skipped.empty,
        unreadable=skipped.unreadable,
        unreadable_examples=tuple(skipped.examples),
    )


def _close(source: SourceConfig, split: Split, writer: IndexedWriter, text_bytes: int) -> SplitManifest:
    writer.close()
    if not writer.documents:
        raise DataError(
            f"Source '{source.name}' has no document for the {split} split.",
            expected="at least two documents, of which some are held out and some are not",
            todo="cut the text into more files or JSONL lines, or change data.validation_fraction",
        )
    return SplitManifest(
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=text_bytes,
        bin_bytes=bin_path(writer.prefix).stat().st_size,
        idx_bytes=idx_path(writer.prefix).stat().st_size,
    )


def _batches(documents: Iterable[Document], chars: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= chars:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
