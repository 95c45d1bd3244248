"""The record of exchanges: arithmetic on moments that are given, and what it keeps."""

import pytest

from megamoe.parallel.exchanges import Exchange, Exchanges, LayerSeconds

PLACE = (3, "ep", (4, 6))


def add(record: Exchanges, layer: int, phase: str, *moments: float) -> Exchange:
    """An exchange that began, was launched, arrived, was waited for and let the computation go on at those moments."""
    exchange = record.begin((layer, "ep", (0, 1)), phase, (0, 0), on_gpu=False)
    exchange.began, exchange.launched, exchange.arrived, exchange.waited, exchange.resumed = moments
    return exchange


def test_seconds_of_a_step() -> None:
    record = Exchanges()
    record.begin_step(on_gpu=False)
    add(record, 0, "dispatch", 10.0, 10.25, 14.0, 12.0, 14.0)
    add(record, 0, "combine", 20.0, 20.0, 21.0, 25.0, 25.0)  # hidden
    add(record, 1, "combine backward 1/2", 30.0, 30.0, 34.0, 32.0, 34.0)
    add(record, 1, "combine backward 2/2", 31.0, 31.0, 36.0, 34.0, 36.0)  # under way at the same time
    add(record, 1, "dispatch", 40.0, 40.0, 41.0, 40.0, 41.0)
    found = record.end_step()
    assert found == {0: LayerSeconds(5.0, 2.25, 0.0), 1: LayerSeconds(7.0, 5.0, 4.0)}


def test_an_exchange_inside_another_one_adds_nothing() -> None:
    record = Exchanges()
    record.begin_step(on_gpu=False)
    add(record, 0, "dispatch", 10.0, 10.0, 20.0, 20.0, 20.0)
    add(record, 0, "counts", 12.0, 12.0, 14.0, 14.0, 14.0)
    add(record, 0, "combine", 18.0, 18.0, 22.0, 22.0, 22.0)
    assert record.end_step() == {0: LayerSeconds(12.0, 0.0, 0.0)}


def test_what_happens_outside_of_a_step_does_not_count_and_is_not_kept_for_ever() -> None:
    record = Exchanges(kept=3)
    for _ in range(5):
        add(record, 0, "dispatch", 0.0, 0.0, 1.0, 0.0, 1.0)
    record.begin_step(on_gpu=False)
    add(record, 0, "dispatch", 0.0, 0.0, 2.0, 0.0, 2.0)
    assert record.end_step() == {0: LayerSeconds(2.0, 2.0, 0.0)}
    assert [exchange.number for exchange in record.recent] == [4, 5, 6]
    record.begin_step(on_gpu=False)
    assert record.end_step() == {}, "a step begins anew"


def test_one_that_nobody_waited_for_does_not_count() -> None:
    record = Exchanges()
    record.begin_step(on_gpu=False)
    record.begin(PLACE, "dispatch", (1, 2), on_gpu=False)
    assert record.end_step() == {}


def test_the_one_under_way_and_the_one_that_failed() -> None:
    record = Exchanges()
    exchange = record.begin(PLACE, "dispatch", (1, 2), on_gpu=False)
    assert record.under_way() is None, "nobody stands still for it yet"
    with exchange:
        assert record.under_way() is exchange
    assert record.under_way() is None
    assert exchange.arrived == exchange.resumed

    class Lost(RuntimeError):
        pass

    again = record.begin(PLACE, "combine backward 2/4", (1, 2), on_gpu=False)
    with pytest.raises(Lost, match=r"^block 3, combine backward 2/4 \(ep ranks 4, 6\): closed by peer$"), again:
        raise Lost("closed by peer")
    assert record.under_way() is again
    assert again.arrived is None
    assert again.summary() == {
        "number": 2,
        "layer": 3,
        "axis": "ep",
        "phase": "combine backward 2/4",
        "ranks": [4, 6],
    }


def test_spans_only_where_they_are_wanted() -> None:
    record = Exchanges()
    record.begin_step(on_gpu=False)
    with record.span("experts", 1):
        pass
    record.end_step()
    assert record.last is not None
    assert record.last.spans is None
    record.traced = True
    record.begin_step(on_gpu=False)
    with record.span("experts", 1, "backward"):
        pass
    record.end_step()
    (span,) = record.last.spans or []
    assert span[:3] == ("experts", 1, "backward")
    assert span.begin <= span.end  # type: ignore[operator]
