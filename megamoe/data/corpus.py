"""Reading a source: the same documents in the same order on every machine that has the same files."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megamoe.common.errors import DataError
from megamoe.config.data import SourceConfig

STDLIB = "stdlib"
_NOT_STDLIB = {"site-packages", "dist-packages"}
_MAX_EXAMPLES = 5


class Document(NamedTuple):
    """One document; `id` is its path below the source (JSONL: and `:line`), the same on every machine."""

    id: str
    text: str


@dataclass
class Skipped:
    """What a source holds but no document was made of.

    Attributes:
        empty: files or JSONL lines with an empty text.
        unreadable: files that cannot be opened or are not UTF-8, JSONL texts that UTF-8 cannot hold.
        examples: the first few unreadable ones, with the reason.
    """

    empty: int = 0
    unreadable: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, document_id: str, reason: str) -> None:
        """Count one unreadable document."""
        self.unreadable += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{document_id}: {reason}")


def list_files(source: SourceConfig) -> list[tuple[str, Path]]:
    """The files of a source as (id, path), ordered by id.

    Hidden files and folders and `__pycache__` are left out; links to folders are not followed.

    Raises:
        DataError: the path does not exist.
    """
    if source.path == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return [(name, path) for name, path in _walk(root, _NOT_STDLIB) if name.endswith(".py")]
    root = Path(source.path).expanduser()
    if root.is_dir():
        return _walk(root, set())
    if root.is_file():
        return [(root.name, root)]
    raise DataError(
        f"The path of source '{source.name}' does not exist.",
        got=source.path,
        expected=f"a folder, a file, or '{STDLIB}'",
        todo="correct data.sources",
    )


def read_documents(source: SourceConfig, skipped: Skipped) -> Iterator[Document]:
    """Yield every document that has text, in the order of `list_files`; count the others in `skipped`.

    Raises:
        DataError: the path does not exist, a JSONL line is not an object with the text key, or no document is
        left.
    """
    files = list_files(source)
    found = False
    for name, path in files:
        reader = _read_jsonl if path.suffix == ".jsonl" else _read_text
        for document in reader(name, path, source, skipped):
            if document.text:
                found = True
                yield document
            else:
                skipped.empty += 1
    if not found:
        raise DataError(
            f"Source '{source.name}' holds no text.",
            got=f"{source.path}: {len(files)} files, {skipped.empty} empty, {skipped.unreadable} unreadable",
            expected="at least one UTF-8 file or JSONL line with text",
            todo="correct data.sources",
        )


def _walk(root: Path, excluded: set[str]) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in excluded | {"__pycache__"}]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        files += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(files)


def _read_text(name: str, path: Path, source: SourceConfig, skipped: Skipped) -> Iterator[Document]:
    try:
        # Bytes, then decoded: reading as text would turn CRLF into LF.
        yield Document(name, path.read_bytes().decode("utf-8"))
    except OSError as error:
        skipped.add(name, str(error.strerror))
    except UnicodeDecodeError as error:
        skipped.add(name, f"not UTF-8 at byte {error.start}")


def _read_jsonl(name: str, path: Path, source: SourceConfig, skipped: Skipped) -> Iterator[Document]:
    try:
        stream = path.open("rb")
    except OSError as error:
        skipped.add(name, str(error.strerror))
        return
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            text = _parse_line(line, f"{path}:{number}", source.text_key)
            if _is_utf8(text):
                yield Document(f"{name}:{number}", text)
            else:
                skipped.add(f"{name}:{number}", "holds a lone surrogate, which UTF-8 cannot hold")


def _parse_line(line: bytes, place: str, text_key: str) -> str:
    expected = f"a JSON object whose key '{text_key}' holds a string"
    todo = "correct the line, or name the right key in the source's text_key"
    try:
        record = json.loads(line)
    except ValueError as error:  # covers bytes that are not UTF-8
        raise DataError(f"{place} is not JSON.", got=str(error), expected=expected, todo=todo) from error
    if not isinstance(record, dict):
        raise DataError(f"{place} is not a JSON object.", got=type(record).__name__, expected=expected, todo=todo)
    text = record.get(text_key)
    if not isinstance(text, str):
        keys = ", ".join(f"{key} ({type(value).__name__})" for key, value in record.items())
        raise DataError(f"{place} has no text.", got=keys or "no keys", expected=expected, todo=todo)
    return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
