"""What `convert` prints and with which code it leaves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megamoe.cli import main
from megamoe.common.errors import CheckpointError, ConfigError
from megamoe.testing.checkpoints import example_tensors, write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    write_checkpoint(tmp_path / "run", 50, {"weight/old": torch.ones(3)})
    write_checkpoint(tmp_path / "run", 100, example_tensors())
    return tmp_path / "run"


def line_of(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_inspect_shows_the_newest_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert "step 100, 800 samples, 6,400 tokens" in text
    assert "model.hidden_size 6" in text
    assert "world_size 2, ep 2" in text
    assert line_of(text, "weight ") == ["weight", "2", "222", "888", "bytes", "float32"]
    assert line_of(text, "weight/embedding.weight")[1:7] == ["float32", "17", "x", "6", "408", "bytes"]
    assert line_of(text, "step/")[1:4] == ["float32", "one", "value"]
    assert sum(line.startswith(tuple(example_tensors())) for line in text.splitlines()) == len(example_tensors())


def test_inspect_of_one_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "inspect", str(run / "checkpoints" / "step_00000050")]) == 0
    assert line_of(capsys.readouterr().out, "weight/old")[1:3] == ["float32", "3"]


def test_inspect_shows_values_for_a_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"weight/a.w": torch.tensor([3.0, -4.0]), "weight/b.w": torch.ones(2), "weight/a.v": torch.ones(2)}
    tensors["weight/a.w.nan"] = torch.tensor([math.nan])
    write_checkpoint(tmp_path, 1, tensors)
    assert main(["convert", "inspect", str(tmp_path), "--tensors", "*/a.w*"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 3
    assert line_of(text, "weight/a.w ")[-5:] == ["-4", "3", "-0.5", "5", "0"]
    assert line_of(text, "weight/a.w.nan")[-5:] == ["nan", "nan", "nan", "nan", "1"]


def test_a_pattern_that_nothing_fits(run: Path) -> None:
    with pytest.raises(CheckpointError, match="no such tensor"):
        main(["convert", "inspect", str(run), "--tensors", "nothing*"])


def test_verify_says_what_is_sound(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "verify", str(run)]) == 0
    assert "step_00000100 is sound: 8 tensors" in capsys.readouterr().out


def test_verify_raises_what_is_wrong(run: Path) -> None:
    path = run / "checkpoints" / "step_00000100" / "state" / "rank_00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"state/rank_00002\.safetensors has"):
        main(["convert", "verify", str(run)])


def test_reshard_writes_what_inspect_and_verify_accept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    assert main(["convert", "reshard", str(run), str(copy), "--files", "2", "--weights-only"]) == 0
    assert capsys.readouterr().out == f"wrote {copy / 'checkpoints' / 'step_00000100'}\n"
    assert main(["convert", "verify", str(copy)]) == 0
    assert "is sound: 5 tensors" in capsys.readouterr().out


def test_reshard_into_no_file_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one file"):
        main(["convert", "reshard", str(run), str(tmp_path / "copy"), "--files", "0"])


@pytest.mark.parametrize("action", ["inspect", "verify"])
def test_a_folder_that_is_no_checkpoint(tmp_path: Path, action: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        main(["convert", action, str(tmp_path / "nothing")])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        main(["convert", action, str(tmp_path)])
