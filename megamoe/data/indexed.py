"""Token files in Megatron's .bin/.idx format, written and read by DeepSpeed's own classes.

`NAME.bin` holds the tokens of all documents one after the other; `NAME.idx` their dtype, lengths and offsets.
Every document is one sequence that ends with the end-of-document id.

Two traps of the format are handled here:

- DeepSpeed numbers uint16 as 6 where Megatron's readers expect 8 (and take 6 for a float), so a uint16 file
  of one is misread by the other. Signed types carry the same numbers in both, so only those are written:
  int16 up to 32,768 ids and int32 above.
- DeepSpeed's reader unmaps its file when it is collected even if arrays still point into it, which crashes
  the process. Nothing here hands out such an array: every result is a copy.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.common.errors import DataError

PREPARE_COMMAND = "python -m megamoe data prepare --config CONFIG.yaml"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype number, sequences, document boundaries
_DTYPES: dict[int, type[np.signedinteger[Any]]] = {3: np.int16, 4: np.int32, 5: np.int64}
_INT16_VOCAB = 2**15

Tokens = npt.NDArray[np.int64]


def bin_path(prefix: Path) -> Path:
    """The token file of a pair."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The index file of a pair."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes one .bin/.idx pair; the pair is complete after `close`.

    Args:
        prefix: path of the pair without its endings; its folder must exist.
        vocab_size: number of token ids, which decides the width of a stored token.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.documents = 0
        self.tokens = 0
        self._dtype = np.int16 if vocab_size <= _INT16_VOCAB else np.int32
        self._builder = _indexed_dataset().MMapIndexedDatasetBuilder(str(bin_path(prefix)), dtype=self._dtype)

    def add(self, ids: Sequence[int]) -> None:
        """Append one document, its end-of-document id included."""
        self._builder.add_item_numpy(np.asarray(ids, dtype=self._dtype))
        self._builder.end_document()
        self.documents += 1
        self.tokens += len(ids)

    def close(self) -> None:
        """Write the index."""
        self._builder.finalize(str(idx_path(self.prefix)))


class IndexedTokens:
    """The documents of one .bin/.idx pair, memory-mapped.

    Attributes:
        sizes: tokens per document, int64 [documents].
        num_tokens: their sum.

    Raises:
        DataError: a file is missing, truncated or longer than it should be, or of another format.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.sizes = _read_sizes(prefix)
        self.num_tokens = int(self.sizes.sum())
        module = _indexed_dataset()  # outside the redirection, since DeepSpeed's log keeps the stdout it finds
        with contextlib.redirect_stdout(io.StringIO()):  # the reader prints its progress
            self._dataset = module.MMapIndexedDataset(str(prefix), skip_warmup=True)

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, document: int, start: int = 0, length: int | None = None) -> Tokens:
        """`length` tokens (default: the rest) of one document from `start` on, int64 [length]."""
        length = int(self.sizes[document]) - start if length is None else length
        view = self._dataset.get(int(document), int(start), int(length))
        return np.array(view, dtype=np.int64)


def _indexed_dataset() -> Any:
    # Importing DeepSpeed takes seconds, and the rest of the room does not need it.
    from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset

    return indexed_dataset


def _read_sizes(prefix: Path) -> Tokens:
    """Lengths of the documents, after checking both files against the header and against each other."""
    idx, bin_ = idx_path(prefix), bin_path(prefix)
    for path in (idx, bin_):
        if not path.is_file():
            raise DataError(f"Token file {path} is missing.", expected=f"{idx.name} and {bin_.name}", todo=_todo())
    dtype, sequences, boundaries = _read_header(idx)
    _check_size(idx, _HEADER.size + sequences * (4 + 8) + boundaries * 8)
    sizes = np.fromfile(idx, dtype=np.int32, count=sequences, offset=_HEADER.size).astype(np.int64)
    _check_size(bin_, int(sizes.sum()) * np.dtype(dtype).itemsize)
    if not sizes.sum():
        raise DataError(f"Token file {bin_} is empty.", expected="at least one document", todo=_todo())
    return sizes


def _read_header(idx: Path) -> tuple[type[np.signedinteger[Any]], int, int]:
    with idx.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        _fail_size(idx, len(head), f"at least {_HEADER.size}")
    magic, version, number, sequences, boundaries = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1 or number not in _DTYPES:
        raise DataError(
            f"Index file {idx} is not one that can be read here.",
            got=f"starts with {magic!r}, version {version}, dtype number {number}",
            expected=f"{_MAGIC!r}, version 1, dtype number in {sorted(_DTYPES)} (int16, int32, int64)",
            todo=_todo(),
        )
    return _DTYPES[number], sequences, boundaries


def _check_size(path: Path, expected: int) -> None:
    got = path.stat().st_size
    if got != expected:
        _fail_size(path, got, str(expected))


def _fail_size(path: Path, got: int, expected: str) -> None:
    what = f"Token file {path} is truncated or damaged."
    raise DataError(what, got=f"{got} bytes", expected=f"{expected} bytes", todo=_todo())


def _todo() -> str:
    return f"prepare the data again: {PREPARE_COMMAND} --overwrite"
