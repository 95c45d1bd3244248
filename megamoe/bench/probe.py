"""What a rank of this machine does in one turn of a measurement of rates: products, rows in order, exchanges."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.bench.quiet import wait_for_quiet
from megamoe.bench.rounds import in_turns
from megamoe.common.errors import ConfigError
from megamoe.config.hardware import Precision
from megamoe.ops.expert_ffn_blocked import BLOCKED
from megamoe.ops.expert_ffn_fused import FUSED
from megamoe.ops.plan import plan_rows
from megamoe.ops.rows import permute_rows
from megamoe.parallel.collectives import barrier, rank
from megamoe.parallel.link import Link

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL_OPERATIONS = 200
"""In one turn, as one alone is shorter than the clock's steps."""
LEAST_SECONDS = 2e-3
"""A turn repeats shorter work until it takes about so long."""
PLAIN = "exchange"
"""The link that the backend gives, in names of turns."""

Seconds = dict[str, float]
Turns = dict[str, Callable[[], None]]


@dataclass(frozen=True)
class RatesSettings:
    """One measurement.

    Attributes:
        tokens, hidden, ffn, experts, top_k: of the layer whose sizes are measured; T, D, F, E, K.
        device: "cpu": ranks over gloo; "cuda": one rank on the GPU at hand, which can measure no link.
    """

    ranks: int = 2
    tokens: int = 2048
    hidden: int = 256
    ffn: int = 512
    experts: int = 8
    top_k: int = 2
    dtype: Precision = "fp32"
    device: str = "cpu"
    rounds: int = 11
    warmup: int = 2
    keep_freed_memory: bool = False
    patience: float = 0.0

    @property
    def held(self) -> int:
        """Experts L of a rank."""
        return self.experts // self.ranks

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: sizes that do not fit each other, or a device that is not there.
        """
        numbers = (self.ranks, self.tokens, self.hidden, self.ffn, self.experts, self.top_k, self.rounds)
        if min(numbers) < 1 or self.experts % self.ranks or self.top_k > self.experts:
            raise ConfigError(
                "These sizes make no layer.",
                got=f"--ranks {self.ranks} --experts {self.experts} --top-k {self.top_k}",
                expected="all at least 1, ranks that divide the experts, at most as many choices as experts",
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("There is no GPU here.", got="--device cuda", todo="use --device cpu")


@dataclass
class Probe:
    """What one rank measures, as turns that `in_turns` takes.

    Args:
        links: by name; exchanges over each are measured.
    """

    settings: RatesSettings
    links: dict[str, Link]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: dict[str, int] = field(default_factory=dict)
    """How often a turn repeats its work."""

    def __post_init__(self) -> None:
        s = self.settings
        self.dtype = DTYPES[s.dtype]
        torch.manual_seed(0)
        self.product_rows = _around(s.tokens)
        self.expert_rows = _around(s.tokens * s.top_k * s.ranks // s.experts)
        self.sizes = [max(s.ranks, s.tokens * s.top_k // divisor) // s.ranks * s.ranks for divisor in (64, 8, 2, 1)]
        """Rows of the exchanges that are measured, own ones included."""
        self.rows = {size: self._drawn(size, s.hidden) for size in {*self.sizes, s.tokens}}

    def turns(self) -> Turns:
        """Everything, by name."""
        found = self._products() | self._experts() | self._movement()
        for name, link in self.links.items():
            found |= self._exchanges(name, link)
        return found

    def _drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def _repeated(self, name: str, work: Callable[[], object]) -> Callable[[], None]:
        """A turn of about `LEAST_SECONDS` or one piece of work; counts are agreed on by measuring once."""
        began = time.perf_counter()
        work()
        self._ended()
        self.repeats[name] = max(1, min(50, round(LEAST_SECONDS / max(1e-6, time.perf_counter() - began))))

        def turn() -> None:
            for _ in range(self.repeats[name]):
                work()
            self._ended()

        return turn

    def _ended(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _products(self) -> Turns:
        weight_FD = self._drawn(self.settings.ffn, self.settings.hidden)
        found: Turns = {}
        for rows in self.product_rows:
            x = self._drawn(rows, self.settings.hidden)
            found |= self._named("product", rows, partial(torch.matmul, x, weight_FD.t()))
        return found

    def _experts(self) -> Turns:
        s, found = self.settings, Turns()
        split = FUSED if self.device.type == "cuda" else BLOCKED
        for rows in self.expert_rows:
            x, grad = self._drawn(s.held * rows, s.hidden), self._drawn(s.held * rows, s.hidden)
            matrices = tuple(self._drawn(s.held, *shape) * 0.02 for shape in ((s.ffn, s.hidden), (s.hidden, s.ffn)))
            w1, w2 = matrices
            weights, gates = (w1, w2, w1.clone()), torch.ones(len(x), device=self.device)
            counts, into = torch.full((s.held,), rows, device=self.device), (w1.clone(), w2.clone(), w1.clone())
            kept = split.forward(x, gates, weights, counts)[1]
            later = split.backward(grad, x, gates, kept, weights, counts)[2]
            found |= self._named("forward", rows, partial(split.forward, x, gates, weights, counts))
            found |= self._named("inputs", rows, partial(split.backward, grad, x, gates, kept, weights, counts))
            found |= self._named("weights", rows, partial(later, into))
        return found

    def _named(self, name: str, rows: int, work: Callable[[], object]) -> Turns:
        return {f"{name} {rows}": self._repeated(f"{name} {rows}", work)}

    def _movement(self) -> Turns:
        s = self.settings
        x = self._drawn(s.tokens, s.hidden)
        copy, one = torch.empty_like(x), torch.ones(1, device=self.device, requires_grad=True)
        chosen = torch.rand(s.tokens, s.experts, device=self.device).topk(s.top_k).indices
        place, source, _ = plan_rows(chosen, s.experts)

        def small() -> None:
            for _ in range(SMALL_OPERATIONS):
                one + 1

        return {
            "copy": self._repeated("copy", lambda: copy.copy_(x)),
            "rows": self._repeated("rows", lambda: permute_rows(x, source, place)),
            "small": self._repeated("small", small),
        }

    def _exchanges(self, name: str, link: Link) -> Turns:
        # Every rank as often, whatever it takes: none of them decides.
        self.repeats |= {f"{name} {size}": 1 for size in self.sizes}

        def exchange(size: int) -> None:
            link.exchange(self.rows[size], None, None, "rates")

        return {f"{name} {size}": partial(exchange, size) for size in self.sizes}

    def beside(self, link: Link) -> tuple[float, float]:
        """Pieces of computation per second while exchanges are under way, and seconds of one of those."""
        x, number = self.rows[self.settings.tokens], 4
        square = self._drawn(self.settings.hidden, self.settings.hidden)
        rows = self.rows[self.sizes[-1]]
        began, ended = time.perf_counter(), list[float]()

        def wait() -> None:
            for transfer in transfers:
                transfer.wait()
            ended.append(time.perf_counter())

        transfers = [link.start(rows, None, None, "rates") for _ in range(number)]
        waiter = threading.Thread(target=wait)
        waiter.start()
        pieces = 0
        while not ended:
            x @ square
            pieces += 1
        waiter.join()
        return pieces / (time.perf_counter() - began), (ended[0] - began) / number

    def alone(self) -> float:
        """The same pieces per second, with nothing beside them."""
        x, square = self.rows[self.settings.tokens], self._drawn(self.settings.hidden, self.settings.hidden)
        began, pieces = time.perf_counter(), 0
        while time.perf_counter() < began + 0.05:
            x @ square
            pieces += 1
        return pieces / (time.perf_counter() - began)


def _around(rows: int) -> list[int]:
    """Numbers of rows of a curve: those of the layer, and fewer and more of them."""
    return sorted({max(8, rows // 16), max(8, rows // 4), max(8, rows), max(8, rows * 2)})


def each(probe: Probe, taken: dict[str, list[float]]) -> dict[str, list[float]]:
    """By round, of one piece of work."""
    return {name: [value / probe.repeats[name] for value in values] for name, values in taken.items()}


class Taken(NamedTuple):
    """What one rank measured, by round.

    Attributes:
        kept: by link, shares of their speed that computation and exchange leave each other.
    """

    allocator: str
    others: list[float]
    seconds: dict[str, list[float]]
    kept: dict[str, list[tuple[float, float]]]


def take(
    probe: Probe, turns: Turns, rounds: int, warmup: int, patience: float, title: str
) -> tuple[dict[str, list[float]], dict[str, list[tuple[float, float]]], list[float]]:
    """On every rank: seconds of every turn and round, what computation and exchange leave each other over every link in
    every round, and how much of the machine others used before a round. All ranks begin a turn together."""
    kept: dict[str, list[tuple[float, float]]] = {name: [] for name in probe.links}
    others: list[float] = []

    def before() -> None:
        for name, link in probe.links.items():
            barrier()
            alone = probe.alone()
            barrier()
            began = time.perf_counter()
            link.exchange(probe.rows[probe.sizes[-1]], None, None, "rates")
            exchange = time.perf_counter() - began
            barrier()
            pieces, beside = probe.beside(link)
            kept[name].append((pieces / alone, exchange / beside))
        if rank() == 0:
            others.append(wait_for_quiet(patience))
        barrier()

    seconds = in_turns(turns, rounds, warmup, before, lambda name: barrier(), title)
    return seconds, {name: values[warmup:] for name, values in kept.items()}, others or [0.0]
