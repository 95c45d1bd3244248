"""The record of exchanges: arithmetic on moments that are given, and what it keeps."""

from typing import Any

import pytest
import torch

from megamoe.parallel.exchanges import Exchange, Exchanges, LayerSeconds, Step

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


def test_one_that_cannot_begin_is_told_like_one_that_fails() -> None:
    record = Exchanges()
    exchange = record.begin(PLACE, "dispatch", (1, 2), on_gpu=False)
    with exchange.launching():
        assert record.under_way() is exchange, "the call may take its time"
        assert exchange.launched is None
    assert record.under_way() is None, "others may compute meanwhile"
    assert exchange.launched is not None
    again = record.begin(PLACE, "combine", (1, 2), on_gpu=False)
    with pytest.raises(RuntimeError, match=r"^block 3, combine \(ep ranks 4, 6\): no such rank$"), again.launching():
        raise RuntimeError("no such rank")
    assert record.under_way() is again
    assert again.launched is None


class Sent:
    """What a backend gives for an exchange that goes on by itself."""

    def __init__(self) -> None:
        self.future: torch.futures.Future[None] = torch.futures.Future()

    def get_future(self) -> torch.futures.Future[None]:
        return self.future


def followed() -> tuple[Exchange, torch.futures.Future[None]]:
    exchange, sent = Exchanges().begin(PLACE, "dispatch", (1, 2), on_gpu=False), Sent()
    exchange.follow(sent)  # type: ignore[arg-type]
    return exchange, sent.future


def test_what_failed_on_its_way_has_not_arrived() -> None:
    exchange, future = followed()
    future.set_result(None)
    assert exchange.arrived is not None
    exchange, future = followed()
    future.set_exception(RuntimeError("closed by peer"))  # type: ignore[arg-type]
    assert exchange.arrived is None


class Event:
    """Of a device: over at a millisecond, or not yet (None), or of a device that failed."""

    def __init__(self, at: float | None, failed: bool = False) -> None:
        self.at, self.failed, self.asked = at, failed, 0

    def query(self) -> bool:
        self.asked += 1
        if self.failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.at is not None

    def elapsed_time(self, other: "Event") -> float:
        """As CUDA does: it asks both."""
        if not (self.query() and other.query()):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        assert self.at is not None
        assert other.at is not None
        return other.at - self.at


def on_device(record: Exchanges, *events: Event) -> Exchange:
    """An exchange that began, arrived, was waited for and let the computation go on."""
    exchange: Any = record.begin((0, "ep", (0, 1)), "dispatch", (0, 0), on_gpu=False)
    exchange.began, exchange.arrived, exchange.waited, exchange.resumed = events
    return exchange  # type: ignore[no-any-return]


def device_step(origin: Event) -> Step:
    step: Any = Step(on_gpu=False, traced=False)
    step.clock.on_gpu, step.clock._origin, step.clock.host = True, origin, 100.0
    return step  # type: ignore[no-any-return]


def test_moments_of_a_device_are_asked_for_once() -> None:
    events, resumed, late = [Event(1000.0 * at) for at in (1, 2, 3)], Event(4000.0), Event(None)
    step = device_step(Event(0.0))
    step.exchanges = [
        on_device(Exchanges(), events[0], events[1], events[2], resumed),
        on_device(Exchanges(), events[0], late, events[2], late),
    ]
    assert step.seconds() == {0: LayerSeconds(1.0, 1.0, 0.0)}
    assert late.asked == 1, "and the others of its exchange not at all"
    assert [event.asked for event in (*events, resumed)] == [1, 1, 1, 1]


def test_a_device_that_failed_tells_nothing_and_stops_nobody() -> None:
    record, broken = Exchanges(), Event(1.0, failed=True)
    pending = on_device(record, Event(0.0), Event(None), Event(1.0), Event(None))
    assert record.under_way() is pending
    record.recent.clear()
    exchange = on_device(record, broken, broken, broken, broken)
    assert record.under_way() is None
    step = device_step(Event(0.0))
    step.exchanges = [exchange]
    assert step.clock.seconds(broken) is None  # type: ignore[arg-type]
    assert step.seconds() == {}
