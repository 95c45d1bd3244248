"""Results as tables: renews the section of kernels/README.md, or prints a run.

python kernels/bench/table.py                  newest run of kernels/results/ into kernels/README.md
python kernels/bench/table.py --check          is it current?
python kernels/bench/table.py --show FILE      print the tables of one run
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started by its path
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from kernels.bench import cases, model, results

KERNELS = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOT_MEASURED = "not measured"
COPY_RATE, MATRIX_RATE = 4.3e12, 790e12
"""Assumed of an H200 before it is measured: bytes per second of a copy (data sheet of the memory: 4.8e12), and bf16
operations per second of a large matrix product (data sheet: 989e12)."""
OPS = tuple(name for name in model.COSTS if name != "permute_bwd")
"""The backward pass of permute is unpermute, and is measured as that."""
Row = dict[str, Any]


def render(run: Row | None) -> str:
    """All tables of a run; None: the same tables with `not measured` in every cell."""
    rows = run or {}
    return "\n\n".join(
        [
            _about(run),
            ceilings(rows.get("ceilings")),
            "**Ops**, bf16. Floor: bytes at the copy rate, or operations at the matrix rate, whichever takes longer.",
            ops(rows.get("ops") or [], rows.get("ceilings")),
            "**MoE layer**, forward and backward, 32,768 tokens, D 4096, F 2048, E 64, K 2, bf16.",
            layer(rows.get("layer") or []),
            "**Permutation beside others**, microseconds, K 2, natural routing. Whole: plan, permute, its backward, "
            "weighted unpermute, its backward.",
            peers(rows.get("peers") or []),
            "**Training**, 50 steps through `launch/pretrain.py`, one GPU.",
            training(rows.get("training") or []),
        ]
    )


def _about(run: Row | None) -> str:
    if not run or not run["conditions"]:
        return "No GPU has run this yet."
    where = run["conditions"]
    gpu = where["gpu"] or {"name": "no GPU"}
    smi = where["nvidia_smi"] or {}
    clocks = f", {smi['clocks.sm']} of {smi['clocks.max.sm']} before the run" if smi else ""
    failed = [f"{step['step']} ({step['status']})" for step in run["steps"] if step["status"] != "ok"]
    steps = f" Steps that did not end well: {', '.join(failed)}." if failed else ""
    return (
        f"{where['date']}, {gpu['name']}{clocks}, driver {smi.get('driver_version', 'unknown')}, torch "
        f"{where['packages']['torch']}, CUDA {where['cuda']}.{steps}"
    )


def ceilings(found: Row | None) -> str:
    """Rates of copy and matrix product."""
    copy = found["copy"]["bytes_per_second"] if found else None
    product = found["matmul"]["flops_per_second"] if found else None
    return table(
        ("ceiling", "assumed for an H200", "measured"),
        [
            ("copy, read and written", f"{COPY_RATE / 1e9:,.0f} GB/s", _unit(copy, 1e9, "GB/s")),
            ("bf16 product, 8192 x 8192 x 8192", f"{MATRIX_RATE / 1e12:,.0f} TFLOP/s", _unit(product, 1e12, "TFLOP/s")),
        ],
    )


def ops(rows: list[Row], found: Row | None) -> str:
    """One line per op and size: bytes, floor, ours, share of the copy's rate, torch."""
    rates = (
        (found and found["copy"]["bytes_per_second"]) or COPY_RATE,
        (found and found["matmul"]["flops_per_second"]) or MATRIX_RATE,
    )
    by_key = {(row["op"], row["case"], row["implementation"]): row for row in rows}
    lines: list[tuple[str, ...]] = []
    for case in cases.CASES:
        for name in OPS:
            cost = model.cost(name, case.shape)
            ours, torch = by_key.get((name, case.name, "megamoe")), by_key.get((name, case.name, "torch"))
            share = f"{ours['share_of_copy']:.0%}" if ours and ours["share_of_copy"] else NOT_MEASURED
            rate = f"{ours['gb_per_second']:,.0f}" if ours and ours["gb_per_second"] else NOT_MEASURED
            size, floor = f"{cost.bytes / 1e6:,.1f}", _short(cost.floor(*rates) * 1e6)
            lines.append((name, case.name, size, floor, _time(ours), rate, share, _time(torch)))
    head = ("op", "size", "MB", "floor, us", "megamoe, us", "GB/s", "of copy", "plain torch, us")
    return table(head, lines)


def layer(rows: list[Row]) -> str:
    """One line per routing and implementation; the promise is about `auto`."""
    by_key = {(row["routing"], row["implementation"]): row for row in rows if row["case"] == cases.LAYER.name}
    lines: list[tuple[str, ...]] = []
    for routing, implementation in itertools.product(cases.ROUTINGS, ("auto", "plain torch")):
        row = by_key.get((routing, implementation))
        limit = "1.25" if implementation == "auto" else ""
        if not row or row["ratio"] is None:
            lines.append((routing, implementation, *[NOT_MEASURED] * 3, limit, NOT_MEASURED))
            continue
        parts = [f"{min(row[part]['microseconds']) / 1e3:.2f}" for part in ("layer", "grouped_products")]
        imbalance = f"{row['fullest_expert_over_mean']:.2f}"
        lines.append((routing, implementation, *parts, f"{row['ratio']:.3f}", limit, imbalance))
    head = ("routing", "ops", "layer, ms", "grouped products, ms", "ratio", "at most", "fullest expert / mean")
    return table(head, lines)


WHOLE = ("plan", "permute", "permute_bwd", "unpermute_weighted", "unpermute_bwd")
TASKS = ("plan", "permute", "permute_bwd", "unpermute", "unpermute_weighted", "unpermute_bwd")
PEERS = (
    "megamoe",
    "torch index ops",
    "torch gather",
    "Transformer Engine",
    "torchtitan",
    "Megatron-core unfused",
    "DeepSpeed AutoEP",
)


def peers(rows: list[Row], case: str = "K2", routing: str = "natural") -> str:
    """One line per implementation, one column per task; what could not run says why below."""
    chosen = [row for row in rows if (row["case"], row["routing"]) == (case, routing)]
    names = dict.fromkeys([*PEERS, *(row["peer"] for row in chosen)])
    by_key = {(row["peer"], row["task"]): row for row in chosen}
    lines: list[tuple[str, ...]] = []
    reasons: list[str] = []
    for name in names:
        cells = [by_key.get((name, task)) for task in TASKS]
        whole = [by_key.get((name, task)) for task in WHOLE]
        lines.append((name, *(_time(cell) for cell in cells), _sum(whole)))
        reasons += _reasons(name, [row for row in cells if row])
    notes = "\n".join(f"- {reason}" for reason in dict.fromkeys(reasons))
    return table(("implementation", *TASKS, "whole"), lines) + (f"\n\n{notes}" if notes else "")


def _reasons(name: str, rows: list[Row]) -> list[str]:
    """Why cells are empty, and what to know of the others: the same reason once for all its tasks."""
    tasks: dict[str, list[str]] = {}
    for row in rows:
        note = row["note"] if row["microseconds"] else row["status"]
        if note:
            tasks.setdefault(note, []).append(row["task"])
    return [f"{name}{'' if len(names) == len(TASKS) else ', ' + ', '.join(names)}: {n}" for n, names in tasks.items()]


def _sum(rows: list[Row | None]) -> str:
    """Of the steps that one training step needs; Megatron-core's plan is inside its permute."""
    times = [min(row["microseconds"]) for row in rows if row and row["microseconds"]]
    inside = [row for row in rows if row and row["status"] == "not run: inside permute"]
    return _short(sum(times)) if times and len(times) + len(inside) == len(rows) else NOT_MEASURED


def training(rows: list[Row]) -> str:
    """One line per recipe."""
    by_name = {row["recipe"]: row for row in rows}
    lines: list[tuple[str, ...]] = []
    for name in ("tiny", "1b"):
        row = by_name.get(name)
        speed = f"{row['tokens_per_second']:,.0f}" if row and row["tokens_per_second"] else NOT_MEASURED
        mfu = f"{row['mfu']:.1%}" if row and row["mfu"] else NOT_MEASURED
        rate = f"{row['flops_per_second'] / 1e12:,.1f}" if row and row["flops_per_second"] else NOT_MEASURED
        size = row["peak_bytes_allocated"] if row else None
        lines.append((name, speed, rate, mfu, f"{size / 2**30:.1f}" if size else NOT_MEASURED))
    return table(("recipe", "tokens/s", "model TFLOP/s", "MFU (of 989)", "peak memory, GiB"), lines)


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *lines])


def _unit(value: float | None, unit: float, name: str) -> str:
    return f"{value / unit:,.0f} {name}" if value else NOT_MEASURED


def _time(row: Row | None) -> str:
    """Both medians where there are two, so that their difference shows what a difference means."""
    if not row:
        return NOT_MEASURED
    if not row["microseconds"]:
        return NOT_MEASURED if row["status"].startswith("not run") else str(row["status"]).split(":")[0]
    return " / ".join(_short(value) for value in row["microseconds"])


def _short(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def renewed(text: str, run: Row | None) -> str:
    """The README with its section between the marks made anew."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"kernels/README.md has no marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{render(run)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether kernels/README.md is current")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of one run")
    args = parser.parse_args()
    if args.show:
        print(render(json.loads(args.show.read_text("utf-8"))))
        return
    readme = KERNELS / "README.md"
    old = readme.read_text("utf-8")
    new = renewed(old, results.newest(KERNELS / "results"))
    if args.check:
        raise SystemExit("kernels/README.md is not current: python kernels/bench/table.py" if new != old else 0)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
