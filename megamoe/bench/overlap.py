"""`bench overlap`: one MoE layer with its exchange in chunks against the same in one piece, measured and predicted.

Over two links: the one that ranks on this machine have, and the same made slow (`testing/slow_link.py`), as links
between machines are. The rates that the prediction is made from are measured in the same rounds, so whatever slows the
machine down slows both.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamoe.bench import allocator
from megamoe.bench.conditions import conditions
from megamoe.bench.probe import DTYPES, PLAIN, Probe, RatesSettings, Taken, each, take
from megamoe.bench.rates import hardware, middle
from megamoe.bench.report import as_table, closing, in_words, target
from megamoe.bench.rounds import ratios, spread
from megamoe.common.errors import ConfigError
from megamoe.config.moe import MoEConfig
from megamoe.config.routers import BalancedRouterConfig
from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
from megamoe.moe.dispatch.chunked import ChunkedDispatcher
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.parallel.exchanges import RECORD
from megamoe.parallel.groups import build_groups
from megamoe.parallel.link import Link
from megamoe.parallel.topology import Topology
from megamoe.plan.exchange import Place
from megamoe.plan.layer import Layer, LayerSize, Way
from megamoe.plan.limits import Verdict, judge
from megamoe.plan.rates import Rates
from megamoe.testing.ranks import run_ranks
from megamoe.testing.slow_link import SlowLink, slow_group

SLOW = "slow"
NEAR = 0.15
"""Error of a prediction that counts as agreement."""
HIDDEN = 0.80
"""Share that is hidden of what the model says can be."""
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class OverlapSettings:
    """One run of the benchmark.

    Attributes:
        rates: sizes of the layer, ranks, rounds and the like.
        chunks: numbers of chunks that are compared with one.
        slow: bytes per second of the slow link; 0: none is measured.
        latency: seconds of one exchange over it.
    """

    rates: RatesSettings = field(default_factory=lambda: RatesSettings(keep_freed_memory=True))
    chunks: tuple[int, ...] = (2, 4)
    slow: float = 100e6
    latency: float = 5e-4

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: sizes that do not fit, or more chunks than experts on a rank.
        """
        self.rates.check()
        if not self.chunks or min(self.chunks) < 2 or max(self.chunks) > self.rates.held or self.rates.ranks < 2:
            raise ConfigError(
                "These chunks cannot be compared with one.",
                got=f"--ranks {self.rates.ranks} --chunks {','.join(map(str, self.chunks))}",
                expected=f"2 ranks or more, and 2 to {self.rates.held} chunks, as many as a rank has experts",
            )


class Entry(NamedTuple):
    """A contestant: over which link, in how many chunks."""

    link: str
    chunks: int


class Waited(NamedTuple):
    """Of one pass forward and backward on one rank, in seconds."""

    exchange: float
    """With an exchange under way."""
    exposed: float
    """In which the computation stood and waited for one."""


class Measured(NamedTuple):
    """What one rank has to say, by round."""

    rates: Taken
    seconds: dict[Entry, list[float]]
    waited: dict[Entry, list[Waited]]


def bench_overlap(settings: OverlapSettings, note: str = "") -> dict[str, Any]:
    """Measure, predict, compare.

    Returns:
        A JSON-able report: settings, conditions, the clusters that were measured, and of every link and number of
        chunks the seconds measured and predicted, what was exposed, and ratios to one chunk in the same round.

    Raises:
        ConfigError: see `OverlapSettings.check`.
    """
    settings.check()
    where = conditions(note)
    ranks: list[Measured] = run_ranks(_measure, settings.rates.ranks, settings, timeout=TIMEOUT_SECONDS)
    found, first = middle([rank.rates for rank in ranks]), ranks[0]
    clusters = {
        link: hardware(settings.rates, found, link, f"{settings.rates.ranks} CPU ranks, {link}", ("measured here",))
        for link in found.kept
    }
    predicted = {
        entry: predict(settings.rates, entry.chunks, Rates(clusters[entry.link], settings.rates.dtype))
        for entry in first.seconds
    }
    results = [_result(entry, ranks, predicted) for entry in first.seconds]
    return {
        "benchmark": "overlap",
        "settings": asdict(settings),
        "conditions": where
        | {"allocator": first.rates.allocator, "others_before_rounds": spread(first.rates.others)._asdict()},
        "clusters": {link: cluster.model_dump(mode="json") for link, cluster in clusters.items()},
        "results": results,
        "targets": list(_targets(results)),
    }


def predict(settings: RatesSettings, chunks: int, rates: Rates) -> Verdict:
    """Of the layer that is measured, forward and backward."""
    s = settings
    choices = float(s.tokens * s.top_k)
    size = LayerSize(
        tokens=s.tokens,
        width=s.hidden,
        ffn=s.ffn,
        experts=s.experts,
        chosen=s.top_k,
        choices=choices,
        slots=choices,
        value_bytes=DTYPES[s.dtype].itemsize,
        routed=False,
    )
    layer = Layer(size, Place(s.ranks, s.ranks), Way("all_to_all", chunks), rates)
    return judge(layer.forward) + judge(layer.backward)


def _measure(settings: OverlapSettings) -> Measured:
    """On every rank."""
    warnings.simplefilter("ignore")
    s = settings.rates
    state = allocator.prepare(s.keep_freed_memory)
    group = build_groups(Topology(s.ranks, ep=s.ranks)).ep
    links = {PLAIN: Link(group.handle)}
    if settings.slow:
        links[SLOW] = Link(slow_group(list(group.ranks), SlowLink(settings.slow, settings.latency)))
    probe = Probe(s, links)
    waited: dict[Entry, list[Waited]] = {}
    layers = {
        _name(entry): _turn(s, links[entry.link], entry, group.place, waited.setdefault(entry, []))
        for entry in (Entry(link, chunks) for link in links for chunks in (1, *settings.chunks))
    }
    taken, kept, others = take(probe, {**probe.turns(), **layers}, s.rounds, s.warmup, s.patience, "overlap")
    seconds = {entry: taken.pop(_name(entry)) for entry in waited}
    after = {entry: values[s.warmup :] for entry, values in waited.items()}
    return Measured(Taken(state, others, each(probe, taken), kept), seconds, after)


def _name(entry: Entry) -> str:
    return f"layer {entry.link} {entry.chunks}"


def _turn(s: RatesSettings, link: Link, entry: Entry, place: int, waited: list[Waited]) -> Callable[[], None]:
    """One pass forward and backward of a layer of its own, with the weights and rows that all contestants have."""
    config = MoEConfig(
        num_experts=s.experts,
        top_k=s.top_k,
        expert_ffn_size=s.ffn,
        dispatcher="all_to_all",
        router=BalancedRouterConfig(),
    )
    layer = MoELayer(config, s.hidden, ExpertParallel(s.ranks, place, link.group))
    layer.dispatcher = AllToAllDispatcher(link) if entry.chunks == 1 else ChunkedDispatcher(link, chunks=entry.chunks)
    torch.manual_seed(place)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    layer.to(DTYPES[s.dtype]).train()
    rows_TD = torch.randn(s.tokens, s.hidden).to(DTYPES[s.dtype]).requires_grad_()
    grad_TD = torch.randn(s.tokens, s.hidden).to(DTYPES[s.dtype])
    return partial(_pass, layer, rows_TD, grad_TD, waited)


def _pass(layer: MoELayer, rows_TD: Tensor, grad_TD: Tensor, waited: list[Waited]) -> None:
    RECORD.begin_step(False)
    out_TD, _ = layer(rows_TD)
    out_TD.backward(grad_TD)
    found = RECORD.end_step() or {}
    waited.append(Waited(sum(s.exchange for s in found.values()), sum(s.exposed for s in found.values())))
    layer.zero_grad(set_to_none=True)
    rows_TD.grad = None


def _result(entry: Entry, ranks: list[Measured], predicted: dict[Entry, Verdict]) -> dict[str, Any]:
    """A pass is over when it is on all ranks; what is exposed is that of the rank that waits least, as the others wait
    for it as well."""
    seconds = _slowest(ranks, entry)
    whole = Entry(entry.link, 1)
    exposed, in_all = ([_least(round_) for round_ in _rounds(ranks, each)] for each in (entry, whole))
    model, model_whole = predicted[entry], predicted[whole]
    hideable = model_whole.exposed - model.exposed
    hidden = statistics.median(a - b for a, b in zip(in_all, exposed, strict=True))
    middle_seconds = statistics.median(seconds)
    return {
        "link": entry.link,
        "chunks": entry.chunks,
        "seconds": spread(seconds)._asdict(),
        "over_whole": ratios(seconds, _slowest(ranks, whole))._asdict(),
        "predicted_seconds": model.total,
        "predicted_over_measured": model.total / middle_seconds,
        "exposed_seconds": spread(exposed)._asdict(),
        "predicted_exposed_seconds": model.exposed,
        "predicted_exchange_seconds": model.exchanging,
        "hidden_seconds": hidden,
        "hideable_seconds": hideable,
        "hidden_of_hideable": hidden / hideable if entry.chunks > 1 and hideable > 0 else None,
        "predicted_over_whole": model.total / model_whole.total,
    }


def _slowest(ranks: list[Measured], entry: Entry) -> list[float]:
    return [max(values) for values in zip(*(rank.seconds[entry] for rank in ranks), strict=True)]


def _rounds(ranks: list[Measured], entry: Entry) -> Iterable[tuple[Waited, ...]]:
    return zip(*(rank.waited[entry] for rank in ranks), strict=True)


def _least(waited: tuple[Waited, ...]) -> float:
    return min(each.exposed for each in waited)


def _targets(results: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for result in results:
        name = f"{result['link']} link, {_chunks(result['chunks'])}"
        error = abs(result["predicted_over_measured"] - 1)
        yield target(f"{name}: prediction off the measured time", NEAR, error)
    slow = [result for result in results if result["link"] == SLOW and result["chunks"] > 1]
    for result in slow:
        name = f"{result['link']} link, {_chunks(result['chunks'])}"
        if (hidden := result["hidden_of_hideable"]) is not None:
            yield target(f"{name}: hidden, of what can be", HIDDEN, hidden, at_least=True)
        yield target(f"{name}: time over that of one chunk", 1.0, result["over_whole"]["median"])


def _chunks(number: int) -> str:
    return "1 chunk" if number == 1 else f"{number} chunks"


def markdown(report: dict[str, Any]) -> str:
    """The report as small tables."""
    s, settings = report["settings"]["rates"], report["settings"]
    slow = f"; the slow link carries {settings['slow'] / 1e6:,.0f} MB/s, {1e3 * settings['latency']:g} ms later"
    heading = (
        f"Forward and backward pass of one MoE layer, {s['ranks']} ranks of {s['tokens']} tokens, D {s['hidden']}, "
        f"F {s['ffn']}, E {s['experts']}, K {s['top_k']}, {s['dtype']}, even load, {s['rounds']} rounds"
        f"{slow if settings['slow'] else ''}. Median (smallest to largest). Predicted from the rates below, measured "
        "in the same rounds. Exposed: the computation stands and waits."
    )
    rows = [
        (
            r["link"],
            r["chunks"],
            in_words({k: 1e3 * v for k, v in r["seconds"].items()}),
            f"{1e3 * r['predicted_seconds']:.1f}",
            in_words(r["over_whole"]),
            f"{r['predicted_over_whole']:.2f}",
            in_words({k: 1e3 * v for k, v in r["exposed_seconds"].items()}),
            f"{1e3 * r['predicted_exposed_seconds']:.1f}",
            "" if r["hidden_of_hideable"] is None else f"{r['hidden_of_hideable']:.0%}",
        )
        for r in report["results"]
    ]
    columns = ("link", "chunks", "ms", "predicted", "over 1 chunk", "predicted", "ms exposed", "predicted")
    table = as_table((*columns, "hidden of what can be"), rows)
    return "\n\n".join([heading, table, _rates(report), *closing(report)]) + "\n"


def _rates(report: dict[str, Any]) -> str:
    rows = []
    for link, cluster in report["clusters"].items():
        inside, curves = cluster["inside"], cluster["experts"][report["settings"]["rates"]["dtype"]]
        speed = [f"{curve[len(curve) // 2]['flops_per_second'] / 1e9:.0f}" for curve in curves.values()]
        rows.append(
            (
                link,
                f"{inside['bytes_per_second'] / 1e6:,.0f} MB/s + {1e3 * inside['latency_seconds']:.2f} ms",
                f"{inside['computation_kept']:.0%} / {inside['exchange_kept']:.0%}",
                " / ".join(speed),
                f"{cluster['rows_bytes_per_second'] / 1e9:.1f} GB/s",
            )
        )
    header = ("link", "exchange", "computation / exchange keep beside each other")
    return as_table((*header, "experts: forward / inputs / weights, GFLOP/s", "rows into order"), rows)
