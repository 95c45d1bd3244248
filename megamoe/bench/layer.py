"""`bench layer`: forward and backward pass of one MoE layer against a dense SwiGLU of the same active FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megamoe.bench import allocator
from megamoe.bench.conditions import conditions
from megamoe.bench.contestants import (
    BROADCAST_SHARE,
    BROADCASTING,
    CONTESTANTS,
    DENSE,
    INSTALL,
    OURS,
    Contestant,
    LayerShape,
)
from megamoe.bench.quiet import wait_for_quiet
from megamoe.bench.report import as_table, closing, in_words, target
from megamoe.bench.rounds import Spread, in_turns, ratios, spread
from megamoe.testing.ranks import run_ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What the project promises at this size: ratio to dense per dtype, and its growth from 8 to 64 experts.
PROMISED_SIZE = {"tokens": 4096, "hidden": 512, "ffn": 1024, "top_k": 2, "threads": 2}
RATIO_LIMITS = {"fp32": 1.10, "bf16": 1.25}
GROWTH_LIMIT = 1.25
BROADCAST_MARGIN = 1.10
"""Over the predicted cost of broadcasting."""
TIMEOUT_SECONDS = 7200.0


@dataclass(frozen=True)
class LayerSettings:
    """One run of the benchmark.

    Attributes:
        experts: numbers of experts E, ascending; the active FLOPs are the same for all.
        contestants: names to measure besides the dense layer; empty: all.
        keep_freed_memory: have the C library keep freed memory (for all contestants) instead of its default.
        patience: seconds to wait at most, before each round, for a moment when others hardly use the machine.
    """

    tokens: int = 4096
    hidden: int = 512
    ffn: int = 1024
    experts: tuple[int, ...] = (8,)
    top_k: int = 2
    threads: int = 2
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    rounds: int = 15
    warmup: int = 2
    contestants: tuple[str, ...] = ()
    keep_freed_memory: bool = False
    patience: float = 0.0


class Entry(NamedTuple):
    """One contestant at one size; the dense layer has no experts."""

    name: str
    experts: int


def bench_layer(settings: LayerSettings, note: str = "") -> dict[str, Any]:
    """Measure, in a process of its own.

    Returns:
        A JSON-able report: settings, conditions, results (times in seconds and ratios to the dense layer of the same
        round), growth of the ratio over `experts`, and the promised limits with what was reached.
    """
    where = conditions(note)
    chosen = [c for c in CONTESTANTS if c.name in (DENSE, *settings.contestants) or not settings.contestants]
    present = [contestant.name for contestant in chosen if not contestant.missing()]
    state, others, seconds = run_ranks(_measure, 1, settings, present, timeout=TIMEOUT_SECONDS)[0]
    results = [row for dtype in settings.dtypes for row in _results(dtype, seconds[dtype])]
    growth = [row for dtype in settings.dtypes for row in _growth(dtype, seconds[dtype], settings)]
    broadcast = [row for dtype in settings.dtypes for row in _broadcast(dtype, seconds[dtype], settings)]
    return {
        "benchmark": "layer",
        "settings": asdict(settings),
        "conditions": where | {"allocator": state, "others_before_rounds": others},
        "results": results,
        "not_installed": [{"contestant": c.name, "install": INSTALL} for c in chosen if c.missing()],
        "growth": growth,
        "broadcast": broadcast,
        "targets": _targets(settings, results, growth, broadcast),
    }


def _measure(
    settings: LayerSettings, names: list[str]
) -> tuple[str, dict[str, float], dict[str, dict[Entry, list[float]]]]:
    """In the measuring process: the allocator's state, others' use of the CPUs, and seconds by dtype and contestant."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    state = allocator.prepare(settings.keep_freed_memory)
    others: list[float] = []
    seconds = {dtype: _measure_dtype(settings, names, dtype, others) for dtype in settings.dtypes}
    return state, spread(others)._asdict(), seconds


def _measure_dtype(
    settings: LayerSettings, names: list[str], dtype: str, others: list[float]
) -> dict[Entry, list[float]]:
    torch.manual_seed(0)
    rows_TD = torch.randn(settings.tokens, settings.hidden).to(DTYPES[dtype]).requires_grad_()
    grad_TD = torch.randn(settings.tokens, settings.hidden).to(DTYPES[dtype])
    layers = {
        entry: _build(contestant, LayerShape(settings.hidden, settings.ffn, entry.experts, settings.top_k), dtype)
        for contestant in CONTESTANTS
        if contestant.name in names
        for entry in _entries(contestant.name, settings)
    }

    def turn(layer: nn.Module) -> Callable[[], None]:
        return lambda: forward_backward(layer, rows_TD, grad_TD)

    def put_away(entry: Entry) -> None:
        layers[entry].zero_grad(set_to_none=True)
        rows_TD.grad = None

    def wait() -> None:
        others.append(wait_for_quiet(settings.patience))

    turns = {entry: turn(layer) for entry, layer in layers.items()}
    return in_turns(turns, settings.rounds, settings.warmup, wait, put_away, f"layer {dtype}")


def _entries(name: str, settings: LayerSettings) -> list[Entry]:
    return [Entry(name, 0)] if name == DENSE else [Entry(name, experts) for experts in settings.experts]


def _build(contestant: Contestant, shape: LayerShape, dtype: str) -> nn.Module:
    layer = contestant.build(shape)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    return layer.to(DTYPES[dtype]).train()


def forward_backward(layer: nn.Module, rows_TD: Tensor, grad_TD: Tensor) -> None:
    """One forward and backward pass, auxiliary losses included."""
    out_TD, losses = layer(rows_TD)
    torch.autograd.backward([out_TD, *losses], [grad_TD, *(None for _ in losses)])


def _results(dtype: str, seconds: dict[Entry, list[float]]) -> list[dict[str, Any]]:
    dense = seconds[Entry(DENSE, 0)]
    return [
        {
            "dtype": dtype,
            "contestant": entry.name,
            "experts": entry.experts,
            "seconds": spread(own)._asdict(),
            "ratio_to_dense": ratios(own, dense)._asdict(),
        }
        for entry, own in seconds.items()
    ]


def _growth(dtype: str, seconds: dict[Entry, list[float]], settings: LayerSettings) -> list[dict[str, Any]]:
    """How much longer each contestant takes with the most experts than with the fewest, round by round."""
    few, many = settings.experts[0], settings.experts[-1]
    names = dict.fromkeys(entry.name for entry in seconds if entry.name != DENSE) if many > few else {}

    def grown(name: str) -> Spread:
        return ratios(seconds[Entry(name, many)], seconds[Entry(name, few)])

    return [
        {"dtype": d, "contestant": n, "from": few, "to": many, **grown(n)._asdict()} for d in [dtype] for n in names
    ]


def _broadcast(dtype: str, seconds: dict[Entry, list[float]], settings: LayerSettings) -> list[dict[str, Any]]:
    """What broadcasting costs, round by round, and what it is predicted to: an uncertain token goes to E instead of K
    experts."""
    return [
        {
            "dtype": dtype,
            "experts": experts,
            "share": BROADCAST_SHARE,
            "predicted": 1 + BROADCAST_SHARE * (experts / settings.top_k - 1),
            **ratios(seconds[Entry(BROADCASTING, experts)], seconds[Entry(OURS, experts)])._asdict(),
        }
        for experts in settings.experts
        if Entry(BROADCASTING, experts) in seconds and Entry(OURS, experts) in seconds
    ]


def _targets(
    settings: LayerSettings,
    results: list[dict[str, Any]],
    growth: list[dict[str, Any]],
    broadcast: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The promises that this run can judge: only those of the promised size."""
    if any(getattr(settings, name) != value for name, value in PROMISED_SIZE.items()):
        return []
    judged = [
        (f"{row['dtype']}: time of megamoe, 8 experts, over dense", RATIO_LIMITS[row["dtype"]], row["ratio_to_dense"])
        for row in results
        if (row["contestant"], row["experts"]) == (OURS, 8)
    ]
    judged += [
        (f"{row['dtype']}: growth of megamoe from 8 to 64 experts", GROWTH_LIMIT, row)
        for row in growth
        if (row["contestant"], row["from"], row["to"]) == (OURS, 8, 64)
    ]
    judged += [
        (f"{row['dtype']}: broadcasting 5 % of the tokens, 8 experts", BROADCAST_MARGIN * row["predicted"], row)
        for row in broadcast
        if row["experts"] == 8
    ]
    return [target(name, limit, value["median"]) for name, limit, value in judged]


def markdown(report: dict[str, Any]) -> str:
    """The report as small tables."""
    size = report["settings"]
    heading = (
        f"Forward and backward pass of one layer: {size['tokens']} tokens, D {size['hidden']}, F {size['ffn']}, "
        f"K {size['top_k']}, {size['threads']} threads, {size['rounds']} rounds. Ratios are to a dense SwiGLU of width "
        "K * F in the same round: median (smallest to largest)."
    )
    times = [
        (
            row["dtype"],
            row["contestant"],
            row["experts"] or "",
            f"{row['seconds']['median'] * 1e3:.0f} ms",
            in_words(row["ratio_to_dense"]),
        )
        for row in report["results"]
    ]
    times += [("", row["contestant"], "", "not installed", f"`{row['install']}`") for row in report["not_installed"]]
    parts = [heading, as_table(("dtype", "layer", "experts", "median time", "over dense"), times)]
    if report["growth"]:
        growth = [(r["dtype"], r["contestant"], f"{r['from']} to {r['to']}", in_words(r)) for r in report["growth"]]
        parts.append(as_table(("dtype", "layer", "experts", "time grows by the factor"), growth))
    if report["broadcast"]:
        costs = [(r["dtype"], r["experts"], f"{r['predicted']:.2f}", in_words(r)) for r in report["broadcast"]]
        parts.append(as_table(("dtype", "experts", "5 % broadcast, predicted", "over megamoe without"), costs))
    return "\n\n".join([*parts, *closing(report)]) + "\n"
