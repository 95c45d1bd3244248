"""Writing down what the host does in an MoE layer, one operation after the other."""

from __future__ import annotations

from collections.abc import Iterable

from megamoe.plan.events import Task
from megamoe.plan.exchange import Moves
from megamoe.plan.rates import COMPUTE, HOST, LINKS, Rates

Places = tuple[int, ...]


class Program:
    """Tasks in the order in which the host issues them.

    An exchange begins when all computation that was issued before it is done: on a GPU it follows the stream that
    computes, on a CPU the host does the computation itself. A host that runs ahead (GPU) spends a moment on every
    operation besides, before the device can begin it.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates, self.tasks = rates, list[Task]()
        self._launch = rates.hardware.launch
        self._last: Places = ()
        self._host: Places = ()

    def compute(
        self, name: str, kind: str, seconds: float, operations: float, after: Iterable[int] = (), hint: str = ""
    ) -> Places:
        """Computation of so many operations, after what it needs."""
        if not self._launch.ahead:
            seconds += operations * self._launch.seconds
            waits = tuple(after)
        else:
            waits = (*after, *self._issue(name, operations))
        self._last = self._add(Task(name, COMPUTE, seconds, waits, kind, hint))
        return self._last

    def transfer(self, name: str, kind: str, moves: Moves, after: Iterable[int]) -> Places:
        """An exchange, step by step; what has to end before its rows are there."""
        waits: Places = (*after, *self._last, *(self._issue(name, 1.0) if self._launch.ahead else ()))
        for step in moves:
            sent = {link: size for link, size in step.items() if size > 0}
            if not sent:
                continue
            waits = tuple(
                place
                for link in LINKS
                if link in sent
                for place in self._add(
                    Task(name, link, self.rates.transfer(link, sent[link]), waits, kind, f"{sent[link]:,.0f} bytes")
                )
            )
        return waits

    def host_waits(self, name: str, after: Iterable[int]) -> None:
        """The host issues nothing before these have ended, as it has to read what came of them."""
        if self._launch.ahead:
            self._host = self._add(Task(name, HOST, 0.0, tuple(after), "wait"))
        else:
            self._last = self._add(Task(name, COMPUTE, 0.0, tuple(after), "wait"))

    def _issue(self, name: str, operations: float) -> Places:
        if not self._launch.seconds:
            return self._host
        self._host = self._add(Task(f"issue {name}", HOST, operations * self._launch.seconds, (), "launch"))
        return self._host

    def _add(self, task: Task) -> Places:
        self.tasks.append(task)
        return (len(self.tasks) - 1,)
