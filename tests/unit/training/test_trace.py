"""Traces of given exchanges and spans: lanes, nesting, one file of several ranks."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megamoe.model.block import Block
from megamoe.moe.experts import Experts
from megamoe.parallel.exchanges import Exchange, Exchanges, Span
from megamoe.parallel.moments import Clock
from megamoe.training import trace
from megamoe.training.trace import Trace, Tracer, dump_recent, merged, trace_of


def clock() -> Clock:
    made = Clock(on_gpu=False)
    made.host, made.wall = 100.0, 5000.0
    return made


def exchange(phase: str, *moments: float | None) -> Exchange:
    made = Exchanges().begin((1, "ep", (0, 2)), phase, (30, 40), on_gpu=False)
    made.began, made.arrived, made.waited, made.resumed = moments  # type: ignore[assignment]
    return made


def lanes(trace: Trace) -> dict[str, list[tuple[str, float, float]]]:
    """By the name of the lane: what is in it, from when to when."""
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    found: dict[str, list[tuple[str, float, float]]] = {name: [] for name in names.values()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            lane = found[names[event["pid"], event["tid"]]]
            lane.append((event["name"], event["ts"], round(event["ts"] + event["dur"], 3)))
    return found


def test_exchanges_at_the_same_time_have_lanes_of_their_own() -> None:
    made = trace_of(
        clock(),
        [
            exchange("dispatch 1/2", 101.0, 103.0, 102.5, 103.0),
            exchange("dispatch 2/2", 102.0, 105.0, 104.0, 105.0),
            exchange("combine", 103.5, 106.0, 105.5, 106.0),
        ],
        [],
        rank=2,
    )
    second = 1e6
    assert lanes(made) == {
        "computation": [
            ("wait: dispatch 1/2", 1.5 * second, 2 * second),
            ("wait: dispatch 2/2", 3 * second, 4 * second),
            ("wait: combine", 4.5 * second, 5 * second),
        ],
        "exchanges": [("dispatch 1/2", 0.0, 2 * second), ("combine", 2.5 * second, 5 * second)],
        "exchanges 2": [("dispatch 2/2", second, 4 * second)],
    }
    assert made["otherData"]["begin"] == 5001.0
    about = next(event["args"] for event in made["traceEvents"] if event["name"] == "combine")
    assert (about["sent_bytes"], about["received_bytes"], about["ranks"], about["block"]) == (30, 40, [0, 2], 1)


def test_one_that_did_not_arrive_says_so() -> None:
    made = trace_of(clock(), [exchange("combine backward", 101.0, None, 102.0, None)], [], rank=0)
    unfinished = {event["name"]: event["args"].get("unfinished") for event in made["traceEvents"] if event["ph"] == "X"}
    assert unfinished == {"wait: combine backward": True, "combine backward": True}


def test_spans_of_a_lane_are_nested() -> None:
    """The backward pass of block 0 begins, by its hook, a moment before that of block 1 ends."""
    spans = [
        Span("block 1", 1, "backward", 101.0, 103.0),
        Span("experts", 1, "backward", 101.5, 102.0),
        Span("block 0", 0, "backward", 102.999, 105.0),
    ]
    found = lanes(trace_of(clock(), [], spans, rank=0))["computation"]
    assert found == [
        ("block 1 backward", 0.0, 2e6),
        ("experts backward", 0.5e6, 1e6),
        ("block 0 backward", 2e6, 4e6),
    ]


def test_ranks_beside_each_other() -> None:
    one = trace_of(clock(), [exchange("dispatch", 101.0, 102.0, 101.0, 102.0)], [], rank=0)
    later = clock()
    later.wall = 5000.25
    other = trace_of(later, [exchange("dispatch", 101.0, 102.0, 101.0, 102.0)], [], rank=1)
    for parts in ([one, other], [other, one]):
        whole = merged(parts)
        begins = {event["pid"]: event["ts"] for event in whole["traceEvents"] if event["name"] == "dispatch"}
        assert begins == {0: 0.0, 1: 0.25e6}
        assert whole["otherData"]["begin"] == 5001.0


def test_ranks_whose_files_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Where ranks share no folder, or a disk fails."""
    paths = [tmp_path / f"rank_{rank}.json" for rank in range(4)]
    for rank in (0, 3):
        part = trace_of(clock(), [exchange("dispatch", 101.0, 102.0, 101.0, 102.0)], [], rank)
        paths[rank].write_text(json.dumps(part))
    paths[2].write_text('{"traceEv')
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    trace.log.addHandler(listener)
    tracer = Tracer([5], tmp_path, nn.Module(), 0)
    try:
        tracer._merge(5, [*map(str, paths), None])
        tracer._merge(6, [None, str(paths[1])])
    finally:
        trace.log.removeHandler(listener)
    whole = json.loads((tmp_path / "traces" / "step_5.json").read_text())
    assert {event["pid"] for event in whole["traceEvents"]} == {0, 3}
    assert said == [
        "the trace of step 5 lacks ranks 1, 2, 4: their files cannot be read",
        "the trace of step 6 lacks ranks 0, 1: their files cannot be read",
    ]
    assert not (tmp_path / "traces" / "step_6.json").exists()


def test_the_last_exchanges_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Exchanges(kept=2)
    monkeypatch.setattr(trace, "RECORD", record)
    assert dump_recent(tmp_path, 1) is None
    for phase in ("counts", "dispatch", "combine"):
        with record.begin((0, "ep", (0, 1)), phase, (0, 0), on_gpu=False):
            pass
    path = dump_recent(tmp_path, 1)
    assert path == tmp_path / "logs" / "exchanges_rank_1.json"
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert sorted(names) == ["combine", "dispatch", "wait: combine", "wait: dispatch"]
    (tmp_path / "full").write_text("a file is in the way")
    assert dump_recent(tmp_path / "full", 1) is None


class Parts(nn.Module):
    """A block with experts, by their classes; what they compute does not matter."""

    def __init__(self) -> None:
        super().__init__()
        block, experts = Block.__new__(Block), Experts.__new__(Experts)
        for module in (block, experts):
            nn.Module.__init__(module)
        experts.forward = lambda rows: 2 * rows  # type: ignore[method-assign, assignment]
        block.ffn = experts
        block.forward = lambda rows: (experts(1 * rows) + rows, None)  # type: ignore[method-assign, assignment]
        self.blocks = nn.ModuleList([block])

    def forward(self, rows: Tensor) -> Tensor:
        return self.blocks[0](rows)[0].sum()


def test_parts_of_a_model_write_down_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Exchanges()
    monkeypatch.setattr(trace, "RECORD", record)
    model, rows = Parts(), torch.ones(3, requires_grad=True)
    hooks = trace._watch(model)
    record.traced = True
    record.begin_step(on_gpu=False)
    model(rows).backward()
    for hook in hooks:
        hook.remove()
    model(rows).backward()
    record.end_step()
    assert record.last is not None
    spans = record.last.spans or []
    assert [span[:3] for span in spans] == [
        ("experts", 0, "forward"),
        ("block 0", 0, "forward"),
        ("experts", 0, "backward"),
        ("block 0", 0, "backward"),
    ]
