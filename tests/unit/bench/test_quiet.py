"""What others use is what was used less what this process used."""

import pytest

from megamoe.bench import quiet
from megamoe.bench.quiet import Ticks, now, others_share, wait_for_quiet


@pytest.mark.parametrize(
    "after, share",
    [
        (Ticks(120.0, 55.0, 5.0), 0.25),
        (Ticks(120.0, 50.0, 10.0), 0.0),
        (Ticks(100.0, 50.0, 5.0), 0.0),  # no time has passed
        (Ticks(120.0, 50.0, 30.0), 0.0),  # the two counters are not read in one moment
    ],
)
def test_the_share_of_others(after: Ticks, share: float) -> None:
    assert others_share(Ticks(100.0, 50.0, 5.0), after) == share


def test_the_counters_grow_with_what_this_process_does() -> None:
    before = now()
    sum(range(5_000_000))
    after = now()
    assert after.own > before.own
    assert after.total >= before.total


def test_patience_ends_and_quiet_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "SAMPLE_SECONDS", 0.0)
    shares = iter([0.9, 0.5, 0.05, 0.9])
    monkeypatch.setattr(quiet, "others_share", lambda before, after: next(shares))
    assert wait_for_quiet(60.0) == 0.05
    assert wait_for_quiet(0.0) == 0.9
