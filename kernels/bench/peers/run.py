"""Time peers: `python -m kernels.bench.peers.run NAME ... --out FOLDER [--smoke]`; the suite gives each a process.

A peer that cannot be imported, fails or gives another result says so in the cells where its times would be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.bench import cases, draw, model
from kernels.bench.peers.base import TASKS, Peer, Work, expected, make_work
from kernels.bench.results import write_part
from kernels.bench.run import device_of, in_short, parser
from kernels.bench.timing import Timed, measure, not_run

PEERS = {
    "megamoe": ("megamoe", "ours", "load"),
    "torch": ("torch index ops", "torch_ops", "load"),
    "torch_gather": ("torch gather", "torch_ops", "load_gather"),
    "transformer_engine": ("Transformer Engine", "transformer_engine", "load"),
    "torchtitan": ("torchtitan", "torchtitan", "load"),
    "megatron_core": ("Megatron-core unfused", "megatron", "load"),
    "autoep": ("DeepSpeed AutoEP", "autoep", "load"),
}
"""Name on the command line: name in the results, module here, function that loads it."""
NEEDS_GPU = {"transformer_engine", "torchtitan"}
"""Triton kernels, which a CPU does not run."""
TOLERANCE = 2e-2
"""Of ||result - fp32|| / ||fp32||: some peers add up in bf16."""


def measure_peer(name: str, device: torch.device, sizes: tuple[cases.Case, ...]) -> Iterator[dict[str, Any]]:
    """One row per task, case and routing."""
    loaded = _loaded(name, device)
    for case in sizes:
        for routing in cases.ROUTINGS:
            timed = _measured(loaded, case, routing, device)
            for task in TASKS:
                yield row(name, loaded, case, routing, task, timed[task])


def _loaded(name: str, device: torch.device) -> Peer | str:
    """The peer, or why it cannot run."""
    _, module, function = PEERS[name]
    try:
        peer: Peer = getattr(importlib.import_module(f"kernels.bench.peers.{module}"), function)()
    except Exception as error:
        return f"not run: {in_short(error)}"
    return "not run: no GPU" if device.type != "cuda" and name in NEEDS_GPU else peer


def _measured(peer: Peer | str, case: cases.Case, routing: str, device: torch.device) -> dict[str, Timed]:
    if isinstance(peer, str):
        return dict.fromkeys(TASKS, not_run(peer))
    count = draw.number_of_sets(case.shape.of_tokens + case.shape.of_rows, device)
    try:
        work = [make_work(case.shape, device, number, routing) for number in range(count)]
        calls = [peer.tasks(each) for each in work]
        reasons = {task: _problem(task, calls[0], work[0], peer) for task in TASKS}
        right = {task: [each[task] for each in calls] for task in TASKS if not reasons[task]}
        return {task: not_run(reason) for task, reason in reasons.items() if reason} | measure(right, device)
    except Exception as error:
        return dict.fromkeys(TASKS, not_run(f"not run: {in_short(error)}"))


def _problem(task: str, calls: dict[str, Callable[[], Any]], work: Work, peer: Peer) -> str:
    """Why a task has no time, or an empty string."""
    if task not in calls:
        return f"not run: {peer.notes.get(task, 'it has no such step')}"
    result = calls[task]()
    wanted = expected(work).get(task)
    found = result if isinstance(result, Tensor) else result[0]
    if wanted is None or found.shape != wanted.shape:  # plans differ in form, and so do rows with padding
        return ""
    apart = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    return "" if apart <= TOLERANCE else f"wrong: differs by {apart:.1e}, allowed {TOLERANCE:.0e}"


def row(name: str, peer: Peer | str, case: cases.Case, routing: str, task: str, timed: Timed) -> dict[str, Any]:
    """One cell with what it is about."""
    return {
        "peer": PEERS[name][0],
        "about": peer.about if isinstance(peer, Peer) else "",
        "case": case.name,
        "shape": vars(case.shape),
        "routing": routing,
        "task": task,
        "bytes": model.cost(TASKS[task], case.shape).bytes,
        "note": peer.notes.get(task, "") if isinstance(peer, Peer) else "",
        **timed.to_json(),
    }


def main() -> None:
    arguments = parser("Measure other implementations of the permutation.")
    arguments.add_argument("names", nargs="+", choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    args = arguments.parse_args()
    device = device_of(args.smoke)
    for name in args.names:
        rows = list(measure_peer(name, device, cases.SMOKE_CASES[:1] if args.smoke else cases.CASES[:2]))
        write_part(args.out, "peers", rows, name)
        _show(rows)


def _show(rows: list[dict[str, Any]]) -> None:
    for found in rows:
        times = " / ".join(f"{value:.1f}" for value in found["microseconds"])
        where = f"{found['peer']:<22} {found['case']:<6} {found['routing']:<9} {found['task']:<19}"
        print(f"{where} {times + ' us' if times else found['status']}")


if __name__ == "__main__":
    main()
