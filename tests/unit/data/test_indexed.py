import gc
import struct
from pathlib import Path

import numpy as np
import pytest

from megamoe.common.errors import DataError
from megamoe.data.indexed import IndexedTokens, IndexedWriter

DOCUMENTS = [[5, 6, 7, 1], [1], [299, 0, 32, 8, 9, 1]]


def _write(prefix: Path, vocab_size: int = 300) -> Path:
    writer = IndexedWriter(prefix, vocab_size)
    for ids in DOCUMENTS:
        writer.add(ids)
    writer.close()
    return prefix


def test_documents_are_read_as_written(tmp_path: Path):
    tokens = IndexedTokens(_write(tmp_path / "a.b"))
    assert [tokens.read(i).tolist() for i in range(len(tokens))] == DOCUMENTS
    assert tokens.sizes.tolist() == [4, 1, 6]
    assert tokens.num_tokens == 11
    assert tokens.read(2, start=1, length=3).tolist() == [0, 32, 8]


@pytest.mark.parametrize("vocab_size, width", [(32_768, 2), (32_769, 4)])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, vocab_size: int, width: int):
    writer = IndexedWriter(tmp_path / "a", vocab_size)
    writer.add([vocab_size - 1, 0])
    writer.close()
    assert (tmp_path / "a.bin").stat().st_size == 2 * width
    assert IndexedTokens(tmp_path / "a").read(0).tolist() == [vocab_size - 1, 0]


def test_what_was_read_outlives_the_reader(tmp_path: Path):
    tokens = IndexedTokens(_write(tmp_path / "a"))
    document, sizes = tokens.read(0), tokens.sizes
    del tokens
    gc.collect()
    assert document.tolist() == DOCUMENTS[0]
    assert sizes.tolist() == [4, 1, 6]


def test_reading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    IndexedTokens(_write(tmp_path / "a"))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_megatrons_own_reader_agrees(tmp_path: Path, vocab_size: int):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    other = megatron.IndexedDataset(str(_write(tmp_path / "a", vocab_size)))
    assert [other[i].tolist() for i in range(len(other))] == DOCUMENTS
    assert other.document_indices.tolist() == [0, 1, 2, 3]
    assert np.dtype(other.index.dtype).itemsize == (2 if vocab_size == 300 else 4)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_file_is_an_error(tmp_path: Path, ending: str):
    prefix = _write(tmp_path / "a")
    (tmp_path / f"a.{ending}").unlink()
    with pytest.raises(DataError, match=rf"a\.{ending} is missing(.|\n)*data prepare --config"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("ending, full", [("bin", 22), ("idx", 34 + 3 * 12 + 4 * 8)])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_an_error(tmp_path: Path, ending: str, full: int, change: int):
    prefix = _write(tmp_path / "a")
    path = tmp_path / f"a.{ending}"
    assert path.stat().st_size == full
    path.write_bytes((path.read_bytes() + b"x")[: full + change])
    with pytest.raises(DataError, match=rf"a\.{ending} is trunc(.|\n)*got: {full + change} bytes\n.*: {full} bytes"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("keep", [0, 20])
def test_an_index_without_its_header_is_an_error(tmp_path: Path, keep: int):
    prefix = _write(tmp_path / "a")
    path = tmp_path / "a.idx"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"got: {keep} bytes\n  expected: at least 34 bytes"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("offset, value", [(0, b"X"), (9, b"\x02"), (17, struct.pack("<B", 8))])
def test_an_index_of_another_format_is_an_error(tmp_path: Path, offset: int, value: bytes):
    prefix = _write(tmp_path / "a")
    path = tmp_path / "a.idx"
    content = path.read_bytes()
    path.write_bytes(content[:offset] + value + content[offset + 1 :])
    with pytest.raises(DataError, match="not one that can be read here"):
        IndexedTokens(prefix)


def test_files_without_documents_are_an_error(tmp_path: Path):
    IndexedWriter(tmp_path / "a", 300).close()
    with pytest.raises(DataError, match="is empty"):
        IndexedTokens(tmp_path / "a")
