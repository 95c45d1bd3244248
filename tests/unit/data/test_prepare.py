import json
import shutil
from pathlib import Path

import pytest

from megamoe.common.errors import DataError
from megamoe.config.data import DataConfig, SourceConfig, TokenizerConfig
from megamoe.data import prepare as prepare_module
from megamoe.data.corpus import Skipped, read_documents
from megamoe.data.loader import documents
from megamoe.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    check_prepared,
    load_manifest,
    pair_prefix,
)
from megamoe.data.prepare import is_prepared, prepare, split_position
from megamoe.data.tokenizer import Tokenizer

Prepared = tuple[DataConfig, Manifest]


def _with(config: DataConfig, **changes: object) -> DataConfig:
    return config.model_copy(update=changes)


def _copy(prepared: Prepared, folder: Path) -> DataConfig:
    shutil.copytree(prepared[0].prepared_dir, folder)
    return _with(prepared[0], prepared_dir=str(folder))


def _contents(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _texts(prepared: Prepared, source: str, split: str) -> list[str]:
    config, manifest = prepared
    tokenizer = Tokenizer(Path(config.prepared_dir) / TOKENIZER)
    found = [tokens.tolist() for tokens in documents(config, manifest, source, split)]  # type: ignore[arg-type]
    assert all(ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1] for ids in found)
    return [tokenizer.decode(ids) for ids in found]


def test_the_number_of_workers_changes_no_byte(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "_BATCH_CHARS", 20_000)  # several batches, cut elsewhere than with one
    prepare(_with(prepared[0], prepared_dir=str(tmp_path / "two"), num_workers=2))
    assert _contents(tmp_path / "two") == _contents(prepared[0].prepared_dir)


def test_every_document_is_in_one_split_and_unchanged(prepared: Prepared):
    for source in prepared[0].sources:
        expected = [document.text for document in read_documents(source, Skipped())]
        train, validation = (_texts(prepared, source.name, split) for split in SPLITS)
        assert sorted(train + validation) == sorted(expected)
        assert train
        assert validation


def test_the_split_of_a_document_depends_on_its_id_alone(prepared: Prepared):
    config, _ = prepared
    for source in config.sources:
        held_out = [
            document.text
            for document in read_documents(source, Skipped())
            if split_position(document.id) < config.validation_fraction
        ]
        assert _texts(prepared, source.name, "validation") == held_out
    assert split_position("json/decoder.py") == pytest.approx(0.1139, abs=1e-4)


def test_split_positions_are_spread_evenly():
    positions = [split_position(f"{i}.py") for i in range(5000)]
    # 100 expected, standard deviation 9.9
    assert 50 < sum(position < 0.02 for position in positions) < 150


def test_a_small_source_holds_out_its_lowest_document(tmp_path: Path, prepared: Prepared):
    for name in "abcde":
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / name).write_text(name * 50)
    config = _with(
        prepared[0],
        sources=(SourceConfig(name="few", path=str(tmp_path / "few")),),
        tokenizer=TokenizerConfig(path=f"{prepared[0].prepared_dir}/{TOKENIZER}", vocab_size=600),
        prepared_dir=str(tmp_path / "out"),
        validation_fraction=1e-6,
    )
    manifest = prepare(config)
    lowest = min("abcde", key=split_position)
    assert _texts((config, manifest), "few", "validation") == [lowest * 50]
    assert manifest.source("few").train.documents == 4


def test_the_tokenizer_is_trained_on_training_documents_only(config: DataConfig, tmp_path: Path):
    root = tmp_path / "texts"
    root.mkdir()
    for number in range(200):
        word = "heldout" if split_position(f"{number}.txt") < 0.1 else "trained"
        (root / f"{number}.txt").write_text(f"{word} and some words of filling {number}\n" * 20)
    few = _with(
        config,
        sources=(SourceConfig(name="texts", path=str(root)),),
        tokenizer=TokenizerConfig(vocab_size=300, sample_lines=5000),
    )
    prepare(few)
    tokenizer = Tokenizer(Path(few.prepared_dir) / TOKENIZER)
    assert len(tokenizer.encode("trained")) < len("trained") / 2
    # h, l, d of "heldout" and so on are known from other words, their combination is not
    assert len(tokenizer.encode("heldout")) >= 5


def test_the_manifest_says_what_is_there(prepared: Prepared):
    config, manifest = prepared
    assert load_manifest(config.prepared_dir) == manifest == check_prepared(config)
    assert manifest.vocab_size == 600
    for source in config.sources:
        texts = [document.text for document in read_documents(source, Skipped())]
        counted = manifest.source(source.name)
        assert counted.train.text_bytes + counted.validation.text_bytes == sum(len(t.encode()) for t in texts)
        for split in SPLITS:
            found = list(documents(config, manifest, source.name, split))
            assert counted.split(split).documents == len(found)
            assert counted.split(split).tokens == sum(map(len, found))


def test_unreadable_files_are_in_the_manifest(config: DataConfig, tmp_path: Path):
    code = tmp_path / "code"
    shutil.copytree(config.sources[0].path, code)
    (code / "latin.py").write_bytes(b"# caf\xe9")
    manifest = prepare(_with(config, sources=(SourceConfig(name="code", path=str(code)),)))
    assert manifest.source("code").unreadable == 1
    assert manifest.source("code").unreadable_examples == ("latin.py: not UTF-8 at byte 5",)


def test_a_second_call_returns_at_once(prepared: Prepared, monkeypatch: pytest.MonkeyPatch):
    config, manifest = prepared
    monkeypatch.setattr(prepare_module, "_fill", None)  # not callable: any work would fail
    assert is_prepared(config)
    assert prepare(config) == manifest
    # These are read from the same files.
    assert prepare(_with(config, seq_length=9, num_workers=7)) == manifest


def test_other_settings_in_the_same_folder_are_named(prepared: Prepared, tmp_path: Path):
    config = _with(_copy(prepared, tmp_path / "copy"), validation_fraction=0.2)
    before = _contents(tmp_path / "copy")
    for act in (check_prepared, prepare, is_prepared):
        with pytest.raises(DataError, match=r"validation_fraction=0\.1\n  expected: data\.validation_fraction=0\.2"):
            act(config)  # type: ignore[operator]
    assert _contents(tmp_path / "copy") == before
    assert prepare(config, overwrite=True).settings["data.validation_fraction"] == 0.2


def test_another_set_of_sources_is_named(prepared: Prepared):
    config = _with(prepared[0], sources=prepared[0].sources[:1])
    with pytest.raises(DataError, match=r"got: data\.sources\[notes\]\.path=/.*\n  expected: .*path=absent"):
        check_prepared(config)


def test_an_interrupted_preparation_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "_close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    monkeypatch.undo()
    assert not is_prepared(config)
    assert sorted(p.name for p in Path(config.prepared_dir).parent.iterdir()) == [".prepared.lock"]
    assert prepare(config).vocab_size == 600


def test_a_folder_of_something_else_is_not_touched(config: DataConfig):
    folder = Path(config.prepared_dir)
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="was not made here"):
            prepare(config, overwrite=overwrite)
    assert _contents(folder) == {"thesis.tex": b"mine"}


def test_no_prepared_data_is_an_error_that_says_how(tmp_path: Path):
    with pytest.raises(DataError, match="python -m megamoe data prepare --config"):
        load_manifest(tmp_path / "absent")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_file_that_differs_from_the_manifest_is_an_error(prepared: Prepared, tmp_path: Path, ending: str):
    config = _copy(prepared, tmp_path / "copy")
    path = pair_prefix(config.prepared_dir, "notes", "train").with_suffix(f".{ending}")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"train\.{ending} is trunc(.|\n)*{size - 2} bytes\n.*: {size} bytes"):
        check_prepared(config)
    path.unlink()
    with pytest.raises(DataError, match=rf"train\.{ending} is missing"):
        check_prepared(config)
    assert prepare(config, overwrite=True) == prepared[1]


@pytest.mark.parametrize("content", ["", "{}", '{"format": "1"}'])
def test_a_damaged_manifest_is_an_error(prepared: Prepared, tmp_path: Path, content: str):
    config = _copy(prepared, tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        check_prepared(config)


def test_a_manifest_of_another_format_is_an_error(prepared: Prepared, tmp_path: Path):
    _copy(prepared, tmp_path / "copy")
    path = tmp_path / "copy" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="got: format 99"):
        load_manifest(tmp_path / "copy")


def test_another_tokenizer_in_the_folder_is_an_error(prepared: Prepared, tmp_path: Path):
    config = _copy(prepared, tmp_path / "copy")
    path = tmp_path / "copy" / TOKENIZER
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="is not the tokenizer that the data was made with"):
        check_prepared(config)


def test_another_vocabulary_is_an_error(prepared: Prepared, config: DataConfig):
    tokenizer = TokenizerConfig(vocab_size=700, sample_lines=4000)
    with pytest.raises(DataError, match=r"vocab_size=600\n  expected: data\.tokenizer\.vocab_size=700"):
        check_prepared(_with(prepared[0], tokenizer=tokenizer))
    existing = TokenizerConfig(path=f"{prepared[0].prepared_dir}/{TOKENIZER}", vocab_size=700)
    with pytest.raises(DataError, match=r"got: 600 token ids\n  expected: data\.tokenizer\.vocab_size=700"):
        prepare(_with(config, tokenizer=existing))


def test_a_configured_tokenizer_that_changed_since_is_an_error(prepared: Prepared, config: DataConfig, tmp_path: Path):
    own = tmp_path / "own.model"
    shutil.copyfile(f"{prepared[0].prepared_dir}/{TOKENIZER}", own)
    config = _with(config, tokenizer=TokenizerConfig(path=str(own), vocab_size=600))
    assert prepare(config).tokenizer_digest == prepared[1].tokenizer_digest
    own.write_bytes(own.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"another tokenizer than .*own\.model"):
        check_prepared(config)
    own.unlink()
    check_prepared(config)


def test_a_source_of_one_document_is_an_error(prepared: Prepared, config: DataConfig, tmp_path: Path):
    (tmp_path / "one.txt").write_text("one document")
    one = _with(
        config,
        sources=(SourceConfig(name="one", path=str(tmp_path / "one.txt")),),
        tokenizer=TokenizerConfig(path=f"{prepared[0].prepared_dir}/{TOKENIZER}", vocab_size=600),
    )
    with pytest.raises(DataError, match="Source 'one' has no document for the train split"):
        prepare(one)
    assert not is_prepared(one)


def test_a_folder_that_cannot_be_written_is_an_error(config: DataConfig, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare(_with(config, prepared_dir=str(tmp_path / "file" / "below")))
