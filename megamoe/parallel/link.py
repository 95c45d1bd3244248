"""Exchanges of rows between the ranks of one group, begun and waited for apart from each other."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from megamoe.parallel.exchanges import RECORD, Exchange
from megamoe.parallel.groups import ProcessGroup


class Transfer:
    """Rows under way. Keeps what leaves until all has arrived."""

    def __init__(self, arriving: Tensor, leaving: Tensor, work: dist.Work, exchange: Exchange) -> None:
        self._arriving, self._leaving, self._work, self._exchange = arriving, leaving, work, exchange

    def wait(self) -> Tensor:
        """The rows that arrived. On a GPU the current stream waits, and not the host. Once.

        Raises:
            RuntimeError: the exchange failed; as the backend raises it, with block and phase before its text.
        """
        with self._exchange:
            self._work.wait()
        arrived = self._arriving
        del self._arriving, self._leaving, self._work
        return arrived


class Link:
    """Exchanges over one group for one MoE layer. Every rank begins the same ones in the same order.

    Each is written down in :data:`megamoe.parallel.exchanges.RECORD`: how long it took, and who waited.

    Attributes:
        layer, axis: the block whose rows these are, and the axis of the group, for whoever is told of an exchange.
        num_ranks: P.
        rank: place of this rank in the group.
    """

    def __init__(self, group: ProcessGroup, layer: int = 0, axis: str = "ep") -> None:
        self.group, self.layer, self.axis = group, layer, axis
        self.num_ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._place = (layer, axis, tuple(dist.get_process_group_ranks(group)))

    def start(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, phase: str) -> Transfer:
        """Begin to send rows; others may compute until `wait` of what this returns.

        Args:
            rows: [N, ...], by the rank that they go to.
            send, receive: rows to and from each of the P ranks; None: equally many.
            phase: what the exchange is for, as "dispatch"; with the word backward where it carries gradients.

        Raises:
            RuntimeError: it cannot begin; told as a failure in `Transfer.wait` is.
        """
        transfer = self._start(rows, send, receive, phase)
        transfer._exchange.follow(transfer._work)
        return transfer

    def exchange(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, phase: str) -> Tensor:
        """Send rows and wait: what arrived, by the rank that it came from."""
        return self._start(rows, send, receive, phase).wait()  # whose end is the arrival

    def _start(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, phase: str) -> Transfer:
        num_arriving = rows.shape[0] if receive is None else sum(receive)
        arriving, leaving = rows.new_empty(num_arriving, *rows.shape[1:]), rows.contiguous()
        num_bytes = self._elsewhere(rows, send, rows.shape[0]), self._elsewhere(rows, receive, num_arriving)
        exchange = RECORD.begin(self._place, phase, num_bytes, rows.is_cuda)
        with exchange.launching():
            work = dist.all_to_all_single(arriving, leaving, receive, send, group=self.group, async_op=True)
        assert work is not None  # as this rank is in the group
        return Transfer(arriving, leaving, work, exchange)

    def _elsewhere(self, rows: Tensor, splits: list[int] | None, num_rows: int) -> int:
        """Bytes of all those rows but this rank's own."""
        own = num_rows // self.num_ranks if splits is None else splits[self.rank]
        return (num_rows - own) * math.prod(rows.shape[1:]) * rows.element_size()
