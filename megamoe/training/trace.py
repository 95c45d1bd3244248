"""What every rank does during one optimizer step, to be looked at in Perfetto or chrome://tracing.

    <output_dir>/traces/step_5.json             all ranks, one below the other
    <output_dir>/traces/step_5_rank_0.json      one rank
    <output_dir>/logs/exchanges_rank_0.json     the last exchanges of a rank that failed, or that lost another one

A rank has a lane of computation (blocks and their parts, forward, recomputed and backward, and where it stands waiting
for an exchange) and as many lanes of exchanges as were under way at a time, each from its start to its arrival. On a
GPU the moments are those of the stream. Clocks of different machines are only as equal as their system keeps them.

Ours instead of torch.profiler: a step has thousands of operators on every rank, and what an exchange hides behind is
seen from some hundred spans, which cost nothing that would change the picture.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.common.log import get_logger
from megamoe.model.attention import Attention
from megamoe.model.block import Block
from megamoe.model.decoder import Head
from megamoe.moe.decisions import recomputing
from megamoe.moe.experts import Experts
from megamoe.moe.ffn import FeedForward
from megamoe.moe.routers.base import Router
from megamoe.parallel import collectives
from megamoe.parallel.exchanges import RECORD, Exchange, Span
from megamoe.parallel.moments import Clock, Moment

FOLDER = "traces"
_PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    *((Block, "block"), (Attention, "attention"), (Router, "router"), (Experts, "experts")),
    *((FeedForward, "feed-forward"), (Head, "head")),
)
_SHARED = "shared experts"
_COMPUTATION, _EXCHANGES = 0, 1
"""Lanes; further ones of exchanges follow."""

Event = dict[str, Any]
Trace = dict[str, Any]

log = get_logger("megamoe.trace")


class Tracer:
    """Traces those optimizer steps that somebody wants to see.

    Args:
        steps: their numbers.
        folder: the run's.
        model: of this rank.
        rank: of this process.
    """

    def __init__(self, steps: Iterable[int], folder: Path, model: nn.Module, rank: int) -> None:
        self._steps, self._folder, self._model, self._rank = frozenset(steps), folder / FOLDER, model, rank

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Trace what is done inside, one optimizer step to its last number, if it is wanted. Collective then."""
        if step not in self._steps:
            yield
            return
        hooks = _watch(self._model)
        RECORD.traced = True
        try:
            yield
        finally:
            RECORD.traced = False
            for hook in hooks:
                hook.remove()
        self._write(step)

    def _write(self, step: int) -> None:
        """A rank that cannot write or read says so and goes on: the run does not depend on it."""
        done = RECORD.last
        assert done is not None
        own = trace_of(done.clock, done.exchanges, done.spans or [], self._rank)
        path = _write(self._folder / f"step_{step}_rank_{self._rank}.json", own)
        written = collectives.gather_objects(str(path) if path is not None else None)
        if self._rank == 0:
            self._merge(step, written)

    def _merge(self, step: int, written: Sequence[str | None]) -> None:
        """One file of those of all ranks that this one can read: there may be no folder that they share."""
        parts = [_read(Path(path)) if path is not None else None for path in written]
        if missing := [str(rank) for rank, part in enumerate(parts) if part is None]:
            log.warning("the trace of step %s lacks ranks %s: their files cannot be read", step, ", ".join(missing))
        found = [part for part in parts if part is not None]
        whole = _write(self._folder / f"step_{step}.json", merged(found)) if found else None
        if whole is not None:
            log.info("trace of step %s: %s", step, whole)


def dump_recent(folder: Path, rank: int) -> Path | None:
    """Write down the last exchanges of this process; None: there were none, or they cannot be written."""
    recent = tuple(RECORD.recent)
    if not recent:
        return None
    return _write(folder / "logs" / f"exchanges_rank_{rank}.json", trace_of(RECORD.clock(), recent, (), rank))


def trace_of(clock: Clock, exchanges: Sequence[Exchange], spans: Sequence[Span], rank: int) -> Trace:
    """In the trace event format: microseconds since the first event, whose time (seconds since 1970) stands beside."""
    computation = [_event(clock, rank, *_of_span(span)) for span in spans]
    for exchange in exchanges:
        about = _about(exchange)
        if exchange.launched is not None:
            begin = _event(clock, rank, f"begin: {exchange.phase}", "begin", about, exchange.began, exchange.launched)
            computation.append(begin)
        wait = _event(clock, rank, f"wait: {exchange.phase}", "wait", about, exchange.waited, exchange.resumed)
        computation.append(wait)
    under_way = [
        _event(clock, rank, exchange.phase, "exchange", _about(exchange), exchange.began, exchange.arrived)
        for exchange in exchanges
    ]
    known = _nested([event for event in computation if event is not None])
    lanes = _side_by_side([event for event in under_way if event is not None])
    events, last = known + lanes, max((event["tid"] for event in lanes), default=_EXCHANGES)
    first = min((event["ts"] for event in events), default=0.0)
    return _trace(_names(rank, last) + _moved(events, -first), clock.wall + first / 1e6)


def merged(parts: Sequence[Trace]) -> Trace:
    """One trace of several ranks."""
    begin = min(part["otherData"]["begin"] for part in parts)
    moved = (_moved(part["traceEvents"], 1e6 * (part["otherData"]["begin"] - begin)) for part in parts)
    return _trace([event for events in moved for event in events], begin)


def _trace(events: list[Event], begin: float) -> Trace:
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"begin": begin}}


def _moved(events: list[Event], microseconds: float) -> list[Event]:
    """Later by so much. Both ends are rounded, so that what lay inside another one still does."""
    moved = []
    for event in events:
        if "ts" in event:
            begin, end = (round(at + microseconds, 3) for at in (event["ts"], event["ts"] + event["dur"]))
            event = event | {"ts": begin, "dur": round(end - begin, 3)}
        moved.append(event)
    return moved


def _of_span(span: Span) -> tuple[str, str, dict[str, Any], Moment, Moment]:
    name = span.name if span.direction in ("", "forward") else f"{span.name} {span.direction}"
    about = ({"pass": span.direction} if span.direction else {}) | ({} if span.layer is None else {"block": span.layer})
    return name, "computation", about, span.begin, span.end


def _about(exchange: Exchange) -> dict[str, Any]:
    return {
        "block": exchange.layer,
        "phase": exchange.phase,
        "axis": exchange.axis,
        "ranks": list(exchange.ranks),
        "sent_bytes": exchange.sent_bytes,
        "received_bytes": exchange.received_bytes,
        "number": exchange.number,
        "arrived": exchange.arrived is not None,
    }


def _event(
    clock: Clock, rank: int, name: str, kind: str, about: dict[str, Any], begin: Moment | None, end: Moment | None
) -> Event | None:
    """What has no end yet is as long as nothing, and says so."""
    begun, ended = clock.seconds(begin), clock.seconds(end)
    if begun is None:
        return None
    if ended is None:
        about, ended = {**about, "unfinished": True}, begun
    lane = {"pid": rank, "tid": _COMPUTATION, "ts": 1e6 * (begun - clock.host), "dur": 1e6 * (ended - begun)}
    return {"name": name, "cat": kind, "ph": "X", **lane, "args": about}


def _nested(events: list[Event]) -> list[Event]:
    """Spans of one lane, none of which ends inside another one that it does not begin in: viewers draw no others.

    Where a block's backward pass ends, that of the one before has begun already, as a matter of which of two hooks on
    the same tensor comes first; it begins at the end instead.
    """
    open_until: list[float] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        end = event["ts"] + event["dur"]
        while open_until and open_until[-1] <= event["ts"]:
            open_until.pop()
        while open_until and open_until[-1] < end:
            event["ts"] = open_until.pop()
            event["dur"] = max(0.0, end - event["ts"])
        open_until.append(end)
    return events


def _side_by_side(events: list[Event]) -> list[Event]:
    """Exchanges on as few lanes as they need."""
    free: list[float] = []
    for event in sorted(events, key=lambda event: float(event["ts"])):
        lane = next((number for number, until in enumerate(free) if until <= event["ts"]), len(free))
        free[lane : lane + 1] = [event["ts"] + event["dur"]]
        event["tid"] = _EXCHANGES + lane
    return events


def _names(rank: int, last: int) -> list[Event]:
    lanes = {_COMPUTATION: "computation", _EXCHANGES: "exchanges"}
    lanes |= {lane: f"exchanges {lane}" for lane in range(_EXCHANGES + 1, last + 1)}
    about = {"ph": "M", "pid": rank}
    return [
        {"name": "process_name", **about, "args": {"name": f"rank {rank} on {socket.gethostname()}"}},
        {"name": "process_sort_index", **about, "args": {"sort_index": rank}},
        *({"name": "thread_name", **about, "tid": lane, "args": {"name": name}} for lane, name in lanes.items()),
        *({"name": "thread_sort_index", **about, "tid": lane, "args": {"sort_index": lane}} for lane in lanes),
    ]


def _write(path: Path, trace: Trace) -> Path | None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(trace), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)
        return None
    return path


def _read(path: Path) -> Trace | None:
    try:
        trace: Trace = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return trace


def _watch(model: nn.Module) -> list[Any]:
    """Have the parts of a model write down their spans; the handles that end it."""
    hooks: list[Any] = []
    for path, module in model.named_modules():
        name = next((name for kind, name in _PARTS if isinstance(module, kind)), None)
        if name is None:
            continue
        number = re.search(r"\bblocks\.(\d+)", path)
        layer = int(number.group(1)) if number else None
        before, after = _hooks_of(_SHARED if path.endswith(".shared_experts") else name, layer)
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    return hooks


def _hooks_of(name: str, layer: int | None) -> tuple[Callable[..., None], Callable[..., None]]:
    """What a module does before and after its forward pass. Tensors say when its backward pass begins and ends: the
    gradients of what it gave are there, and those of what it got."""
    name = f"{name} {layer}" if name == "block" else name
    calls: list[tuple[Moment, dict[str, Moment]]] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        gradients: dict[str, Moment] = {}
        for taken in _with_gradient(args)[:1]:
            taken.register_hook(lambda _: _end(gradients))
        calls.append((RECORD.moment(), gradients))

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        begin, gradients = calls.pop()
        RECORD.add_span(name, layer, "recomputed" if recomputing() else "forward", begin)
        for given in _with_gradient((result,)):
            given.register_hook(lambda _: _begin(gradients))

    def _begin(gradients: dict[str, Moment]) -> None:
        gradients.setdefault("begin", RECORD.moment())

    def _end(gradients: dict[str, Moment]) -> None:
        if "begin" in gradients:
            RECORD.add_span(name, layer, "backward", gradients.pop("begin"))

    return before, after


def _with_gradient(values: tuple[Any, ...]) -> list[Tensor]:
    """Those tensors that get one, also inside of tuples. None in a recomputed pass, whose graph nobody goes back."""
    if recomputing() or not torch.is_grad_enabled():
        return []
    inner = [_with_gradient(value) if isinstance(value, tuple) else [value] for value in values]
    return [value for part in inner for value in part if isinstance(value, Tensor) and value.requires_grad]
