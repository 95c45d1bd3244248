"""A few random kills of what `python tests/kills.py` does 200 times."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe.testing import kills
from megamoe.testing.kills import LAYOUTS, Campaign


def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    name = "ep2-zero1"
    campaign = Campaign(tmp_path, seed=5)
    campaign.carry_out(3, {name: LAYOUTS[name]})
    assert campaign.kills.total() >= 3
    assert campaign.runs >= 1


def test_it_notices_what_is_lost(tmp_path: Path) -> None:
    """The control: a checkpoint that is gone, and one that differs."""
    with pytest.raises(AssertionError, match="only"):
        kills._assert_sound(tmp_path, {"step_00000003"})
