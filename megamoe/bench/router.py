"""`bench router`: forward and backward pass of routers alone, rows in, plan out, against the linear top-k router."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megamoe.bench import allocator
from megamoe.bench.conditions import conditions
from megamoe.bench.layer import DTYPES
from megamoe.bench.quiet import wait_for_quiet
from megamoe.bench.report import as_table, closing, in_words, target
from megamoe.bench.rounds import in_turns, ratios, spread
from megamoe.config.moe import MoEConfig
from megamoe.moe.routers import Router, RouterSize, build_router
from megamoe.moe.routers.resonance import ResonanceRouter
from megamoe.testing.ranks import run_ranks

# What the project promises at this size: the resonance router is not slower than the one it replaces.
PROMISED_SIZE = {"tokens": 4096, "hidden": 512, "top_k": 2, "threads": 2}
PROMISED_EXPERTS = (8, 64)
RATIO_LIMIT = 1.0
TIMEOUT_SECONDS = 7200.0


@dataclass(frozen=True)
class RouterContestant:
    """One router, by its settings in the section `moe`."""

    name: str
    settings: dict[str, Any] = field(hash=False)

    def config(self, experts: int, top_k: int) -> MoEConfig:
        """The section.

        Raises:
            pydantic.ValidationError: this version of megamoe has no such settings.
        """
        return MoEConfig(num_experts=experts, top_k=top_k, **self.settings)

    def refused(self) -> str:
        """Why the settings cannot be used; empty if they can."""
        try:
            self.config(experts=8, top_k=2)
        except ValidationError as error:
            return "; ".join(".".join(map(str, e["loc"])) + ": " + e["msg"] for e in error.errors())
        return ""


TOPK, RESONANCE, FIXED = "topk softmax", "resonance grap_learned", "resonance grap"
CONTESTANTS = (
    RouterContestant(TOPK, {"router": {"type": "topk"}}),
    RouterContestant(RESONANCE, {"router": {"type": "resonance", "affinity": "grap_learned"}}),
    RouterContestant(FIXED, {"router": {"type": "resonance", "affinity": "grap"}}),
    RouterContestant("resonance etr_success", {"router": {"type": "resonance"}, "capacity": {"mode": "etr_success"}}),
)


@dataclass(frozen=True)
class RouterSettings:
    """One run of the benchmark.

    Attributes:
        experts: numbers of experts E.
        contestants: names to measure besides the top-k router; empty: all.
        keep_freed_memory: have the C library keep freed memory (for all contestants) instead of its default.
        patience: seconds to wait at most, before each round, for a moment when others hardly use the machine.
    """

    tokens: int = 4096
    hidden: int = 512
    experts: tuple[int, ...] = PROMISED_EXPERTS
    top_k: int = 2
    threads: int = 2
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    rounds: int = 31
    warmup: int = 3
    contestants: tuple[str, ...] = ()
    keep_freed_memory: bool = False
    patience: float = 0.0


class Entry(NamedTuple):
    """One contestant at one number of experts."""

    name: str
    experts: int


Seconds = dict[Entry, list[float]]


def bench_router(settings: RouterSettings, note: str = "") -> dict[str, Any]:
    """Measure, in a process of its own.

    Returns:
        A JSON-able report: settings, conditions, results (times in seconds and ratios to the top-k router with as many
        experts in the same round), the contestants that were left out with the reason, and the promised limits.
    """
    where = conditions(note)
    chosen = [c for c in CONTESTANTS if c.name in (TOPK, *settings.contestants) or not settings.contestants]
    refused = {contestant.name: contestant.refused() for contestant in chosen}
    present = [contestant for contestant in chosen if not refused[contestant.name]]
    state, others, seconds = run_ranks(_measure, 1, settings, present, timeout=TIMEOUT_SECONDS)[0]
    results = [row for dtype in settings.dtypes for row in _results(dtype, seconds[dtype])]
    return {
        "benchmark": "router",
        "settings": asdict(settings),
        "conditions": where | {"allocator": state, "others_before_rounds": others},
        "results": results,
        "left_out": [{"contestant": name, "reason": reason} for name, reason in refused.items() if reason],
        "targets": _targets(settings, results),
    }


def _measure(
    settings: RouterSettings, contestants: Sequence[RouterContestant]
) -> tuple[str, dict[str, float], dict[str, Seconds]]:
    """In the measuring process: the allocator's state, others' use of the CPUs, and seconds by dtype and contestant."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    state = allocator.prepare(settings.keep_freed_memory)
    others: list[float] = []
    seconds = {dtype: _measure_dtype(settings, contestants, dtype, others) for dtype in settings.dtypes}
    return state, spread(others)._asdict(), seconds


def _measure_dtype(
    settings: RouterSettings, contestants: Sequence[RouterContestant], dtype: str, others: list[float]
) -> Seconds:
    torch.manual_seed(0)
    rows_TD = torch.randn(settings.tokens, settings.hidden).to(DTYPES[dtype]).requires_grad_()
    probe_A = torch.randn(settings.tokens * settings.top_k)
    routers = {
        Entry(contestant.name, experts): build(contestant.config(experts, settings.top_k), rows_TD)
        for experts in settings.experts
        for contestant in contestants
    }

    def turn(router: Router) -> Callable[[], None]:
        return lambda: forward_backward(router, rows_TD, probe_A)

    def put_away(entry: Entry) -> None:
        routers[entry].zero_grad(set_to_none=True)
        rows_TD.grad = None

    def wait() -> None:
        others.append(wait_for_quiet(settings.patience))

    turns = {entry: turn(router) for entry, router in routers.items()}
    return in_turns(turns, settings.rounds, settings.warmup, wait, put_away, f"router {dtype}")


def build(config: MoEConfig, rows_TD: Tensor) -> Router:
    """A router for these rows, initialised, in training, with the running statistics of one step.

    The parameters have the rows' dtype; the running statistics stay in fp32, as in training.
    """
    size = RouterSize(rows_TD.shape[1], config.num_experts, config.top_k)
    router = build_router(config.router, size, config.capacity).train()
    for name, parameter in router.named_parameters():
        nn.init.normal_(parameter, std=0.02)
        if isinstance(router, ResonanceRouter) and name == "log_scale":
            nn.init.constant_(parameter, math.log(router.initial_scale))
        parameter.data = parameter.data.to(rows_TD.dtype)
    with torch.no_grad():
        router.update(router(rows_TD).observations)
    return router


def forward_backward(router: Router, rows_TD: Tensor, probe_A: Tensor) -> None:
    """One forward and backward pass: from a weighted sum of the plan's weights, and from its losses."""
    plan = router(rows_TD)
    total = torch.dot(plan.weights_A, probe_A[: len(plan.weights_A)].to(plan.weights_A.dtype))
    torch.autograd.backward([total, *plan.losses.values()])


def _results(dtype: str, seconds: Seconds) -> list[dict[str, Any]]:
    return [
        {
            "dtype": dtype,
            "contestant": entry.name,
            "experts": entry.experts,
            "seconds": spread(own)._asdict(),
            "ratio_to_topk": ratios(own, seconds[Entry(TOPK, entry.experts)])._asdict(),
        }
        for entry, own in seconds.items()
    ]


def _targets(settings: RouterSettings, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The promises that this run can judge: only those of the promised size."""
    if any(getattr(settings, name) != value for name, value in PROMISED_SIZE.items()):
        return []
    judged = [row for row in results if row["contestant"] in (FIXED, RESONANCE) and row["experts"] in PROMISED_EXPERTS]
    return [
        target(
            f"{row['dtype']}, {row['experts']} experts: {row['contestant']} over topk",
            RATIO_LIMIT,
            row["ratio_to_topk"]["median"],
        )
        for row in judged
    ]


def markdown(report: dict[str, Any]) -> str:
    """The report as small tables."""
    size = report["settings"]
    heading = (
        f"Forward and backward pass of one router: {size['tokens']} tokens, D {size['hidden']}, K {size['top_k']}, "
        f"{size['threads']} threads, {size['rounds']} rounds. Ratios are to the linear top-k router with as many "
        "experts in the same round: median (smallest to largest)."
    )
    times = [
        (
            row["dtype"],
            row["contestant"],
            row["experts"],
            f"{row['seconds']['median'] * 1e3:.2f} ms",
            in_words(row["ratio_to_topk"]),
        )
        for row in report["results"]
    ]
    times += [("", row["contestant"], "", "left out", row["reason"]) for row in report["left_out"]]
    table = as_table(("dtype", "router", "experts", "median time", "over topk"), times)
    return "\n\n".join([heading, table, *closing(report)]) + "\n"
