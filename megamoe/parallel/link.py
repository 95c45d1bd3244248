"""Exchanges of rows between the ranks of one group, begun and waited for apart from each other."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megamoe.parallel.groups import ProcessGroup


class Transfer:
    """Rows under way. Keeps what leaves until all has arrived."""

    def __init__(self, arriving: Tensor, leaving: Tensor, work: dist.Work) -> None:
        self._arriving, self._leaving, self._work = arriving, leaving, work

    def wait(self) -> Tensor:
        """The rows that arrived. On a GPU the current stream waits, and not the host. Once."""
        self._work.wait()
        arrived = self._arriving
        del self._arriving, self._leaving, self._work
        return arrived


class Link:
    """Exchanges over one group for one MoE layer. Every rank begins the same ones in the same order.

    Attributes:
        layer, axis: the block whose rows these are, and the axis of the group, for whoever is told of an exchange.
        num_ranks: P.
        rank: place of this rank in the group.
    """

    def __init__(self, group: ProcessGroup, layer: int = 0, axis: str = "ep") -> None:
        self.group, self.layer, self.axis = group, layer, axis
        self.num_ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def start(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, phase: str) -> Transfer:
        """Begin to send rows; others may compute until `wait` of what this returns.

        Args:
            rows: [N, ...], by the rank that they go to.
            send, receive: rows to and from each of the P ranks; None: equally many.
            phase: what the exchange is for, as "dispatch".
        """
        num_arriving = rows.shape[0] if receive is None else sum(receive)
        arriving, leaving = rows.new_empty(num_arriving, *rows.shape[1:]), rows.contiguous()
        work = dist.all_to_all_single(arriving, leaving, receive, send, group=self.group, async_op=True)
        assert work is not None  # as this rank is in the group
        return Transfer(arriving, leaving, work)

    def exchange(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, phase: str) -> Tensor:
        """Send rows and wait: what arrived, by the rank that it came from."""
        return self.start(rows, send, receive, phase).wait()
