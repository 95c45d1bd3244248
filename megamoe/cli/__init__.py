"""`python -m megamoe <command>`: one file per command, imported only when it is asked for.

A command's module has `add_parser(subparsers)`, which registers its arguments, and `run(args)`, which returns
the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

# Name to the line shown by --help. The module is megamoe.cli.<name>.
COMMANDS = {
    "bench": "measure against other implementations",
    "check": "check a configuration and show what it means",
    "convert": "inspect, verify and reshard checkpoints",
    "data": "prepare and inspect training data",
    "doctor": "show versions, compiled kernels, and which implementation of every op runs here",
    "parity": "prove that every parallel layout trains the same model as one process",
    "plan": "predict step time and hidden exchange on a cluster, and draw the timeline",
    "preflight": "check the nodes of a cluster before a long training, and name the bad ones",
    "study": "train several arms over several seeds and compare them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) names; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), "")
    module = import_module(f"megamoe.cli.{command}") if command in COMMANDS else None
    args = _parse(_parser(command, module), words)
    assert module is not None  # otherwise parsing has ended the process
    return int(module.run(args))


def _parser(command: str, module: ModuleType | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of one command only, so that no other command's imports are paid for."""
    description = "Training of Mixture-of-Experts models."
    parser = argparse.ArgumentParser(prog="python -m megamoe", description=description)
    # What launchers pass by habit, before the command.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        if module is not None and name == command:
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    args, rest = parser.parse_known_args(words)
    # argparse fills a list of words only up to the next option; a command says in `rest` where later ones go.
    if rest and (not hasattr(args, "rest") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        getattr(args, args.rest).extend(rest)
    return args
