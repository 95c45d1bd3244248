"""`convert`: look at a checkpoint, check it, write it anew."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from megamoe.cli.tables import print_table
from megamoe.common.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megamoe.training.checkpoint.folder import Manifest
    from megamoe.training.checkpoint.index import Entry, Index

SUMMARY = "inspect, verify and reshard checkpoints"
CHECKPOINT = "a checkpoint's folder, or a run's folder: its newest complete one"
INSPECT = "Show what a checkpoint holds; reads no values unless --tensors asks for some."
VERIFY = """Check files against their digests, the index against the files, that the pieces of every tensor cover it
exactly once, and that every value is finite. Exit code: 0, or 2 with the first thing that is wrong."""
RESHARD = """Write the same tensors, bit for bit, into files of about equal size. Training, evaluation and generation
take the copy as they take the original; only one file at a time is in memory. (Training needs none of this to go on in
another layout: it reads a checkpoint of any.)"""
NUMBERS = ("tensors", "elements", "pieces", "size", "min", "max", "mean", "norm", "not finite")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("convert", help=SUMMARY, description=SUMMARY.capitalize() + ".")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="show what a checkpoint holds", description=INSPECT)
    inspect.add_argument(
        "--tensors", metavar="PATTERN", help="only these, and their values, as in 'weight/*.experts.*'"
    )
    verify = actions.add_parser("verify", help="check everything about a checkpoint", description=VERIFY)
    reshard = actions.add_parser("reshard", help="write it anew in another number of files", description=RESHARD)
    for action in (inspect, verify, reshard):
        action.add_argument("checkpoint", type=Path, metavar="CKPT", help=CHECKPOINT)
    reshard.add_argument(
        "output", type=Path, metavar="OUT", help="a run's folder; the copy is checkpoints/step_... in it"
    )
    reshard.add_argument("--files", type=int, required=True, metavar="N", help="number of files with tensors")
    reshard.add_argument(
        "--weights-only", action="store_true", help="without what only training goes on with: the optimizer's state"
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the action."""
    from megamoe.training.checkpoint.folder import locate

    _ACTIONS[args.action](locate(args.checkpoint), args)
    return 0


def _inspect(folder: Path, args: argparse.Namespace) -> None:
    from megamoe.training.checkpoint.folder import read_manifest
    from megamoe.training.checkpoint.index import Index

    manifest, index = read_manifest(folder), Index.read(folder)
    if args.tensors is not None:
        _print_values(folder, index, args.tensors)
        return
    _print_summary(folder, manifest)
    print()
    _print_kinds(index)
    print()
    rows = ([name, *_columns(entry), f"{len(entry.pieces)}"] for name, entry in index.tensors.items())
    print_table(("tensor", "dtype", "shape", "size", "pieces"), rows, NUMBERS)


def _verify(folder: Path, args: argparse.Namespace) -> None:
    from megamoe.convert.verify import verify

    index = verify(folder)
    size = decimal(sum(entry.nbytes for entry in index.tensors.values()))
    print(f"{folder} is sound: {len(index.tensors)} tensors, {size}, all values finite")


def _reshard(folder: Path, args: argparse.Namespace) -> None:
    from megamoe.convert.reshard import reshard

    if args.files < 1:
        raise ConfigError("A checkpoint has at least one file.", got=f"--files {args.files}")
    print(f"wrote {reshard(folder, args.output, args.files, args.weights_only)}")


_ACTIONS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "inspect": _inspect,
    "verify": _verify,
    "reshard": _reshard,
}


def _print_summary(folder: Path, manifest: Manifest) -> None:
    state, size = manifest.state, sum(entry["bytes"] for entry in manifest.files.values())
    print(f"checkpoint    {folder}")
    print(f"format        {manifest.format}")
    skipped = f" ({state.skipped:,} skipped)" if state.skipped else ""
    read = f"{state.consumed_samples:,} samples, {state.consumed_tokens:,} tokens"
    print(f"state         step {state.step:,}{skipped}, {read}")
    print(f"files         {len(manifest.files)}, {decimal(size)}")
    print(f"architecture  {_list(manifest.architecture)}")
    print(f"written by    {_list(manifest.topology)}")


def _print_kinds(index: Index) -> None:
    from megamoe.training.checkpoint.boxes import Box
    from megamoe.training.checkpoint.pieces import split_name

    kinds: dict[str, list[Entry]] = {}
    for name, entry in index.tensors.items():
        kinds.setdefault(split_name(name)[0], []).append(entry)
    rows = [
        [
            kind,
            f"{len(entries):,}",
            f"{sum(Box.of(entry.shape).volume for entry in entries):,}",
            decimal(sum(entry.nbytes for entry in entries)),
            ", ".join(sorted({_columns(entry)[0] for entry in entries})),
        ]
        for kind, entries in kinds.items()
    ]
    print_table(("kind", "tensors", "elements", "size", "dtypes"), rows, NUMBERS)


def _print_values(folder: Path, index: Index, pattern: str) -> None:
    from megamoe.convert.statistics import statistics
    from megamoe.training.checkpoint.reader import Reader

    names = [name for name in index.tensors if fnmatchcase(name, pattern)]
    if not names:
        raise CheckpointError(
            f"checkpoint {folder} has no such tensor",
            got=f"--tensors {pattern!r}",
            expected=f"a pattern over names such as {next(iter(index.tensors), 'none')}",
            todo=f"see them all: python -m megamoe convert inspect {folder}",
        )
    reader, rows = Reader(folder), []
    for name in names:
        found = statistics(reader, name)
        numbers = (f"{value:.6g}" for value in (found.least, found.largest, found.mean, found.norm))
        rows.append([name, *_columns(index.tensors[name]), *numbers, f"{found.num_nonfinite:,}"])
    print_table(("tensor", "dtype", "shape", "size", "min", "max", "mean", "norm", "not finite"), rows, NUMBERS)


def _columns(entry: Entry) -> list[str]:
    """dtype, shape, size."""
    shape = " x ".join(str(size) for size in entry.shape)
    return [str(entry.dtype).removeprefix("torch."), shape or "one value", decimal(entry.nbytes)]


def _list(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
