import json
import os
from pathlib import Path

import pytest

from megamoe.common.errors import DataError
from megamoe.config.data import SourceConfig
from megamoe.data.corpus import Skipped, list_files, read_documents


def _read(path: Path, **fields: str) -> tuple[dict[str, str], Skipped]:
    skipped = Skipped()
    documents = list(read_documents(SourceConfig(name="s", path=str(path), **fields), skipped))
    assert len({document.id for document in documents}) == len(documents)
    return dict(documents), skipped


def test_documents_come_in_order_of_their_ids_whatever_the_order_of_writing(tmp_path: Path):
    names = ["b/2.txt", "a.md", "b/10.txt", "b.txt", "B/x.py"]
    orders = []
    for number, order in enumerate((names, names[::-1])):
        root = tmp_path / str(number)
        for name in order:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        orders.append(list(_read(root)[0].items()))
    assert orders[0] == orders[1] == [(name, name) for name in sorted(names)]


def test_bytes_are_kept(tmp_path: Path):
    text = "\ufeffa\r\nb\rc\n\td\0 \u2028 e"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert _read(tmp_path)[0] == {"a.txt": text}


def test_what_is_left_out_is_counted(tmp_path: Path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    os.symlink(tmp_path / "nowhere", tmp_path / "link.txt")
    documents, skipped = _read(tmp_path)
    assert documents == {"good.txt": "good"}
    assert (skipped.empty, skipped.unreadable) == (1, 2)
    assert skipped.examples == ["latin.txt: not UTF-8 at byte 3", "link.txt: No such file or directory"]


def test_hidden_files_and_caches_are_no_documents(tmp_path: Path):
    for name in ("a.txt", ".hidden.txt", ".git/config", "__pycache__/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(_read(tmp_path)[0]) == ["a.txt"]


def test_one_file_is_a_source(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    assert _read(tmp_path / "a.txt")[0] == {"a.txt": "x"}


def test_jsonl_documents_are_named_by_line(tmp_path: Path):
    lines = [{"body": "one"}, None, {"body": ""}, {"body": "\ud800"}, {"body": "four\u2028\r\n"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) if line else "" for line in lines))
    documents, skipped = _read(tmp_path, text_key="body")
    assert documents == {"a.jsonl:1": "one", "a.jsonl:5": "four\u2028\r\n"}
    assert (skipped.empty, skipped.unreadable) == (1, 1)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "cut', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b'["text"]', "is not a JSON object"),
        (b'{"body": "x"}', r"has no text\.\n  got: body \(str\)"),
        (b'{"text": 7}', r"has no text\.\n  got: text \(int\)"),
    ],
)
def test_a_bad_jsonl_line_is_an_error_with_its_place(tmp_path: Path, line: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2 {message}"):
        _read(tmp_path)


def test_an_empty_corpus_is_an_error(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="1 files, 1 empty, 0 unreadable"):
        _read(tmp_path)


def test_a_missing_path_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        _read(tmp_path / "nowhere")


def test_the_standard_library_is_its_own_python_files_only():
    names = [name for name, _ in list_files(SourceConfig(name="s", path="stdlib"))]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert len(names) > 500
    assert names == sorted(names)
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name]
