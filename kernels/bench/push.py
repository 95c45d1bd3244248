"""The one-sided exchange on one GPU: `python -m kernels.bench.push --out FOLDER [--smoke]`.

1. One stream: every rank of a group is played by this process, each step is done by all before the next one. Nothing
   can wait for what comes later, so results and times of each step are those of the kernels alone.
2. Several streams: a rank on each, with its share of the multiprocessors, held up at random: real waiting.
3. Processes that share the card, with torch's symmetric memory, against all-to-all. Without MPS the card runs them in
   turn, so this shows that it works and no speed; it may fail with its reason.

Peers' memory is the same card's, so bytes per second are bounded by half its copy rate and not by NVLink. Results that
are not those of plain torch end the run. Into FOLDER: push.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.bench import cases, draw, plain
from kernels.bench.model import Shape
from kernels.bench.run import device_of, in_short, missing_library, parser
from megamoe.ops import push

RANKS = (2, 4)
ROUNDS = 12
MULTIPROCESSORS = 132
LIMIT_SECONDS = 20.0
PROCESS_SECONDS = 60
FACTOR = 1.25
"""Capacity in multiples of the mean load; what is beyond is dropped."""
TOGETHER = Shape(2048, 1024, 512, 16, 2)
SMOKE_TOGETHER = Shape(64, 64, 32, 8, 2)


class Rank(NamedTuple):
    """One rank of a group that this process plays: what it sends, and what it needs for it."""

    box: Tensor
    report: Tensor
    seen: Tensor
    x: Tensor
    weights: Tensor
    source: Tensor
    experts: Tensor
    place: Tensor
    counts: Tensor
    y: Tensor

    def about(self, number: int) -> tuple[Any, ...]:
        return self.box, number, LIMIT_SECONDS, self.report


class Group:
    """P ranks and the way of their rows."""

    def __init__(self, shape: Shape, num_ranks: int, device: torch.device) -> None:
        self.device, self.num_local = device, shape.experts // num_ranks
        self.capacity = max(1, int(FACTOR * shape.rows / shape.experts))
        self.num_rows = shape.experts * self.capacity
        about = self.num_local, self.capacity, -(-shape.hidden * 2 // 16) * 16
        num_bytes = torch.ops.megamoe.window_bytes(push.box(0, *about, [0] * num_ranks))
        self.memories = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_ranks)]
        addresses = [memory.data_ptr() for memory in self.memories]
        self.ranks = [self._rank(shape, push.box(rank, *about, addresses), rank) for rank in range(num_ranks)]
        self.number = 0
        counts = torch.stack([rank.counts.int() for rank in self.ranks])
        self.tables = counts, push.first_rows(counts)
        found = [
            push.places_at_owners(rank.experts, rank.place, *self.tables, place, self.num_rows)
            for place, rank in enumerate(self.ranks)
        ]
        self.places, self.starts = [place for place, _ in found], [start for _, start in found]

    def _rank(self, shape: Shape, box: Tensor, number: int) -> Rank:
        stream, device = draw.generator(self.device, number), self.device
        experts, keys = draw.choices(shape, stream), torch.rand(shape.tokens, shape.top_k, device=device)
        capacity = torch.full((shape.experts,), self.capacity, dtype=torch.int64, device=device)
        place, source, counts = torch.ops.megamoe.plan(experts, shape.experts, keys, capacity)
        flags = push.num_flags(box.numel() - 4, self.num_local, self.capacity)
        return Rank(
            box,
            torch.zeros(push.REPORT, dtype=torch.int32, pin_memory=device.type == "cuda"),
            torch.zeros(2, flags, dtype=torch.int32, device=device),
            draw.rows(shape.tokens, shape.hidden, stream),
            draw.weights(shape, stream),
            source,
            experts,
            place,
            counts,
            draw.rows(self.num_rows, shape.hidden, stream),
        )

    # The steps of an exchange

    def send_counts(self, place: int, number: int) -> None:
        rank = self.ranks[place]
        torch.ops.megamoe.exchange_counts(rank.counts, *rank.about(number))

    def hear_counts(self, place: int, number: int) -> Tensor:
        rank = self.ranks[place]
        heard: Tensor = torch.ops.megamoe.wait_counts(rank.counts, *rank.about(number))
        return heard

    def push(self, place: int, number: int, blocks: int = 0) -> None:
        rank = self.ranks[place]
        tables = rank.source, self.starts[place], *self.tables, self.places[place].shape[1]
        torch.ops.megamoe.dispatch_push(rank.x, rank.weights.flatten(), *tables, *rank.about(number), blocks)

    def take(self, place: int, number: int, blocks: int = 0) -> tuple[Tensor, Tensor]:
        rank = self.ranks[place]
        taken: tuple[Tensor, Tensor] = torch.ops.megamoe.wait_flags(
            rank.x, True, self.num_rows, *self.tables, rank.seen, *rank.about(number), blocks
        )
        return taken

    def publish(self, place: int, number: int, blocks: int = 0) -> None:
        rank = self.ranks[place]
        torch.ops.megamoe.publish_rows(rank.y, None, *self.tables, *rank.about(number), blocks)

    def pull(self, place: int, number: int, blocks: int = 0) -> Tensor:
        rank = self.ranks[place]
        summed: Tensor = torch.ops.megamoe.combine_pull(
            rank.y, False, self.places[place], *self.tables, rank.seen, *rank.about(number), blocks
        )[0]
        return summed

    # What is right

    def expected(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Rows and weights as they arrive, and sums, of every rank."""
        copies = [rank.x[:, None].expand(*place.shape, -1) for rank, place in zip(self.ranks, self.places, strict=True)]
        weights = push.push_reference([rank.weights for rank in self.ranks], self.places, self.num_rows)
        sums = push.pull_reference([rank.y for rank in self.ranks], self.places, self.num_rows)
        return push.push_reference(copies, self.places, self.num_rows), weights, sums

    def check(self, expected: tuple[list[Tensor], ...], place: int, taken: tuple[Tensor, Tensor], sums: Tensor) -> None:
        """Bit by bit."""
        names, found = ("rows", "weights", "sums"), (*taken, sums)
        for name, mine, right in zip(names, found, (each[place] for each in expected), strict=True):
            if not torch.equal(mine, right):
                raise SystemExit(f"wrong: {name} of rank {place} of {len(self.ranks)}, {self.reports()}")

    def reports(self) -> list[list[int]]:
        """What ranks that gave up waiting say."""
        return [rank.report.tolist() for rank in self.ranks]

    @property
    def bytes(self) -> int:
        """Of all ranks' rows that are kept, once."""
        return int(self.tables[0].sum()) * self.ranks[0].x.shape[1] * 2


def one_stream(group: Group) -> dict[str, Any]:
    """Each step by all ranks; the smallest time of a step over the rounds, in microseconds for all ranks together."""
    expected, places = group.expected(), range(len(group.ranks))
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        there, home = group.number + 1, group.number + 2
        timed(best, "counts", group, group.send_counts, there)
        heard = timed(best, "hear", group, group.hear_counts, there)
        timed(best, "dispatch_push", group, group.push, there)
        taken = timed(best, "wait_flags", group, group.take, there)
        timed(best, "publish_rows", group, group.publish, home)
        sums = timed(best, "combine_pull", group, group.pull, home)
        group.number = home
        for place in places:
            if not torch.equal(heard[place], group.tables[0]):
                raise SystemExit(f"wrong: counts as rank {place} hears them, {group.reports()}")
            group.check(expected, place, taken[place], sums[place])
    return {"rounds": ROUNDS, "bytes": group.bytes, "microseconds": best}


def timed(best: dict[str, float], name: str, group: Group, step: Callable[[int, int], Any], number: int) -> list[Any]:
    """A step by every rank, and what each got; on a GPU keep the smallest time."""
    places = range(len(group.ranks))
    if group.device.type != "cuda":
        return [step(place, number) for place in places]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # the host is ahead when the device begins
    start.record()
    results = [step(place, number) for place in places]
    end.record()
    end.synchronize()
    best[name] = min(best.get(name, float("inf")), start.elapsed_time(end) * 1e3)
    return results


def several_streams(group: Group) -> dict[str, Any]:
    """A rank on each stream, at most its share of the card for each kernel, so that all can be there at once."""
    if group.device.type != "cuda":
        return {"status": "not run: no GPU"}
    expected, count = group.expected(), len(group.ranks)
    torch.cuda.synchronize()
    streams, blocks = [torch.cuda.Stream() for _ in range(count)], MULTIPROCESSORS // count
    jitter = random.Random(draw.SEED)
    results: list[tuple[int, tuple[Tensor, Tensor], Tensor]] = []
    for _ in range(ROUNDS):
        there, home = group.number + 1, group.number + 2
        # Step by step over the streams: a host that issued a whole rank first would fill a queue all streams share.
        for step in ("send_counts", "hear_counts", "push", "take", "publish", "pull"):
            for place in jitter.sample(range(count), count):
                with torch.cuda.stream(streams[place]):
                    torch.cuda._sleep(jitter.randrange(100_000))
                    number = there if step in ("send_counts", "hear_counts", "push", "take") else home
                    limited = () if "counts" in step else (blocks,)
                    found = getattr(group, step)(place, number, *limited)
                    if step == "take":
                        results.append((place, found, found[0]))
                    elif step == "pull":
                        index = max(i for i, one in enumerate(results) if one[0] == place)
                        results[index] = (place, results[index][1], found)
        group.number = home
        torch.cuda.synchronize()
        for place, taken, sums in results:
            group.check(expected, place, taken, sums)
        results.clear()
    return {"status": "right", "rounds": ROUNDS, "blocks": blocks}


# Processes


def processes(num_ranks: int, smoke: bool) -> dict[str, Any]:
    """As many processes, each with its own part of the experts, on one card."""
    switches = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kernels.bench.push", "--of", str(num_ranks), "--store", f"{folder}/store"]
        started = [
            subprocess.Popen(
                [*command, "--rank", str(rank), *["--smoke"] * smoke],
                env=os.environ | switches,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        said: list[str] = []
        for process in started:
            try:
                said.append(process.communicate(timeout=max(1.0, began + PROCESS_SECONDS - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                process.kill()
                said.append(f"stopped after {PROCESS_SECONDS} s; " + process.communicate()[0])
    lines = [(text.strip().splitlines() or ["nothing was said"])[-1] for text in said]
    status = "right" if all(line == "right" for line in lines) else "failed"
    return {"status": status, "said": lines, "seconds": round(time.monotonic() - began, 1)}


def one_process(rank: int, num_ranks: int, store: str, smoke: bool) -> str:
    """One of them: rows pushed and pulled, forward and backward, against all-to-all. The reason where it cannot."""
    import torch.distributed as dist

    from megamoe.moe.dispatch.all_to_all import AllToAllDispatcher
    from megamoe.moe.dispatch.push import PushDispatcher
    from megamoe.moe.dispatch.push_window import Window
    from megamoe.parallel.link import Link

    device, shape = device_of(smoke), SMOKE_TOGETHER if smoke else TOGETHER
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=LIMIT_SECONDS),
    )
    link = Link(dist.group.WORLD)
    window = Window(dist.group.WORLD, device, LIMIT_SECONDS)
    ways = [PushDispatcher(link, windows=lambda rows, num_local: window), AllToAllDispatcher(link)]
    for turn in range(ROUNDS):
        pushed, other = (
            list(there_and_home(way, shape, draw.generator(device, turn * num_ranks + rank))) for way in ways
        )
        if window.reason:
            return window.reason
        for name, a, b in zip(("rows", "sums", "d_rows"), pushed, other, strict=True):
            if not torch.equal(a[: len(b)], b):
                return f"wrong: {name} of rank {rank} in turn {turn}"
    dist.barrier()
    return "right"


def there_and_home(way: Any, shape: Shape, stream: torch.Generator) -> Iterator[Tensor]:
    """Rows that arrived, sums, and the gradient of the rows."""
    from megamoe.moe.types import Choices, RoutingPlan

    experts = draw.choices(shape, stream)
    found, weights = plain.plan(experts, shape.experts), draw.weights(shape, stream)
    place, source, counts = torch.ops.megamoe.plan(experts, shape.experts)
    of = source.long()
    plan = RoutingPlan(of // shape.top_k, experts.flatten()[of], weights.flatten()[of], counts, weights, {}, {}, {})
    plan = plan._replace(capacity=shape.tokens, choices=Choices(experts, weights, place, source))
    assert torch.equal(found[2], counts)
    rows = draw.rows(shape.tokens, shape.hidden, stream).requires_grad_()
    arrived, _, handle = way.dispatch(rows, plan)
    summed = way.combine(arrived * 2, handle)
    (d_rows,) = torch.autograd.grad((summed * rows.detach()).sum(), [rows])
    yield from (arrived[: len(arrived)].detach(), summed.detach(), d_rows)


def main() -> None:
    arguments = parser("Push and pull rows on one GPU.")
    arguments.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--of", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--store", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    reason = missing_library(*push.OPS, "plan")
    if args.rank is not None:
        try:
            print(reason or one_process(args.rank, args.of, args.store, args.smoke))
        except Exception as error:  # of any kind: the reason is the result
            print(in_short(error, 400))
        return
    if reason:
        raise SystemExit(reason)
    device, rows = device_of(args.smoke), []
    case = cases.SMOKE_LAYER if args.smoke else cases.LAYER
    for num_ranks in RANKS:
        group = Group(case.shape, num_ranks, device)
        row = {"ranks": num_ranks, "case": case.name, "shape": vars(case.shape), "smoke": args.smoke}
        rows.append(row | {"one_stream": one_stream(group), "several_streams": several_streams(group)})
        del group
        rows[-1]["processes"] = processes(num_ranks, args.smoke)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "push.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        show(rows[-1])


def show(row: dict[str, Any]) -> None:
    """A few lines."""
    found = row["one_stream"]
    print(f"{row['ranks']} ranks, {row['case']}: {found['rounds']} rounds on one stream right", flush=True)
    for name, microseconds in found["microseconds"].items():
        print(f"  {name:<14} {microseconds:9.1f} us  {found['bytes'] / microseconds / 1e3:7.0f} GB/s of rows")
    print(f"  several streams: {row['several_streams']['status']}", flush=True)
    print(f"  processes: {row['processes']['status']} ({'; '.join(sorted(set(row['processes']['said'])))})", flush=True)


if __name__ == "__main__":
    main()
