"""A plan: the chosen way of exchanging rows, the others beside it, and both as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from megamoe.common.errors import ConfigError
from megamoe.config.hardware import HardwareConfig
from megamoe.config.run import RunConfig
from megamoe.plan.exchange import IN_CHUNKS, WAYS
from megamoe.plan.layer import Layer, Way
from megamoe.plan.limits import Verdict, judge
from megamoe.plan.rates import Rates
from megamoe.plan.sizes import Cluster
from megamoe.plan.step import Step

COMPARED = (1, 2, 4, 8)
MOST_TRIED = 32
"""Chunks that are tried for the best number; more are never faster, as every exchange has its latency."""


@dataclass(frozen=True)
class Choice:
    """One way with its prediction."""

    layer: Layer
    step: Step

    @cached_property
    def verdict(self) -> Verdict:
        """Of the layer, forward and backward."""
        return judge(self.layer.forward) + judge(self.layer.backward)


class Plan:
    """Predictions for a configuration on a cluster.

    Args:
        chunks: of the exchange; "auto": the number with the shortest layer, where there can be chunks; None: as a run
            with this configuration has.

    Raises:
        ConfigError: no rates for the precision, links or experts; or more chunks than experts of a rank.
        TopologyError: the ranks do not fit the configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        hardware: HardwareConfig,
        nodes: int,
        chunks: int | Literal["auto"] | None = None,
    ) -> None:
        self.cluster = Cluster(config, hardware, nodes)
        self.rates = Rates(hardware, config.training.precision)
        most = self.cluster.most_chunks()
        chunks = self.cluster.chunks() if chunks is None else chunks
        if chunks != "auto" and not 1 <= chunks <= most:
            raise ConfigError(
                "A chunk holds at least one expert of every rank.",
                got=f"{chunks} chunks, {most} experts on a rank",
                expected=f"1 to {most}",
            )
        self.place, self.size = self.cluster.place(), self.cluster.layer_size()
        way = self.cluster.way
        if chunks == "auto":
            chunks = self.best(way) if way in IN_CHUNKS else 1
        self.chosen = self._choice(way, chunks)

    def best(self, way: str) -> int:
        """Number of chunks with the shortest layer; the smallest of several."""
        numbers = range(1, min(self.cluster.most_chunks(), MOST_TRIED if self.place.ranks > 1 else 1) + 1)
        return min(numbers, key=lambda chunks: self._seconds(way, chunks))

    @cached_property
    def alternatives(self) -> list[Choice]:
        """Every way, each in several numbers of chunks."""
        if self.place.ranks == 1:
            return [self.chosen]
        names = [name for name in WAYS if name != "hierarchical" or self.place.nodes > 1]
        best = self.chosen.layer.way.chunks
        numbers = sorted({n for n in (*COMPARED, best) if n <= self.cluster.most_chunks()})
        return [self._choice(name, chunks) for name in names for chunks in numbers]

    @cached_property
    def whole(self) -> Choice:
        """The chosen way without chunks."""
        return self._choice(self.chosen.layer.way.name, 1)

    def _layer(self, name: str, chunks: int) -> Layer:
        # Rows that travel once for several experts are counted anew, so only the plain way can be padded.
        counted = not (self.cluster.padded and name == "all_to_all")
        size = self.size if not counted else replace(self.size, slots=self.size.choices)
        return Layer(size, self.place, Way(name, chunks, counted), self.rates)

    def _choice(self, name: str, chunks: int) -> Choice:
        layer = self._layer(name, chunks)
        return Choice(layer, Step(self.cluster, layer))

    def _seconds(self, name: str, chunks: int) -> float:
        layer = self._layer(name, chunks)
        return (judge(layer.forward) + judge(layer.backward)).total

    def text(self) -> str:
        """The whole plan for a terminal."""
        return "\n".join(self._lines())

    def summary(self) -> str:
        """Where, and with which exchange, in one line."""
        place, way, config = self.place, self.chosen.layer.way, self.cluster.config
        ranks = "1 rank" if self.cluster.world_size == 1 else f"{self.cluster.world_size} ranks"
        nodes = "1 node" if self.cluster.nodes == 1 else f"{self.cluster.nodes} nodes"
        over = f"ep {place.ranks}" + (f" over {place.nodes} nodes" if place.nodes > 1 else "")
        chunks = "not chunked" if way.chunks == 1 else f"{way.chunks} chunks"
        named = way.name
        if config.moe.dispatcher in ("push", "groupwise"):
            named = f"{config.moe.dispatcher} (not modelled, planned as {way.name})"
        return f"{ranks} on {nodes}, {over}, {named}, {chunks}"

    @staticmethod
    def _doubt(way: str) -> str:
        return "" if way in IN_CHUNKS else f", if {way} could be cut into chunks"

    def _lines(self) -> Iterator[str]:
        layer, verdict, step = self.chosen.layer, self.chosen.verdict, self.chosen.step
        forward, backward = judge(layer.forward), judge(layer.backward)
        yield f"{self.cluster.hardware.name}: {self.summary()}"
        yield ""
        yield f"One MoE layer, {self.size.tokens:,.0f} tokens per rank, experts of {layer.held} per rank"
        yield f"  time         {_ms(verdict.total)} = forward {_ms(forward.total)} + backward {_ms(backward.total)}"
        yield f"  exchange     {_ms(verdict.exchanging)}, of which {verdict.hidden_share:.0%} is hidden"
        yield f"  exposed      {_ms(verdict.exposed)}: {_ms(verdict.edges)} before the first and after the last expert"
        yield f"  limited by   {verdict.limit}"
        if self.place.ranks > 1:
            yield f"  best         {_chunks(self.best(layer.way.name))}{self._doubt(layer.way.name)}"
        yield ""
        total = step.verdict
        yield f"One optimizer step, {_count(step.micro_batches, 'micro-batch', 'es')}"
        yield f"  time         {_ms(total.total)}, {step.tokens_per_second:,.0f} tokens/s in all"
        for part in step.parts:
            yield f"  {part.name:<36}{_ms(part.verdict.total):>12}{part.verdict.total / total.total:>7.0%}"
        yield ""
        yield from _table(self.alternatives, self.chosen)
        if any(_imagined(choice) for choice in self.alternatives):
            yield f"* not built: only {' and '.join(IN_CHUNKS)}, padded or not, can be cut into chunks"
        yield ""
        yield "Rates: " + "; ".join(self.cluster.hardware.sources)


def _table(choices: Sequence[Choice], chosen: Choice) -> Iterator[str]:
    header = ("exchange", "chunks", "layer", "exchange", "exposed", "hidden", "step")
    yield f"  {header[0]:<14}{header[1]:>6}" + "".join(f"{word:>12}" for word in header[2:]) + "  limited by"
    for choice in choices:
        way, verdict = choice.layer.way, choice.verdict
        mark = ">" if way == chosen.layer.way else "*" if _imagined(choice) else " "
        cells = (
            _ms(verdict.total),
            _ms(verdict.exchanging),
            _ms(verdict.exposed),
            f"{verdict.hidden_share:.0%}",
            _ms(choice.step.verdict.total),
        )
        yield f"{mark} {way.name:<14}{way.chunks:>6}" + "".join(f"{c:>12}" for c in cells) + f"  {verdict.limit}"


def _imagined(choice: Choice) -> bool:
    return choice.layer.way.chunks > 1 and choice.layer.way.name not in IN_CHUNKS


def _ms(seconds: float) -> str:
    """Three digits at least, never more than two after the point."""
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _chunks(number: int) -> str:
    return "1 chunk (whole)" if number == 1 else f"{number} chunks"


def _count(number: int, word: str, ending: str) -> str:
    return f"{number} {word}{'' if number == 1 else ending}"
