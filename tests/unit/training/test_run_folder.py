"""The run folder, files that are written whole, and metrics.jsonl across a resume."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megamoe.common.errors import ConfigError
from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.training.run_folder import MetricsFile, open_run_folder, write_config, write_json


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder: Path, resumed_step: int, *steps: int) -> None:
    metrics = MetricsFile(folder, resumed_step)
    for step in steps:
        metrics.write({"step": step, "loss": step / 4})
    metrics.close()


def test_the_folder_holds_a_configuration_that_loads_again(tmp_path: Path) -> None:
    config = load_config([], [f"training.output_dir={tmp_path}/a/b", "moe.router.type=resonance"])
    folder = open_run_folder(config)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "logs"]
    write_config(config)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json", "logs"]
    assert load_config([folder / "config.json"]) == config
    assert open_run_folder(config) == folder, "a second start finds it in place"


@pytest.mark.parametrize("make", [open_run_folder, write_config])
def test_a_folder_that_cannot_be_made(tmp_path: Path, make: Callable[[RunConfig], object]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as refusal:
        make(load_config([], [f"training.output_dir={tmp_path}/file/run"]))
    assert f"{tmp_path}/file/run" in refusal.value.got
    assert "training.output_dir" in refusal.value.todo


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": 2, "what": object()})
    assert json.loads(path.read_text()) == {"step": 1}
    write_json(path, {"step": 3})
    assert json.loads(path.read_text()) == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.write({"step": 1, "load": [0.5, 1.5]})
    assert lines(tmp_path) == [{"step": 1, "load": [0.5, 1.5]}]
    metrics.close()


def test_a_resumed_run_rewrites_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    written(tmp_path, 0, 1, 2, 3, 4, 5)
    written(tmp_path, 3, 4, 5, 6)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_several_lines_of_the_checkpoints_step_stay(tmp_path: Path) -> None:
    """A validation has a line of its own."""
    written(tmp_path, 0, 1, 2, 2, 3)
    written(tmp_path, 2, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2, 3]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"st', "\0\0\0", '{"loss": 1.0}\n', "[3]\n", "3\n", "\n"])
def test_a_line_torn_by_a_crash_goes(tmp_path: Path, torn: str) -> None:
    written(tmp_path, 0, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    written(tmp_path, 5, 6)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 6]


def test_a_run_that_starts_over_begins_an_empty_file(tmp_path: Path) -> None:
    written(tmp_path, 0, 1, 2)
    written(tmp_path, 0, 1)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.write({"step": 1, "cross_entropy": math.nan, "gradient_norm": math.inf})
    metrics.close()
    assert lines(tmp_path) == [{"step": 1, "cross_entropy": None, "gradient_norm": None}]


def test_a_second_start_does_not_take_the_file_from_the_first(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, 0)
    first.write({"step": 1})
    MetricsFile(tmp_path, 0).close()
    first.write({"step": 2})
    first.close()
    assert [line["step"] for line in lines(tmp_path)][-1] == 2
