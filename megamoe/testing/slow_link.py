"""A process group whose exchanges take as long as over a slow link: gloo, and a clock.

    group = slow_group([0, 1], SlowLink(bytes_per_second=20e6, latency=1e-3))      # collective, like dist.new_group
    link = Link(group)                                                             # and nothing else changes

Only `all_to_all_single` is slow, blocking or not; everything else is gloo's. While a rank waits it uses no processor.

The model of the link, which is all there is to predict: it serves one exchange after the other, in the order in which
they were asked for. An exchange begins when all ranks have asked for it and the one before has ended, and then takes,
on all ranks alike,

    latency + max over ranks of max(bytes to other ranks, bytes from other ranks) / bytes_per_second

What gloo itself needs is hidden in that time, where it is less. (Ours: on one machine a delay counted from the rank's
own start would let rows arrive before a late rank could have sent them.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "slow_gloo"
_LIMIT = timedelta(minutes=5)


@dataclass(frozen=True)
class SlowLink:
    """How slow.

    Attributes:
        bytes_per_second: each way, at the same time.
        latency: seconds of each exchange besides its bytes.
    """

    bytes_per_second: float
    latency: float = 0.0

    def seconds(self, sent: float, received: float) -> float:
        """An exchange of so many bytes to and from other ranks, without waiting for its turn."""
        return self.latency + max(sent, received) / self.bytes_per_second


def slow_group(ranks: list[int], link: SlowLink, timeout: timedelta = _LIMIT) -> dist.ProcessGroup:
    """A group of those ranks over such a link. Collective: all ranks of the default group call it, in the same order.

    Args:
        timeout: of every collective of the group.

    Returns:
        The group; to ranks that are not in it, what `dist.new_group` returns to them.
    """

    def create(store: dist.Store, rank: int, size: int, limit: timedelta) -> dist.ProcessGroup:
        return _SlowGroup(store, rank, size, limit, link)

    # Once for each group, because the link cannot be passed on; torch warns of a second one by that name.
    dist.Backend._plugins.pop(BACKEND.upper(), None)
    dist.Backend.register_backend(BACKEND, create, devices=["cpu"])
    group: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, backend=BACKEND)
    return group


class _SlowGroup(dist.ProcessGroup):
    """A group of gloo that is asked for the time before it says that rows have arrived."""

    def __init__(self, store: Any, rank: int, size: int, limit: timedelta, link: SlowLink) -> None:
        # The one constructor that classes of Python can be made with; torch's type hints do not have it.
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo: Any = dist.ProcessGroupGloo(dist.PrefixStore("rows", store), rank, size, limit)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)
        self._starts: Any = dist.ProcessGroupGloo(dist.PrefixStore("starts", store), rank, size, limit)
        self._clock = _Clock(link)
        self._place, self._num_ranks = rank, size

    def alltoall_base(  # type: ignore[override]
        self, output: Tensor, input: Tensor, output_split_sizes: list[int], input_split_sizes: list[int], opts: Any
    ) -> dist.Work:
        """As in torch. Ends when the link says so."""
        sent, received = (self._elsewhere(*of) for of in ((input, input_split_sizes), (output, output_split_sizes)))
        mine = torch.tensor([time.monotonic(), sent, received], dtype=torch.float64)
        all_starts = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        with self._clock.lock:  # both in the same order on all ranks
            starts = self._starts.allgather([all_starts], [mine])
            rows = self._gloo.alltoall_base(output, input, output_split_sizes, input_split_sizes, opts)
            exchange = _Exchange(self._clock, rows, starts, all_starts, output)
            self._clock.queue.append(exchange)
        return exchange

    all_to_all_single = alltoall_base  # type: ignore[assignment]
    """As torch calls it from 2.13 on."""

    def _elsewhere(self, rows: Tensor, splits: list[int]) -> int:
        """Bytes of rows for, or from, other ranks."""
        own = splits[self._place] if splits else len(rows) // self._num_ranks
        return (len(rows) - own) * rows[:1].numel() * rows.element_size() if len(rows) else 0


class _Clock:
    """When each exchange ends. The monotonic clock is one for all processes of a machine."""

    def __init__(self, link: SlowLink) -> None:
        self.link = link
        self.lock, self.settling = threading.Lock(), threading.RLock()
        """Of beginning an exchange, and of finding out when one ends, which may wait for other ranks to begin it."""
        self.queue: deque[_Exchange] = deque()
        self.free = 0.0
        """When the link is free on all ranks."""
        self.watched: SimpleQueue[_Exchange] = SimpleQueue()
        """Those of which somebody wants a future."""
        self._watcher: threading.Thread | None = None

    def settle(self, exchange: _Exchange) -> None:
        """Find out when this exchange ends, and the ones before it. Waits until all ranks have asked for them."""
        with self.settling:
            while exchange.ends is None:
                first = self.queue.popleft()
                first.starts.wait()
                begins = max(self.free, *(float(start[0]) for start in first.all_starts))
                seconds = [self.link.seconds(float(start[1]), float(start[2])) for start in first.all_starts]
                first.ends, self.free = begins + max(seconds), begins + max(seconds)

    def watch(self, exchange: _Exchange) -> None:
        """Fulfil its future when it ends, from a thread that sleeps until then."""
        with self.lock:
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="slow link", daemon=True)
                self._watcher.start()
            self.watched.put(exchange)

    def _watch(self) -> None:
        while True:
            exchange = self.watched.get()
            try:
                exchange.wait()
            except RuntimeError as error:
                exchange.future.set_exception(error)  # type: ignore[arg-type]
            else:
                exchange.future.set_result(exchange.result())


class _Exchange(dist.Work):
    """An exchange under way."""

    def __init__(self, clock: _Clock, rows: dist.Work, starts: dist.Work, all_starts: list[Tensor], output: Tensor):
        super().__init__()
        self.starts, self.all_starts = starts, all_starts
        self.ends: float | None = None
        """By the monotonic clock."""
        self.future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._watched = False
        self._clock, self._rows, self._output = clock, rows, output

    def wait(self, timeout: timedelta = _LIMIT) -> bool:
        """Until the rows are here and the link had the time to carry them."""
        self._clock.settle(self)
        assert self.ends is not None
        arrived = bool(self._rows.wait())
        time.sleep(max(0.0, self.ends - time.monotonic()))
        return arrived

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        with self._clock.settling:
            waiting = [self] if self.ends is not None else list(self._clock.queue)
            if not all(exchange.ends is not None or exchange.starts.is_completed() for exchange in waiting):
                return False
            self._clock.settle(self)
        assert self.ends is not None
        return bool(self._rows.is_completed()) and time.monotonic() >= self.ends

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Done when the rows are here."""
        if not self._watched:
            self._watched = True
            self._clock.watch(self)
        return self.future

    def result(self) -> list[Tensor]:
        """The rows that arrived."""
        return [self._output]
