"""Short messages between the ranks that a launcher started, without a process group."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from megamoe.common import env
from megamoe.common.errors import LostPeerError


class Board:
    """Messages on the store at which the ranks meet.

    No process group: these ranks only look after the programs that train or measure, keep off the devices, and go on
    when some of them are silent.

    Args:
        topic: part of every message's name, so that several boards of a launch keep apart.
        seconds: limit for finding the rank that serves the store.

    Raises:
        LostPeerError: it cannot be found.
    """

    def __init__(self, topic: str, seconds: float) -> None:
        self._topic = topic
        env.export_rendezvous()
        # torchrun serves a store itself, and says so by this variable.
        serves = env.rank() == 0 and not env.flag("TORCHELASTIC_USE_AGENT_STORE")
        host, port = env.master_address(), env.master_port()
        try:
            self._store = dist.TCPStore(
                host,
                port,
                is_master=serves,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=seconds),
            )
        except dist.DistError as error:
            raise LostPeerError(
                "Rank 0 cannot be reached.",
                got=str(error).splitlines()[0],
                expected=f"rank 0 at {host}:{port}, within {seconds:.0f} s",
                todo="check that its host runs, and that this host reaches it by that name or address",
            ) from error

    def tell(self, what: str, value: str) -> None:
        """Write a message."""
        self._store.set(f"{self._topic}: {what}", f"={value}")

    def ask(self, what: str, seconds: float) -> str:
        """Read a message, for which this waits.

        Raises:
            LostPeerError: it does not come in time, or the store is gone.
        """
        try:
            self._store.wait([f"{self._topic}: {what}"], timedelta(seconds=max(seconds, 0.1)))
            return self._store.get(f"{self._topic}: {what}").decode().removeprefix("=")
        except dist.DistError as error:
            raise LostPeerError(
                "Another rank did not answer in time.",
                got=f"nothing about '{what}' within {seconds:.0f} s",
                expected="all ranks running",
                todo="look for the first error of the other ranks",
            ) from error

    def meet(self, where: str, seconds: float) -> None:
        """Wait for every rank to come here.

        Raises:
            LostPeerError: one does not come in time.
        """
        if self._store.add(f"{self._topic}: at {where}", 1) == env.world_size():
            self.tell(where, "")
        self.ask(where, seconds)

    def ask_all(self, what: str, ranks: Iterable[int], seconds: float) -> dict[int, str]:
        """The messages ``<what> <rank>`` of these ranks, as far as they come within the limit."""
        deadline, answers = time.monotonic() + seconds, {}
        for rank in ranks:
            try:
                answers[rank] = self.ask(f"{what} {rank}", deadline - time.monotonic())
            except LostPeerError:
                continue
        return answers
