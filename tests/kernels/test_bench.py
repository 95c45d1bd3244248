"""The measuring code: its counts are right, it prints what was measured, and all of it runs without a GPU."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels.bench import cases, draw, model, op_list, ops, plain, results, sanitize, table, timing
from kernels.bench.model import Shape
from kernels.bench.peers import run as peers

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Shape(tokens=6, hidden=5, ffn=3, experts=4, top_k=2, itemsize=2)


# By hand for SMALL: [T, D] is 60 bytes, [R, D] 120, [R, F] 72, an index or weight per row 48, [T, E] in fp32 96.
BY_HAND = {
    "plan": (96, 48 + 48 + 32),
    "plan_capacity": (96 + 48 + 32, 48 + 48 + 32),
    "permute": (60 + 48, 120),
    "permute_bwd": (120 + 48, 60),
    "unpermute": (120 + 48, 60),
    "unpermute_weighted": (120 + 48 + 48, 60),
    "unpermute_bwd": (60 + 120 + 48 + 48, 120 + 48),
    "glu_fwd": (2 * 72 + 48 + 32, 72),
    "glu_bwd": (3 * 72 + 48 + 32, 3 * 72 + 48),
    "grap_fwd": (60 + 40, 96 + 24 + 48),
    "grap_bwd": (2 * 96 + 24 + 60 + 40, 60 + 20),
    "router_fwd": (60 + 80, 96 + 24 + 48),
    "router_bwd": (2 * 96 + 24 + 60 + 80, 60 + 80),
}


def test_bytes_are_those_counted_by_hand() -> None:
    assert {name: (model.cost(name, SMALL).read, model.cost(name, SMALL).written) for name in model.COSTS} == BY_HAND


def test_the_largest_sizes() -> None:
    permute = model.cost("permute", cases.CASES[0].shape)
    assert permute.bytes == 268_435_456 + 536_870_912 + 262_144
    assert permute.floor(4.3e12, 790e12) * 1e6 == pytest.approx(187.34, abs=0.01)
    scores = model.cost("router_fwd", cases.CASES[2].shape)
    assert scores.flops == 3 * 2 * 16384 * 256 * 7168  # three parts
    assert scores.floor(4.3e12, 790e12) == scores.flops / 790e12  # arithmetic takes longer than the bytes there
    assert model.grouped_flops(cases.LAYER.shape) == 18 * 65536 * 4096 * 2048


def test_the_readme_counts_the_same_bytes() -> None:
    """Its formulas, in letters, against the code; both on sizes where every term shows."""
    s = Shape(tokens=7, hidden=11, ffn=13, experts=17, top_k=3, itemsize=2)
    letters = {"T": 7, "D": 11, "F": 13, "E": 17, "K": 3, "R": 21, "b": 2}
    readme = (ROOT / "kernels/README.md").read_text("utf-8")
    stated = {m[1]: m[2] for m in re.finditer(r"^\| `(\w+)` \| .* \| (.*) \|$", readme, re.MULTILINE)}
    names = {"permute_rows": "permute", "unpermute_rows": "unpermute"}
    for op, formula in stated.items():
        first = formula.split(",")[0]
        product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", first)
        assert eval(product, {}, letters) == model.cost(names.get(op, op), s).bytes, (op, first)
    assert len(stated) == len(model.COSTS) - 3


def test_plain_torch_keeps_the_choices_with_the_largest_keys() -> None:
    """The comparison itself, against a literal loop."""
    stream = draw.generator(CPU)
    experts, keys = draw.choices(SMALL, stream), torch.rand(6, 2, generator=stream)
    keys[3] = keys[1]  # a tie: the earlier choice stays
    capacity = torch.tensor([2, 0, 1, 5])
    found = plain.plan_capacity(experts, 4, keys, capacity)
    kept: list[int] = []
    for expert in range(4):
        mine = [i for i, e in enumerate(experts.flatten().tolist()) if e == expert]
        best = sorted(mine, key=lambda i: (-keys.flatten()[i].item(), i))[: capacity[expert]]
        assert found.counts[expert] == len(best)
        kept += sorted(best)
    assert found.source.tolist() == kept + [-1] * (12 - len(kept))
    places = {choice: row for row, choice in enumerate(kept)}
    assert found.place.flatten().tolist() == [places.get(choice, -1) for choice in range(12)]


def test_without_a_gpu_every_call_runs_and_nothing_is_timed() -> None:
    calls: list[str] = []
    timed = timing.measure({"a": [lambda: calls.append("a")], "b": [lambda: calls.append("b")]}, CPU)
    assert calls == ["a", "b"]
    assert all(one.status == timing.NO_GPU and one.microseconds == () and one.best is None for one in timed.values())


def test_every_op_runs_and_gives_what_plain_torch_gives(kernels: ModuleType) -> None:
    rows = list(ops.measure_ops(CPU, cases.SMOKE_CASES, None))
    assert len(rows) == 2 * len(cases.SMOKE_CASES) * len(op_list.MEASUREMENTS)
    for row in rows:
        assert row["status"] == timing.NO_GPU, row
        assert row["microseconds"] == []
        assert row["gb_per_second"] is row["share_of_copy"] is None
        assert row["implementation"] == "torch" or row["difference"] <= 2e-2
    json.dumps(rows, allow_nan=False)


def test_an_op_with_a_wrong_result_gets_no_time(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    permute = next(one for one in op_list.MEASUREMENTS if one.name == "permute")
    wrong = replace(permute, ours=lambda inputs: permute.ours(inputs).roll(1, 0))
    monkeypatch.setattr(ops, "MEASUREMENTS", (wrong,))
    ours, plainly = ops.measure_ops(CPU, cases.SMOKE_CASES[:1], None)
    assert ours["status"].startswith("wrong: differs from plain torch by")
    assert plainly["status"] == timing.NO_GPU


@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_difference_lets_nothing_pass(value: float) -> None:
    right = torch.ones(3, 2)
    wrong = right.clone()
    wrong[1, 1] += value
    assert not ops.difference([right, wrong], [right, right]) <= 0.1
    assert ops.difference(right[:2], right) == float("inf")
    assert ops.difference([right, right], [right, right]) == 0


def test_the_program_for_checkers_compares_every_op(kernels: ModuleType) -> None:
    outcomes = dict(sanitize.run(CPU))
    assert len(outcomes) == 2 * len(sanitize.SHAPES) * len(op_list.MEASUREMENTS)
    assert set(outcomes.values()) == {"ok"}


@pytest.mark.parametrize("name", ["megamoe", "torch", "torch_gather"])
def test_peers_do_the_same_work(kernels: ModuleType, name: str) -> None:
    rows = list(peers.measure_peer(name, CPU, cases.SMOKE_CASES[:1]))
    assert len(rows) == len(cases.ROUTINGS) * len(peers.TASKS)
    left_out = {row["task"] for row in rows if row["status"] != timing.NO_GPU}
    assert left_out == ({"plan", "permute", "unpermute_bwd"} if name == "torch_gather" else set()), rows


def test_a_peer_that_is_not_there_says_so() -> None:
    rows = list(peers.measure_peer("transformer_engine", CPU, cases.SMOKE_CASES[:1]))
    assert {row["status"].split(":")[0] for row in rows} == {"not run"}
    assert all(row["microseconds"] == [] for row in rows)


def timed(*microseconds: float) -> dict[str, Any]:
    return timing.Timed("measured", microseconds, min(microseconds), max(microseconds), 9.0, 50).to_json()


def a_run(date: str = "2027-01-01T00:00:00+00:00", smoke: bool = False) -> dict[str, Any]:
    shape, measurement = cases.CASES[0].shape, op_list.MEASUREMENTS[2]
    cost = model.cost("permute", shape)
    found = timing.Timed("measured", (200.04, 201.0), 199.0, 230.0, 9.0, 50)
    peer = {"peer": "torchtitan", "case": "K2", "routing": "natural", "note": ""}
    smi = {"clocks.sm": "345 MHz", "clocks.max.sm": "1980 MHz", "driver_version": "580"}
    versions = {"torch": "2.11.0"}
    return {
        "schema": results.SCHEMA,
        "smoke": smoke,
        "steps": [
            {"step": "tests", "status": "ok", "seconds": 3.0},
            {"step": "1b", "status": "failed (1)", "seconds": 2},
        ],
        "conditions": {"date": date, "gpu": {"name": "Card"}, "nvidia_smi": smi, "packages": versions, "cuda": "13.0"},
        "ceilings": {"copy": {"bytes_per_second": 4.2e12}, "matmul": {"flops_per_second": 780e12}},
        "ops": [ops.row(measurement, cases.CASES[0], "megamoe", found, 0.0, cost, 4.2e12)],
        "layer": [
            {
                "routing": "natural",
                "implementation": "auto",
                "case": "K2",
                "ratio": 1.2,
                "fullest_expert_over_mean": 1.5,
                "layer": timed(12000.0, 12100.0),
                "grouped_products": timed(10000.0, 10010.0),
            }
        ],
        "peers": [
            peer | {"task": "permute"} | timed(300.0, 301.0),
            peer | {"task": "plan"} | timing.not_run("not run: no triton").to_json(),
        ],
        "training": [],
    }


def test_the_table_shows_what_was_measured() -> None:
    text = table.render(a_run())
    assert "| permute | K2 | 805.6 | 192 | 200 / 201 | 4,027 | 96% | not measured |" in text
    assert "| natural | auto | 12.00 | 10.00 | 1.200 | 1.25 | 1.50 |" in text
    assert "| torchtitan | not measured | 300 / 301 |" in text
    assert "- torchtitan, plan: not run: no triton" in text
    assert "| copy, read and written | 4,300 GB/s | 4,200 GB/s |" in text
    assert "Card, 345 MHz of 1980 MHz before the run" in text
    assert "did not end well: 1b (failed (1))." in text
    assert "| 1b | not measured |" in text


def test_without_a_run_no_cell_has_a_number_that_looks_measured() -> None:
    measured = {"measured", "megamoe, us", "GB/s", "of copy", "plain torch, us", "ratio", "tokens/s", "MFU (of 989)"}
    columns: dict[int, str] = {}
    seen = 0
    for line in table.render(None).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = {}
        elif not columns:
            columns = dict(enumerate(cells))
        elif not set(line) <= set("|- "):
            judged = [cell for place, cell in enumerate(cells) if columns[place] in measured]
            assert set(judged) <= {table.NOT_MEASURED}, line
            seen += len(judged)
    assert seen > 100


def test_the_newest_run_counts_and_a_trial_never_does(tmp_path: Path) -> None:
    assert results.newest(tmp_path) is None
    for name, run in {"z": a_run("2027-01-01"), "a": a_run("2027-02-01"), "b": a_run("2027-03-01", smoke=True)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(run), encoding="utf-8")
    newest = results.newest(tmp_path)
    assert newest is not None
    assert newest["conditions"]["date"] == "2027-02-01"


def test_only_the_marked_section_changes() -> None:
    text = table.renewed(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", None)
    assert text.startswith(f"before\n{table.BEGIN}\nNo GPU has run this yet.")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text
    with pytest.raises(SystemExit, match="has no marks"):
        table.renewed("no section", None)


def test_the_readme_is_current() -> None:
    command = [sys.executable, "kernels/bench/table.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_parts_become_one_file(tmp_path: Path) -> None:
    results.write_part(tmp_path, "peers", [{"peer": "a"}], "a")
    results.write_part(tmp_path, "peers", [{"peer": "b"}], "b")
    results.write_part(tmp_path, "ceilings", {"copy": 1})
    (tmp_path / "steps.tsv").write_text("ops\tfailed (1)\t12\tlast words\n", encoding="utf-8")
    whole = results.merge(tmp_path, results.read_steps(tmp_path / "steps.tsv"), smoke=False)
    assert whole["peers"] == [{"peer": "a"}, {"peer": "b"}]
    assert whole["ceilings"] == {"copy": 1}
    assert whole["conditions"] is None
    assert whole["layer"] == []
    assert whole["steps"] == [{"step": "ops", "status": "failed (1)", "seconds": 12.0, "last_line": "last words"}]
    assert set(whole) == {"schema", "smoke", "steps", *results.PARTS}


def test_the_suite_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    def suite(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "kernels/gpu_suite.sh", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert "where to?" in suite().stderr
    assert "unknown option --smok" in suite("out", "--smok").stderr
    assert suite().returncode == 2
