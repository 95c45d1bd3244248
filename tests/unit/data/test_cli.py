import argparse
from pathlib import Path

import pytest
import yaml

from megamoe.cli import data
from megamoe.common.errors import DataError
from megamoe.config.data import DataConfig


def _run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    data.add_parser(parser.add_subparsers(required=True))
    return data.run(parser.parse_args(["data", *words]))


@pytest.fixture
def config_file(config: DataConfig, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": config.model_dump(mode="json")}))
    return str(path)


def test_prepare_then_inspect(config_file: str, config: DataConfig, capsys: pytest.CaptureFixture[str]):
    assert _run("prepare", "--config", config_file) == 0
    first = capsys.readouterr().out
    assert f"{config.prepared_dir}: prepared\n" in first
    assert "notes: 60 documents" in first
    assert _run("prepare", "--config", config_file) == 0
    assert "already prepared with these settings" in capsys.readouterr().out
    assert _run("inspect", "--config", config_file) == 0
    shown = capsys.readouterr().out
    assert "validation" in shown
    assert "600 token ids" in shown
    assert len(shown.split("first training sample:\n")[1]) > 64


def test_overrides_may_follow_the_files(config_file: str, tmp_path: Path):
    other = tmp_path / "other"
    assert _run("prepare", "--config", config_file, f"data.prepared_dir={other}") == 0
    assert (other / "manifest.json").is_file()
    with pytest.raises(DataError, match="prepared with other settings"):
        _run("prepare", "--config", config_file, f"data.prepared_dir={other}", "data.validation_fraction=0.3")
    words = [f"data.prepared_dir={other}", "data.validation_fraction=0.3", "--overwrite"]
    assert _run("prepare", "--config", config_file, *words) == 0


def test_inspect_without_data_says_how_to_prepare(config_file: str):
    with pytest.raises(DataError, match="python -m megamoe data prepare"):
        _run("inspect", "--config", config_file)
