from pathlib import Path

import pytest

from megamoe.common.errors import DataError
from megamoe.data.staging import exclusive, staged


def _fill(target: Path, content: str) -> None:
    with staged(target, "marker") as folder:
        (folder / "marker").write_text(content)
        assert not target.exists() or (target / "marker").read_text() != content


def test_the_target_appears_at_the_end_and_is_replaced_whole(tmp_path: Path):
    target = tmp_path / "target"
    _fill(target, "one")
    (target / "rest").write_text("of one")
    _fill(target, "two")
    assert [(p.name, p.read_text()) for p in target.iterdir()] == [("marker", "two")]
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_an_error_leaves_the_target_as_it_was(tmp_path: Path):
    target = tmp_path / "target"
    _fill(target, "one")

    def interrupted() -> None:
        with staged(target, "marker") as folder:
            (folder / "marker").write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (target / "marker").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path):
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial" / "rest").write_text("")
    _fill(tmp_path / "target", "one")
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["marker"]


@pytest.mark.parametrize("foreign", ["folder", "file"])
def test_what_was_not_made_here_is_not_replaced(tmp_path: Path, foreign: str):
    target = tmp_path / "target"
    if foreign == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("")
    else:
        target.write_text("")
    with pytest.raises(DataError, match="was not made here"):
        _fill(target, "one")
    assert target.exists()


def test_two_cannot_work_at_once(tmp_path: Path):
    with (
        exclusive(tmp_path / "a"),
        pytest.raises(DataError, match="another process"),
        exclusive(tmp_path / "a"),
    ):
        pass
    with exclusive(tmp_path / "a"):
        pass
