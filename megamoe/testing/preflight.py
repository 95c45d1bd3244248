"""Are these nodes fit for a long training? What the ranks of a launch find out together; rank 0 judges."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from megamoe.common import env
from megamoe.testing.board import Board
from megamoe.testing.launches import free_port
from megamoe.testing.links import (
    Rates,
    Request,
    measure_on_this_rank,
    program_seconds,
    ranks_of,
    rates,
    slow_hosts,
)
from megamoe.testing.nodes import Facts, complaints
from megamoe.testing.parity_cases import Plan
from megamoe.testing.parity_judge import Finding
from megamoe.testing.parity_suite import run_launched

SILENT = "does not answer"
MEGABYTES_ON_GPU, MEGABYTES = 64.0, 4.0
"""Of an exchange: enough for the time of sending to outweigh that of starting to."""
_CLOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        minimum: GB/s that two nodes have to reach.
        minimum_bytes: free in the run's folder.
        megabytes: of an exchange; None: `MEGABYTES_ON_GPU` or `MEGABYTES`.
        limit: seconds for a node to answer, and for an exchange.
        plan: of the parity suite; None: left out.
    """

    minimum: float
    minimum_bytes: float
    megabytes: float | None
    limit: float
    plan: Plan | None


@dataclass
class Result:
    """What rank 0 knows in the end.

    Attributes:
        ranks: of every host.
        answering: the ranks that do, in order.
        nodes: what they say about themselves, by host; of those who answer.
        clocks: seconds by which a host's is ahead of the first one's.
        refused: reasons, by host.
        rates: of the links; None: not measured.
        parity: what came of the plan; empty: not tried.
    """

    ranks: dict[str, list[int]]
    answering: list[int]
    nodes: dict[str, Facts]
    clocks: dict[str, float]
    refused: dict[str, list[str]] = field(default_factory=dict)
    rates: Rates | None = None
    parity: list[Finding] = field(default_factory=list)

    def refuse(self, reasons: Mapping[str, Sequence[str]]) -> None:
        """Add reasons."""
        for host, more in reasons.items():
            self.refused.setdefault(host, []).extend(more)


def preflight(options: Options, facts: Facts, publish: Callable[[Result], int]) -> int:
    """Find out; the same exit code on all ranks, which is what `publish` gives on rank 0.

    Args:
        facts: of this rank.
        publish: called on rank 0 while the others wait: launchers end all when the first one leaves.

    Raises:
        LostPeerError: on other ranks than 0, where that one is silent.
    """
    board = Board("preflight", options.limit)
    board.tell(f"facts {env.rank()}", json.dumps(asdict(facts)))
    return _lead(options, board, publish) if env.rank() == 0 else _follow(options, board)


def _lead(options: Options, board: Board, publish: Callable[[Result], int]) -> int:
    result = _meet(options, board)
    if 1 < len(result.answering) == env.world_size():
        _measure(options, board, result)
    else:
        board.tell("links", "")
    # What it would find is known where nodes are refused.
    if options.plan is None or result.refused:
        board.tell("parity", "")
    else:
        board.tell("parity", "yes")
        run_launched(options.plan, result.parity.append, lambda outcome: None, board)
    code = publish(result)
    board.tell("exit code", str(code))
    # As long as others read here, the store has to stay.
    board.ask_all("left", result.answering[1:], options.limit)
    return code


def _follow(options: Options, board: Board) -> int:
    rank, patience = env.rank(), 3 * options.limit + _CLOCK_SECONDS
    board.ask("clock", patience)
    board.tell(f"clock {rank}", str(time.time()))
    if asked := board.ask("links", patience):
        port, words = json.loads(asked)
        request = Request(**words)
        board.tell(f"links {rank}", json.dumps(measure_on_this_rank(request, port)))
        patience += program_seconds(request)
    if options.plan is not None and board.ask("parity", patience):
        run_launched(options.plan, lambda finding: None, lambda outcome: None, board)
    code = int(board.ask("exit code", patience))
    board.tell(f"left {rank}", "")
    return code


def _meet(options: Options, board: Board) -> Result:
    """Who is there, and what the nodes say about themselves."""
    everyone = range(env.world_size())
    heard = {rank: Facts(**json.loads(text)) for rank, text in board.ask_all("facts", everyone, options.limit).items()}
    start = time.time()
    board.tell("clock", "")
    board.tell("clock 0", str(start))
    told = board.ask_all("clock", heard, _CLOCK_SECONDS)
    hosts = [heard[rank].host if rank in heard else _name_of(rank) for rank in everyone]
    nodes = {facts.host: facts for facts in heard.values() if facts.versions}
    clocks = {hosts[rank]: float(moment) - start for rank, moment in told.items()}
    result = Result(ranks_of(hosts), list(told), nodes, clocks)
    result.refuse({hosts[rank]: [SILENT] for rank in everyone if rank not in told})
    result.refuse(complaints(list(nodes.values()), clocks, options.minimum_bytes))
    return result


def _name_of(rank: int) -> str:
    """Of the host of a rank that said nothing."""
    return env.host_of(rank) or f"(host of rank {rank})"


def _measure(options: Options, board: Board, result: Result) -> None:
    placed = sorted((rank, host) for host, ranks in result.ranks.items() for rank in ranks)
    on_gpus = any(node.gpus for node in result.nodes.values())
    megabytes = options.megabytes or (MEGABYTES_ON_GPU if on_gpus else MEGABYTES)
    request = Request(tuple(host for _, host in placed), megabytes, options.limit)
    port = free_port()
    board.tell("links", json.dumps([port, asdict(request)]))
    board.tell("links 0", json.dumps(measure_on_this_rank(request, port)))
    told = board.ask_all("links", result.answering, program_seconds(request))
    result.rates = rates(request, {rank: json.loads(text) for rank, text in told.items()})
    result.refuse({host: [reason] for host, reason in slow_hosts(result.rates, options.minimum).items()})
