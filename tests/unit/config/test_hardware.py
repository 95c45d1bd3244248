"""A cluster's file: what is read from it, and what is said of a wrong one."""

from pathlib import Path

import pytest

from megamoe.common.errors import ConfigError
from megamoe.config.hardware import load_hardware

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "configs/hardware").glob("*.yaml"))
TEXT = """\
name: by hand
sources: [made up]
ranks_per_node: 4
products:
  fp32:
    - {rows: 8, flops_per_second: 1e9}
    - {rows: 64, flops_per_second: 4e9}
memory_bytes_per_second: 1e10
launch: {seconds: 1e-5, ahead: false}
inside: {latency_seconds: 1e-4, bytes_per_second: 1e9}
"""


def load(folder: Path, text: str):  # type: ignore[no-untyped-def]
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return load_hardware(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_the_repository_loads_and_says_where_it_is_from(path: Path) -> None:
    assert all(source.strip() for source in load_hardware(path).sources)
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    hardware = load(tmp_path, TEXT)
    assert hardware.between is None
    assert hardware.inside.computation_kept == 1.0
    assert hardware.products["fp32"][1].flops_per_second == 4e9
    assert hardware.experts == {}


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("name: by hand\n", "", ("1 problem", "name: is required and not given")),
        ("ranks_per_node", "rank_per_node", ("did you mean ranks_per_node?", "cluster.yaml:3")),
        ("1e10", "fast", ("memory_bytes_per_second", "valid number", "'fast'")),
        ("1e10", "0", ("memory_bytes_per_second", "greater than 0")),
        ("rows: 8,", "rows: 64,", ("products.fp32: the rows of a curve ascend", "cluster.yaml:5")),
        ("fp32:", "int4:", ("products.int4", "'bf16', 'fp32' or 'fp64'")),
        ("sources: [made up]", "sources: []", ("sources", "at least 1 item")),
        ("ahead: false}", "ahead: false", ("cannot be read",)),
    ],
)
def test_what_is_said_of_a_wrong_file(tmp_path: Path, old: str, new: str, says: tuple[str, ...]) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, TEXT.replace(old, new))
    text = str(caught.value)
    assert not [part for part in says if part not in text], text
    assert "configs/hardware" in text


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_hardware(tmp_path / "none.yaml")
