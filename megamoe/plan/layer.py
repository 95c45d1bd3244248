"""One MoE layer as tasks: forward and backward pass, whole or in chunks of the experts.

As in `moe/dispatch/chunked.py`. Forward (S: rows leave for their experts, B: shared experts, W: wait, E: experts, R:
results begin their way home, H: they are home), the link carrying one after the other:

    S0 S1 S2 ... B | W0 E0 R0 | W1 E1 R1 | W2 E2 R2 | ... | H0 H1 ...

Backward is the same from behind, with the gradients of all weights after those of all rows, beside the last way home.
Whole (one chunk), every exchange is waited for where it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from megamoe.config.hardware import Pass
from megamoe.plan.events import Placed, run
from megamoe.plan.exchange import Moves, Place, Rows, entry_bytes
from megamoe.plan.program import Places, Program
from megamoe.plan.rates import BETWEEN, INSIDE, Rates

ENTRY = 8
"""Bytes of a number of rows."""


@dataclass(frozen=True)
class LayerSize:
    """What one rank has to do in one MoE layer.

    Attributes:
        tokens: T of this rank in one micro-batch.
        width, ffn: D, and F of one expert (its part on this rank).
        experts, chosen: E and K.
        choices: rows that this rank sends to experts, T * K where none is dropped.
        slots: rows in the exchange, empty ones of a padded exchange included.
        shared_ffn: width of the shared experts together; 0: none.
        value_bytes: of one number.
        routed: whether the router has a matrix.
        part_ranks: ranks that hold parts of the same experts (etp).
    """

    tokens: float
    width: int
    ffn: int
    experts: int
    chosen: int
    choices: float
    slots: float
    value_bytes: int
    shared_ffn: int = 0
    routed: bool = True
    part_ranks: int = 1


@dataclass(frozen=True)
class Way:
    """How rows reach their experts.

    Attributes:
        name: all_to_all, deduplicated or hierarchical.
        chunks: n; 1: whole.
        counted: whether numbers of rows are exchanged first, for which the host waits.
    """

    name: str = "all_to_all"
    chunks: int = 1
    counted: bool = True


class Layer:
    """The tasks of one layer on one rank, all ranks alike."""

    def __init__(self, size: LayerSize, place: Place, way: Way, rates: Rates) -> None:
        self.size, self.place, self.way, self.rates = size, place, way, rates
        self.held = size.experts // place.ranks
        whole, more = divmod(self.held, way.chunks)
        self.parts = [whole + (chunk < more) for chunk in range(way.chunks)]
        """Experts of each chunk."""

    @cached_property
    def forward(self) -> list[Placed]:
        """The forward pass in time."""
        return self._run(self._forward)

    @cached_property
    def again(self) -> list[Placed]:
        """A forward pass that is run again for its backward pass: nothing has to come home."""
        return self._run(lambda program: self._forward(program, home=False))

    @cached_property
    def backward(self) -> list[Placed]:
        """The backward pass in time."""
        return self._run(self._backward)

    def _run(self, write: Callable[[Program], None]) -> list[Placed]:
        program = Program(self.rates)
        write(program)
        return run(program.tasks, self.rates.kept())

    def _forward(self, program: Program, home: bool = True) -> None:
        size = self.size
        ready = self._route(program)
        if self.way.counted and self.place.ranks > 1:
            counts = program.transfer("counts", "counts", self._counts(), ready)
            program.host_waits("wait for counts", counts)
        self._pipeline(program, ready, "dispatch", "combine", comes_home=home)
        if home:
            self._move(program, "unpack", size.tokens + size.slots, self._home)

    def _backward(self, program: Program) -> None:
        size, rates = self.size, self.rates
        self._pipeline(program, (), "combine backward", "dispatch backward", gradients=True)
        self._move(program, "unpack gradients", size.tokens + size.slots, self._home)
        if size.routed:
            flops = 4.0 * size.tokens * size.width * size.experts
            program.compute("router backward", "router", rates.product(size.tokens, flops) + self._scores(3), 15)

    def _pipeline(
        self,
        program: Program,
        ready: Places,
        there: str,
        back_home: str,
        gradients: bool = False,
        comes_home: bool = True,
    ) -> None:
        """All chunks there, through their experts, and home."""
        chunks, whole = range(self.way.chunks), self.way.chunks == 1
        arrived = [self._send(program, there, chunk, ready) for chunk in chunks]
        if not whole and not gradients:
            self._shared(program, gradients)
        self._home: Places = ()
        for chunk in chunks:
            done = self._experts(program, chunk, arrived[chunk], gradients)
            if whole and gradients:  # one backward pass of the experts, which gives its results all at once
                self._weights(program, chunk, done)
            if whole:
                self._shared(program, gradients)
            if comes_home:
                self._home += self._return(program, back_home, chunk, done)
        if gradients and not whole:
            self._shared(program, gradients)
            for chunk in chunks:
                self._weights(program, chunk, ())

    def _route(self, program: Program) -> Places:
        size = self.size
        flops = 2.0 * size.tokens * size.width * size.experts if size.routed else 0.0
        seconds = self.rates.product(size.tokens, flops) + self._scores(4)
        return program.compute("router", "router", seconds, 15)

    def _scores(self, times: int) -> float:
        """Scores [T, E] in fp32, read or written so many times."""
        return self.rates.moved(times * self.size.tokens * self.size.experts * 4)

    def _move(self, program: Program, name: str, rows: float, after: Places) -> Places:
        """Rows read and written in another order."""
        return program.compute(name, "move", self.rates.rows(rows * self._row_bytes), 3, after)

    def _send(self, program: Program, name: str, chunk: int, ready: Places) -> Places:
        slots = self._share(chunk, self.size.slots)
        packed = self._move(program, self._named("pack", chunk), min(self.size.tokens, slots) + slots, ready)
        return program.transfer(self._named(name, chunk), name, self._moves(chunk, name), packed)

    def _return(self, program: Program, name: str, chunk: int, done: Places) -> Places:
        return program.transfer(self._named(name, chunk), name, self._moves(chunk, name), done) or done

    def _experts(self, program: Program, chunk: int, arrived: Places, gradients: bool) -> Places:
        """Rows into the experts' order, through the experts, and into the order of the way home."""
        order = self._share(chunk, self.size.slots) * 2
        ready = self._move(program, self._named("arrange", chunk), order, arrived)
        ready = self._parts_meet(program, chunk, ready, "gather")
        kind: Pass = "inputs" if gradients else "forward"
        label = "gradients of rows" if gradients else "experts"
        ready = self._pass(program, self._named(label, chunk), label, kind, chunk, ready)
        ready = self._parts_meet(program, chunk, ready, "sum")
        return self._move(program, self._named("arrange back", chunk), order, ready)

    def _weights(self, program: Program, chunk: int, after: Places) -> Places:
        label = "gradients of weights"
        return self._pass(program, self._named(label, chunk), label, "weights", chunk, after)

    def _pass(self, program: Program, name: str, label: str, kind: Pass, chunk: int, after: Places) -> Places:
        size, experts = self.size, self.parts[chunk]
        rows = size.choices * size.part_ranks / self.held
        each = self.rates.expert_pass(kind, rows, size.width, size.ffn, size.value_bytes)
        # On a GPU one operation serves all experts of the chunk.
        operations = 6 if self.rates.hardware.launch.ahead else 6 * experts
        hint = f"{experts} experts, {rows:,.0f} rows each"
        return program.compute(name, label, experts * each, operations, after, hint)

    def _parts_meet(self, program: Program, chunk: int, after: Places, what: str) -> Places:
        """Ranks with parts of the same experts: everyone needs all rows, and the sum of the results."""
        others = self.size.part_ranks - 1
        if not others:
            return after
        sent = others * self._share(chunk, self.size.choices) * self._row_bytes
        kind = f"{what} over parts"
        return program.transfer(self._named(kind, chunk), "parts", [{INSIDE: sent}], after)

    def _shared(self, program: Program, gradients: bool) -> None:
        size = self.size
        if not size.shared_ffn:
            return
        kinds: tuple[Pass, ...] = ("inputs", "weights") if gradients else ("forward",)
        flops = 6.0 * size.tokens * size.width * size.shared_ffn
        moved = {"forward": 3, "inputs": 6, "weights": 0}
        seconds = sum(
            self.rates.product(size.tokens, flops)
            + self.rates.moved(moved[kind] * size.tokens * size.shared_ffn * size.value_bytes)
            for kind in kinds
        )
        name = "shared experts backward" if gradients else "shared experts"
        program.compute(name, "shared experts", seconds, 5 * len(kinds))

    def _counts(self) -> Moves:
        """Numbers of rows, to every other rank those of its experts."""
        inside, between = self.place.on_node - 1, self.place.ranks - self.place.on_node
        return [{INSIDE: inside * self.held * ENTRY, BETWEEN: between * self.held * ENTRY}]

    def _moves(self, chunk: int, phase: str) -> Moves:
        if self.place.ranks == 1:
            return []
        size, way = self.size, self.way.name
        rows = Rows(size.tokens, size.slots, size.experts, size.chosen, self.parts[chunk])
        entry = entry_bytes(way, phase, size.value_bytes)
        home = phase in ("combine", "dispatch backward")
        return rows.moves(way, self.place, self._row_bytes, entry, home=home)

    @property
    def _row_bytes(self) -> int:
        return self.size.width * self.size.value_bytes

    def _share(self, chunk: int, rows: float) -> float:
        return rows * self.parts[chunk] / self.held

    def _named(self, name: str, chunk: int) -> str:
        return name if self.way.chunks == 1 else f"{name} {chunk + 1}/{self.way.chunks}"
