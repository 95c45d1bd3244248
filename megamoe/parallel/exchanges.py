"""The exchanges of this process: how long each took, how long the computation stood for it, which one is under way.

What is *exposed* is the time that the computation stood for an exchange: on a CPU the time inside of the calls that
begin it and that wait for it, on a GPU the time between an event before the wait and one behind it on the stream that
waits. It has two causes, which a rank alone cannot tell apart: the link, and peers that came later because they had
more to compute. The rank that is last waits for the link only, so what the others wait longer than it is imbalance
(ours).

Nothing here waits for a device. An exchange costs a microsecond or two; one that others compute beside costs some tens
on a CPU, where gloo's thread tells when the rows arrived, and four events on a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megamoe.parallel.moments import Clock, Moment, now

KEPT = 512
"""Of the last exchanges, for whoever asks what happened before a failure."""
BACKWARD = "backward"
"""In the phase of every exchange of gradients."""


class Exchange:
    """One exchange of rows as this rank sees it. Entered as a context while the computation stands waiting for it.

    Attributes:
        number: of this process, from 1 on.
        layer, axis, phase: as in :class:`megamoe.parallel.link.Link`.
        ranks: of the group, in the whole job.
        sent_bytes, received_bytes: to and from other ranks.
        began: rows were ready to leave.
        launched: the backend has taken it over; None on a GPU, whose streams do not notice.
        arrived: all had come; where only the wait shows it, the end of the wait.
        waited, resumed: the computation stood in between.
    """

    __slots__ = (
        *("_on_gpu", "_record", "arrived", "axis", "began", "launched", "layer", "number", "phase", "ranks"),
        *("received_bytes", "resumed", "sent_bytes", "waited"),
    )

    def __init__(
        self,
        record: Exchanges,
        number: int,
        place: tuple[int, str, Sequence[int]],
        phase: str,
        num_bytes: tuple[int, int],
        on_gpu: bool,
    ) -> None:
        self._record, self.number, self.phase, self._on_gpu = record, number, phase, on_gpu
        self.layer, self.axis, self.ranks = place
        self.sent_bytes, self.received_bytes = num_bytes
        self.began: Moment = now(on_gpu)
        self.launched: Moment | None = None
        self.arrived: Moment | None = None
        self.waited: Moment | None = None
        self.resumed: Moment | None = None

    def __str__(self) -> str:
        return place_text(self.layer, self.phase, self.axis, self.ranks)

    def launch(self) -> None:
        """The backend has taken it over."""
        if not self._on_gpu:
            self.launched = time.perf_counter()

    def follow(self, work: dist.Work) -> None:
        """Learn of the arrival from `work`, however late it is waited for."""
        if self._on_gpu:
            with torch.cuda.stream(self._record.beside()):
                work.wait()  # of that stream
                self.arrived = now(True)
            return
        with contextlib.suppress(RuntimeError, NotImplementedError):  # not every backend has one
            work.get_future().add_done_callback(self._on_arrival)

    def _on_arrival(self, future: Any) -> None:
        at = time.perf_counter()
        with contextlib.suppress(Exception):  # the wait for it says so
            future.value()
            self.arrived = at

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Around the call in which the backend takes it over. It may fail there as in the wait, and be told alike."""
        self._record.waiting = self
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise
        self.launch()
        self._record.waiting = None

    def __enter__(self) -> None:
        self._record.waiting = self
        self.waited = now(self._on_gpu)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail(error)
            return
        self.resumed = now(self._on_gpu)
        self.arrived = self.resumed if self.arrived is None else self.arrived
        self._record.waiting = None

    def _fail(self, error: BaseException) -> None:
        """It stays the one that is waited for, and the error says which it was."""
        self.arrived = None
        if isinstance(error, RuntimeError):
            raise type(error)(f"{self}: {error}") from error

    def pending(self) -> bool:
        """Whether a stream of a GPU has to wait for it, or will have to.

        Raises:
            RuntimeError: the device has failed.
        """
        return not (self.resumed is None or isinstance(self.resumed, float) or self.resumed.query())

    def moments(self, clock: Clock) -> tuple[float, float, float, float, float] | None:
        """Seconds at which it began, was launched, arrived, was waited for and let the computation go on; None: nobody
        has waited for it."""
        resumed = clock.seconds(self.resumed)
        if resumed is None:  # the others need not be asked for
            return None
        began, waited = clock.seconds(self.began), clock.seconds(self.waited)
        arrived = resumed if self.arrived is self.resumed else clock.seconds(self.arrived)
        launched = began if self.launched is None else clock.seconds(self.launched)
        found = began, launched, arrived, waited, resumed
        return None if None in found else found  # type: ignore[return-value]

    def summary(self) -> dict[str, Any]:
        """What others are told of it."""
        names = ("number", "layer", "axis", "phase")
        return {name: getattr(self, name) for name in names} | {"ranks": list(self.ranks)}


def place_text(layer: int, phase: str, axis: str, ranks: Sequence[int]) -> str:
    """An exchange in words."""
    named = ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]} … {ranks[-1]}"
    return f"block {layer}, {phase} ({axis} ranks {named})"


class Span(NamedTuple):
    """A piece of the computation."""

    name: str
    layer: int | None
    direction: str
    """forward, backward, or recomputed: a forward pass that is done again for the backward one. Empty: none of them."""
    begin: Moment
    end: Moment


class LayerSeconds(NamedTuple):
    """Of one block in one optimizer step, on this rank."""

    exchange: float
    """With an exchange of the block under way, from its start to the arrival."""
    exposed: float
    """That the computation stood waiting for one."""
    backward: float
    """Of these, for exchanges of gradients."""


NO_SECONDS = LayerSeconds(0.0, 0.0, 0.0)


class Step:
    """What was recorded of one optimizer step, in the order of its beginning.

    Attributes:
        spans: None: nobody asked for them.
    """

    def __init__(self, on_gpu: bool, traced: bool) -> None:
        self.clock, self.exchanges = Clock(on_gpu), list[Exchange]()
        self.spans: list[Span] | None = [] if traced else None

    def seconds(self) -> dict[int, LayerSeconds]:
        """By block. Forward exchanges of a recomputed block occur twice and count twice."""
        sums: dict[int, list[float]] = {}
        for exchange in self.exchanges:
            moments = exchange.moments(self.clock)
            if moments is None:
                continue
            began, launched, arrived, waited, resumed = moments
            so_far = sums.setdefault(exchange.layer, [0.0, 0.0, 0.0, began])
            so_far[0] += max(0.0, arrived - max(began, so_far[3]))  # two at a time count once
            so_far[3] = max(arrived, so_far[3])
            exposed = resumed - waited + launched - began
            so_far[1] += exposed
            if BACKWARD in exchange.phase:
                so_far[2] += exposed
        return {layer: LayerSeconds(*so_far[:3]) for layer, so_far in sums.items()}


class Exchanges:
    """The record of a process.

    Attributes:
        recent: the last exchanges, the newest last.
        waiting: the one that the computation stands in at this moment, or that failed; for other threads to read.
        last: the last optimizer step that is over.
        traced: whether the next step's spans are wanted.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.recent: deque[Exchange] = deque(maxlen=kept)
        self.waiting: Exchange | None = None
        self.last: Step | None = None
        self.traced = False
        self._step: Step | None = None
        self._count = 0
        self._beside: torch.cuda.Stream | None = None

    def begin(
        self, place: tuple[int, str, Sequence[int]], phase: str, num_bytes: tuple[int, int], on_gpu: bool
    ) -> Exchange:
        """An exchange begins.

        Args:
            place: block, axis, and the group's ranks in the whole job.
            num_bytes: to and from other ranks.
            on_gpu: where its rows lie.
        """
        self._count += 1
        exchange = Exchange(self, self._count, place, phase, num_bytes, on_gpu)
        self.recent.append(exchange)
        if self._step is not None:
            self._step.exchanges.append(exchange)
        return exchange

    def begin_step(self, on_gpu: bool) -> None:
        """An optimizer step begins: what follows counts."""
        self._step = Step(on_gpu, self.traced)

    def end_step(self) -> dict[int, LayerSeconds] | None:
        """The step is over: what it took by block. On a GPU that of the step before, whose end somebody has waited for
        by now, and None in the first one: on all ranks alike."""
        ended, before = self._step, self.last
        assert ended is not None, "a step begins before it ends"
        self.last, self._step = ended, None
        known = before if ended.clock.on_gpu else ended
        return None if known is None else known.seconds()

    @contextlib.contextmanager
    def span(self, name: str, layer: int | None = None, direction: str = "") -> Iterator[None]:
        """A piece of the computation, for a trace if one is made."""
        if self._step is None or self._step.spans is None:
            yield
            return
        begin = self.moment()
        yield
        self.add_span(name, layer, direction, begin)

    def moment(self) -> Moment:
        """Now, of the step under way."""
        assert self._step is not None
        return now(self._step.clock.on_gpu)

    def add_span(self, name: str, layer: int | None, direction: str, begin: Moment) -> None:
        """A piece of the computation that ends now."""
        if self._step is not None and self._step.spans is not None:
            self._step.spans.append(Span(name, layer, direction, begin, self.moment()))

    def under_way(self) -> Exchange | None:
        """The exchange that the computation waits for, as any thread sees it; on a GPU the first that has not arrived,
        whether or not anything waits for it already. None: there is none, or a device that failed does not tell."""
        if self.waiting is not None:
            return self.waiting
        try:
            return next((exchange for exchange in tuple(self.recent) if exchange.pending()), None)
        except RuntimeError:
            return None

    def clock(self) -> Clock:
        """Of the step under way, or the last one."""
        step = self._step or self.last
        return Clock(on_gpu=False) if step is None else step.clock

    def beside(self) -> torch.cuda.Stream:
        """A stream that notices arrivals."""
        if self._beside is None:
            self._beside = torch.cuda.Stream()
        return self._beside


RECORD = Exchanges()
"""Of this process: links are deep inside of the model, and whoever asks is another thread, or outside."""
