"""A small real corpus, prepared once: two sources, some four dozen documents."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from megamoe.config.data import DataConfig, SourceConfig, TokenizerConfig
from megamoe.data.manifest import Manifest
from megamoe.data.prepare import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`code/`: packages of the standard library; `notes.jsonl`: short texts with difficult characters."""
    root = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in ("json", "asyncio", "logging"):
        shutil.copytree(stdlib / package, root / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "notes.jsonl").open("w", encoding="utf-8") as notes:
        for number in range(60):
            text = f"Note {number}:\ttab, CRLF\r\nend \u2581 mark, caf\u00e9, \u4f60\u597d, \U0001f600\n" * 3
            notes.write(json.dumps({"text": text}) + "\n")
    return root


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> DataConfig:
    """Both sources, not yet prepared."""
    return make_config(corpus, tmp_path / "prepared")


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Manifest]:
    """Both sources, prepared; for tests that only read."""
    config = make_config(corpus, tmp_path_factory.mktemp("data") / "prepared")
    return config, prepare(config)


def make_config(corpus: Path, prepared_dir: Path) -> DataConfig:
    return DataConfig(
        sources=(
            SourceConfig(name="code", path=str(corpus / "code"), weight=0.7),
            SourceConfig(name="notes", path=str(corpus / "notes.jsonl"), weight=0.3),
        ),
        tokenizer=TokenizerConfig(vocab_size=600, sample_lines=4000),
        prepared_dir=str(prepared_dir),
        seq_length=64,
        validation_fraction=0.1,
        num_workers=1,
    )
