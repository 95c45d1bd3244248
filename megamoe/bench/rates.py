"""`bench rates`: how fast this machine multiplies, moves and exchanges, as a file that `plan --cluster` reads.

All ranks of the machine work at the same time, as they do in training. Everything is measured in turns, several rounds;
what counts is the median.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from megamoe.bench import allocator
from megamoe.bench.conditions import conditions
from megamoe.bench.probe import DTYPES, PLAIN, SMALL_OPERATIONS, Probe, RatesSettings, Taken, each, take
from megamoe.bench.report import as_table, closing
from megamoe.bench.rounds import spread
from megamoe.common.errors import ConfigError
from megamoe.config.hardware import (
    ExpertRates,
    HardwareConfig,
    LaunchRates,
    LinkRates,
    ProductRate,
)
from megamoe.parallel.groups import build_groups
from megamoe.parallel.link import Link
from megamoe.parallel.topology import Topology
from megamoe.testing.ranks import run_ranks

TIMEOUT_SECONDS = 1800.0

Seconds = dict[str, float]


def fitted(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and bytes per second of seconds = latency + bytes / rate, by least squares of the relative error."""
    weights = [1 / value**2 for value in seconds]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, sizes, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, seconds, strict=True)) / total
    covariance = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, sizes, seconds, strict=True))
    variance = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, sizes, strict=True))
    slope = max(covariance / variance if variance else 0.0, 1e-15)
    return max(0.0, mean_y - slope * mean_x), 1 / slope


class Found(NamedTuple):
    """What was measured.

    Attributes:
        seconds: medians of one piece of work, by name.
        kept: by link, shares of their speed that computation and exchange leave each other.
    """

    seconds: Seconds
    kept: dict[str, tuple[float, float]]


def hardware(settings: RatesSettings, found: Found, link: str, name: str, sources: Sequence[str]) -> HardwareConfig:
    """What was measured as the cluster that these ranks are, one node over the link of that name."""
    s, seconds, width = settings, found.seconds, DTYPES[settings.dtype].itemsize
    flops = 2.0 * s.hidden * s.ffn
    moved = s.tokens * (1 + s.top_k) * s.hidden * width
    return HardwareConfig(
        name=name,
        sources=tuple(sources),
        ranks_per_node=s.ranks,
        products={s.dtype: _curve((rows, rows * flops / value) for rows, value in _measured(seconds, "product"))},
        experts={s.dtype: _expert_rates(s, seconds)},
        memory_bytes_per_second=_three(2 * s.tokens * s.hidden * width / seconds["copy"]),
        rows_bytes_per_second=_three(moved / seconds["rows"]),
        launch=LaunchRates(seconds=_three(seconds["small"] / SMALL_OPERATIONS), ahead=s.device == "cuda"),
        inside=_link(s, found, link),
    )


def _link(s: RatesSettings, found: Found, name: str) -> LinkRates:
    times = _measured(found.seconds, name)
    others = (s.ranks - 1) / s.ranks * s.hidden * DTYPES[s.dtype].itemsize
    latency, rate = fitted([rows * others for rows, _ in times], [seconds for _, seconds in times])
    computation, exchange = found.kept[name]
    return LinkRates(
        latency_seconds=_three(latency),
        bytes_per_second=_three(rate),
        computation_kept=_share(computation),
        exchange_kept=_share(exchange),
    )


def _expert_rates(s: RatesSettings, seconds: Seconds) -> ExpertRates:
    flops = 6.0 * s.held * s.hidden * s.ffn
    curves = {
        name: _curve((rows, rows * flops / value) for rows, value in _measured(seconds, name))
        for name in ("forward", "inputs", "weights")
    }
    return ExpertRates(**curves)


def _measured(seconds: Seconds, name: str) -> list[tuple[int, float]]:
    """Of one kind by its number, ascending."""
    found = [(key.rpartition(" "), value) for key, value in seconds.items()]
    return sorted((int(number), value) for (kind, _, number), value in found if kind == name)


def _curve(points: Any) -> tuple[ProductRate, ...]:
    return tuple(ProductRate(rows=rows, flops_per_second=_three(rate)) for rows, rate in points)


def _three(value: float) -> float:
    """Three digits: no measurement here is better than that."""
    return float(f"{value:.3g}")


def _share(value: float) -> float:
    return min(1.0, max(0.01, round(value, 3)))


def middle(ranks: Sequence[Taken]) -> Found:
    """Medians over rounds, means over ranks."""

    def of(values: Iterable[Sequence[float]]) -> float:
        return statistics.fmean(map(statistics.median, values))

    first = ranks[0]
    seconds = {name: of(rank.seconds[name] for rank in ranks) for name in first.seconds}
    kept = {
        link: (
            of([a for a, _ in rank.kept[link]] for rank in ranks),
            of([b for _, b in rank.kept[link]] for rank in ranks),
        )
        for link in first.kept
    }
    return Found(seconds, kept)


def bench_rates(settings: RatesSettings, base: HardwareConfig | None = None, note: str = "") -> dict[str, Any]:
    """Measure on this machine.

    Args:
        base: a cluster whose links a single GPU takes over, as it can measure none.

    Returns:
        A JSON-able report: settings, conditions, seconds of every piece of work, and the cluster.

    Raises:
        ConfigError: see `RatesSettings.check`; or links of a GPU that nobody gave.
    """
    settings.check()
    where = conditions(note)
    if settings.device == "cuda":
        if base is None:
            raise ConfigError("One GPU measures no links.", todo="give a cluster's file that has them: --over FILE")
        ranks = [_measure(replace(settings, ranks=1))]
    else:
        ranks = run_ranks(_measure, settings.ranks, settings, timeout=TIMEOUT_SECONDS)
    where |= {"allocator": ranks[0].allocator, "others_before_rounds": spread(ranks[0].others)._asdict()}
    found = middle(ranks)
    cluster = _cluster(settings, found, where, base)
    return {
        "benchmark": "rates",
        "settings": asdict(settings),
        "conditions": where,
        "seconds": found.seconds,
        "cluster": cluster.model_dump(mode="json", exclude_none=True),
        "targets": [],
    }


def _measure(settings: RatesSettings) -> Taken:
    warnings.simplefilter("ignore")
    state = allocator.prepare(settings.keep_freed_memory)
    links = {}
    if settings.ranks > 1:
        links[PLAIN] = Link(build_groups(Topology(settings.ranks, ep=settings.ranks)).ep.handle)
    probe = Probe(settings, links, torch.device(settings.device))
    taken, kept, others = take(probe, probe.turns(), settings.rounds, settings.warmup, settings.patience, "rates")
    return Taken(state, others, each(probe, taken), kept)


def _cluster(
    settings: RatesSettings, found: Found, where: dict[str, Any], base: HardwareConfig | None
) -> HardwareConfig:
    packages, processor = where["packages"], where["cpu"]
    if settings.device == "cuda":
        processor = torch.cuda.get_device_name()
    measured = (
        f"measured by `python -m megamoe bench rates` on {where['date'][:10]}: {settings.ranks} rank(s), "
        f"{where['cpus']} CPUs, {processor}, torch {packages['torch']}, {settings.dtype}, medians of "
        f"{settings.rounds} rounds, {where['others_before_rounds']['median']:.0%} of the CPUs used by others"
    )
    sources = [measured, *([where["note"]] if where["note"] else [])]
    if base is None or settings.device != "cuda":
        return hardware(settings, found, PLAIN, f"{settings.ranks} ranks on {where['cpus']} CPUs", sources)
    seconds = found.seconds | {f"{PLAIN} {size}": 1.0 for size in (1, 2)}  # not used: the links are those of `base`
    own = hardware(settings, Found(seconds, {PLAIN: (1.0, 1.0)}), PLAIN, base.name, [*sources, *base.sources])
    taken = {"ranks_per_node": base.ranks_per_node, "inside": base.inside, "between": base.between}
    return own.model_copy(update={**taken, "products": {**base.products, **own.products}})


def write_cluster(report: dict[str, Any], path: Path) -> Path:
    """The cluster as a file for `plan --cluster`; returns `path`."""
    values = yaml.safe_dump(report["cluster"], sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    head = f"# {report['cluster']['name']}, measured by `python -m megamoe bench rates`.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + values, encoding="utf-8")
    return path


def markdown(report: dict[str, Any]) -> str:
    """The rates as a small table."""
    cluster, dtype = report["cluster"], report["settings"]["dtype"]
    rows = [("products", p["rows"], f"{p['flops_per_second'] / 1e9:,.1f} GFLOP/s") for p in cluster["products"][dtype]]
    for name, curve in cluster["experts"][dtype].items():
        rows += [(f"experts, {name}", p["rows"], f"{p['flops_per_second'] / 1e9:,.1f} GFLOP/s") for p in curve]
    rows.append(("memory", "", f"{cluster['memory_bytes_per_second'] / 1e9:.1f} GB/s"))
    rows.append(("rows into order", "", f"{cluster['rows_bytes_per_second'] / 1e9:.1f} GB/s"))
    rows.append(("an operation", "", f"{1e6 * cluster['launch']['seconds']:.1f} us"))
    inside = cluster["inside"]
    rows.append(
        ("exchange", "", f"{inside['bytes_per_second'] / 1e6:,.0f} MB/s, {1e6 * inside['latency_seconds']:,.0f} us")
    )
    rows.append(("computation beside it", "", f"{inside['computation_kept']:.0%} of its speed"))
    rows.append(("exchange beside computation", "", f"{inside['exchange_kept']:.0%} of its speed"))
    return "\n\n".join([as_table(("what", "rows", "rate"), rows), *closing(report)]) + "\n"
