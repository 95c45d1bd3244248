"""How fast ranks exchange: every pair of nodes and every pair of ranks of a node, in turn; and whose links are slow.

The measurement is a program of its own on every rank, so that a link on which nothing arrives, or a crash in a driver,
ends the program and not the rank that looks after it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megamoe.common import env
from megamoe.common.main import run_main
from megamoe.config.parallel import ParallelConfig
from megamoe.testing.board import Board
from megamoe.testing.parity_ranks import START_SECONDS, meeting_at, program_environment
from megamoe.training.setup import distributed

GB = 1e9
Pair = tuple[str, str]


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        hosts: of every rank.
        megabytes: that a rank sends to another one, and receives from it, at a time.
        repeats: how often, after one to warm up; the median counts.
        limit: seconds for one such exchange.
    """

    hosts: tuple[str, ...]
    megabytes: float
    limit: float
    repeats: int = 5


@dataclass(frozen=True)
class Rates:
    """In GB/s, each way at once.

    Attributes:
        between: of two hosts, all their ranks together; 0 where something did not arrive.
        within: of the slowest pair of ranks of a host; only hosts of several ranks.
    """

    between: Mapping[Pair, float]
    within: Mapping[str, float]


def tournament(players: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs that have nobody in common, in which everyone meets everyone once (the circle method)."""
    circle: list[int | None] = [*range(players), *([None] if players % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        facing = zip(circle, reversed(circle[len(circle) // 2 :]), strict=False)
        rounds.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def partners(hosts: Sequence[str]) -> list[dict[int, int]]:
    """Per round, who exchanges with whom: first nodes, rank by rank; then the ranks of each node among themselves."""
    nodes = list(ranks_of(hosts).values())
    rounds = []
    for meeting in tournament(len(nodes)):
        rounds.append([pair for a, b in meeting for pair in zip(nodes[a], nodes[b], strict=False)])
    inside = [[[(node[a], node[b]) for a, b in pairs] for pairs in tournament(len(node))] for node in nodes]
    for number in range(max(map(len, inside))):
        rounds.append([pair for node in inside if number < len(node) for pair in node[number]])
    return [{**dict(pairs), **{b: a for a, b in pairs}} for pairs in rounds if pairs]


def ranks_of(hosts: Sequence[str]) -> dict[str, list[int]]:
    """The ranks of every host."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return found


def measure_on_this_rank(request: Request, port: int) -> dict[str, float]:
    """Run the program on this rank: seconds of an exchange by the partner's rank, as text; infinite: nothing arrived.

    Args:
        port: where the programs meet, on the host of rank 0.
    """
    with tempfile.TemporaryDirectory(prefix="megamoe-links-") as folder:
        answers = Path(folder) / "answers"
        words = [sys.executable, "-m", __name__, json.dumps(asdict(request)), str(answers)]
        with subprocess.Popen(words, env=program_environment(meeting_at(port)), stdout=sys.stderr) as program:
            try:
                program.wait(program_seconds(request))
            except subprocess.TimeoutExpired:
                program.kill()
        lines = answers.read_text().splitlines() if answers.exists() else []
    # A later line about the same partner replaces the earlier one, which said that the exchange began.
    return {partner: float(seconds) for partner, seconds in (line.split() for line in lines)}


def program_seconds(request: Request) -> float:
    """How long the program may take. Some exchanges may pass their limit, but not all of many."""
    return START_SECONDS + 5 * request.limit + len(partners(request.hosts))


def rates(request: Request, seconds: Mapping[int, Mapping[str, float]]) -> Rates:
    """From what every rank measured. Of two times of an exchange, the longer one counts."""

    def slowest(a: int, b: int) -> float:
        return max(seconds.get(a, {}).get(str(b), math.inf), seconds.get(b, {}).get(str(a), math.inf))

    nodes, size = ranks_of(request.hosts), request.megabytes * 1e6
    between = {}
    for one, other in combinations(nodes, 2):
        pairs = list(zip(nodes[one], nodes[other], strict=False))
        between[one, other] = len(pairs) * size / max(slowest(a, b) for a, b in pairs) / GB
    within = {
        host: size / max(slowest(a, b) for a, b in combinations(ranks, 2)) / GB
        for host, ranks in nodes.items()
        if len(ranks) > 1
    }
    return Rates(between, within)


def slow_hosts(found: Rates, minimum: float) -> dict[str, str]:
    """The hosts to do without, and why: as few as leave no slow pair among the others.

    A pair is slow below `minimum`, or below half of what a host usually reaches with its best partner. (Not half of the
    median of all pairs: one bad host of three is in two of three.) The host in most slow pairs goes first; several go
    together where nothing tells them apart.

    Args:
        minimum: GB/s between two hosts.
    """
    best = {host: max(rate for _, rate in _pairs_of(host, found.between)) for pair in found.between for host in pair}
    usual = median(best.values()) if best else 0.0
    floor = max(minimum, usual / 2)
    left = {pair: rate for pair, rate in found.between.items() if rate < floor}
    refused: dict[str, str] = {}
    while left:
        count = {host: sum(host in pair for pair in left) for pair in left for host in pair}
        worst = [host for host, times in count.items() if times == max(count.values())]
        for host in worst:
            other, rate = min(_pairs_of(host, left), key=lambda partner: partner[1])
            doubt = ", and it may as well be that one" if other in worst else ""
            refused[host] = f"{rate:.3g} GB/s with {other}{doubt}; at least {floor:.3g} expected"
        left = {pair: rate for pair, rate in left.items() if not set(pair) & set(worst)}
    floor = median(found.within.values()) / 2 if found.within else 0.0
    return refused | {
        host: f"{rate:.3g} GB/s between two of its ranks; at least {floor:.3g} expected, half of the median"
        for host, rate in found.within.items()
        if rate < floor
    }


def _pairs_of(host: str, between: Mapping[Pair, float]) -> list[tuple[str, float]]:
    """Its partners, with the rates."""
    return [(b if a == host else a, rate) for (a, b), rate in between.items() if host in (a, b)]


def main() -> None:
    """The program: meet the others, exchange with one after the other, write a line about each."""
    request = Request(**json.loads(sys.argv[1]))
    with distributed(ParallelConfig(), request.limit / 60) as runtime:
        dist.barrier()  # NCCL makes its connections in a collective of all
        board = Board("links", request.limit)
        size = int(1e6 * request.megabytes)
        buffers = [torch.zeros(size, dtype=torch.uint8, device=runtime.device) for _ in range(2)]
        with Path(sys.argv[2]).open("w", buffering=1) as answers:
            for number, pairs in enumerate(partners(request.hosts)):
                if (partner := pairs.get(runtime.rank)) is not None:
                    answers.write(f"{partner} inf\n")
                    answers.write(f"{partner} {_seconds(buffers, partner, request)}\n")
                # Pairs of the next round would disturb those of this one.
                board.meet(f"the end of round {number}", (request.repeats + 2) * request.limit)
        board.tell(f"left {runtime.rank}", "")
        if runtime.rank == 0:
            # As long as others read here, the store has to stay.
            board.ask_all("left", range(1, runtime.world_size), request.limit)
        # In good order, leaving would wait for an exchange that failed.
        os._exit(0)


def _exchange(buffers: list[torch.Tensor], partner: int, limit: float) -> None:
    sent, received = buffers
    transfers = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(transfers):
        work.wait(timedelta(seconds=limit))
    if received.is_cuda:
        torch.cuda.synchronize()


def _seconds(buffers: list[torch.Tensor], partner: int, request: Request) -> float:
    """Median time of an exchange; infinite where one fails, after which no further one is tried."""
    taken = []
    for _ in range(request.repeats + 1):
        start = time.perf_counter()
        try:
            _exchange(buffers, partner, request.limit)
        except RuntimeError as error:
            sys.stderr.write(f"[rank {env.rank()}] {str(error).splitlines()[0]}\n")
            return math.inf
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


if __name__ == "__main__":
    run_main(main)
