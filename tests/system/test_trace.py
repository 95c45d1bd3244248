"""The trace of a step: one file of all ranks that a viewer opens, and that agrees with the metrics."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from megamoe.testing.launches import run_script
from megamoe.testing.runs import Run

PRETRAIN = "launch/pretrain.py"
STEP, MICRO_STEPS = 2, 2
PARTS = ("attention", "router", "experts")


def traced(prepared: Run, folder: Path, ranks: int, *words: str) -> Run:
    run = prepared.elsewhere(folder / "run", "training.stop_after_step=3", "moe.dispatcher=all_to_all")
    outcomes = run_script(PRETRAIN, [*run.words, *words, "--trace", str(STEP)], ranks)
    assert [outcome.returncode for outcome in outcomes] == [0] * ranks, outcomes
    assert f"trace of step {STEP}: {run.folder}/traces/step_{STEP}.json" in outcomes[0].stderr
    return run


def events_of(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


def by_rank(run: Run) -> dict[int, list[dict[str, Any]]]:
    found = defaultdict(list)
    for event in events_of(run.folder / "traces" / f"step_{STEP}.json"):
        found[event["pid"]].append(event)
    return dict(found)


def assert_drawable(events: list[dict[str, Any]]) -> None:
    """On each lane every event lies inside of another one or beside it."""
    lanes = defaultdict(list)
    for event in events:
        lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for lane in lanes.values():
        open_until: list[float] = []
        for begin, end in sorted(lane, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= begin + 1e-6:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-6
            open_until.append(end)


def test_one_file_shows_what_every_rank_did(prepared: Run, tmp_path: Path) -> None:
    run = traced(prepared, tmp_path, 2)
    assert_complete(run)
    assert_agrees(run)


def assert_complete(run: Run) -> None:
    folder = run.folder / "traces"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"step_{STEP}.json", f"step_{STEP}_rank_0.json", f"step_{STEP}_rank_1.json"),
    ]
    ranks = by_rank(run)
    assert list(ranks) == [0, 1]
    assert min(event["ts"] for events in ranks.values() for event in events) == 0.0
    line = next(line for line in run.metrics() if line["step"] == STEP)
    for rank, events in ranks.items():
        alone = events_of(folder / f"step_{STEP}_rank_{rank}.json")
        assert [(event["name"], event["args"]) for event in alone] == [(e["name"], e["args"]) for e in events]
        assert_drawable(events)
        assert max(event["ts"] + event["dur"] for event in events) < 1e6 * line["step_seconds"] + 1e5
        names = Counter((event["name"], event["args"].get("block")) for event in events)
        for block in range(2):
            for name in (f"block {block}", *PARTS):
                assert names[name, block] == names[f"{name} backward", block] == MICRO_STEPS, name
            for phase in ("counts", "dispatch", "combine", "combine backward", "dispatch backward"):
                assert names[phase, block] == names[f"wait: {phase}", block] == MICRO_STEPS, phase
        assert names["optimizer", None] == 1


def assert_agrees(run: Run) -> None:
    """With the metrics of that step."""
    ranks, line = by_rank(run), next(line for line in run.metrics() if line["step"] == STEP)
    for block in range(2):
        own = [event for events in ranks.values() for event in events if event["args"].get("block") == block]
        forward = [e for e in own if e["cat"] == "exchange" and "backward" not in e["name"]]
        assert sum(event["args"]["sent_bytes"] for event in forward) == line[f"layers.{block}.sent_bytes"]
        stood = sum(event["dur"] for event in own if event["cat"] in ("wait", "begin")) / 1e6
        assert stood / 2 == pytest.approx(line[f"layers.{block}.exposed_seconds"], rel=1e-3)
        under_way = sum(event["dur"] for event in own if event["cat"] == "exchange") / 1e6
        assert under_way / 2 == pytest.approx(line[f"layers.{block}.exchange_seconds"], rel=1e-3)
    shares = [line[f"exchange.{name}"] for name in ("exposed_share_least", "exposed_share")]
    assert 0.0 < shares[0] <= shares[1] < 1.0
    waits = [sum(e["dur"] for e in events if e["cat"] in ("wait", "begin")) / 1e6 for events in ranks.values()]
    assert [min(waits), sum(waits) / 2] == pytest.approx([share * line["step_seconds"] for share in shares], rel=1e-3)


@pytest.mark.thorough
def test_stages_of_a_pipeline_and_what_is_recomputed(prepared: Run, tmp_path: Path) -> None:
    run = traced(prepared, tmp_path, 4, "parallel.pp=2", "training.recompute=full")
    ranks = by_rank(run)
    assert sorted(ranks) == [0, 1, 2, 3]
    for rank, events in ranks.items():
        assert_drawable(events)
        blocks = {event["args"]["block"] for event in events if "block" in event["args"]}
        assert blocks == {rank // 2}
        names = Counter(event["name"] for event in events)
        assert names[f"block {rank // 2} recomputed"] == names["experts recomputed"] == names["dispatch"] / 2
        assert names["combine"] == names["combine backward"] == names["experts backward"]
