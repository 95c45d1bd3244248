"""`check`: is this configuration right, and what does it mean? Imports no torch, starts nothing."""

from __future__ import annotations

import argparse
from math import lcm
from pathlib import Path

from megamoe.common.errors import TopologyError
from megamoe.config.describe import describe
from megamoe.config.load import load_config
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.config.schema import write_schema
from megamoe.parallel.topology import Topology

SUMMARY = "check a configuration and show what it means"
DESCRIPTION = """Check configuration files and overrides, laid over each other from left to right, and print
the resolved configuration, the rank map, parameters, memory and the DeepSpeed configuration."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("check", help=SUMMARY, description=DESCRIPTION)
    parser.add_argument("config", nargs="*", metavar="CONFIG | key=value", help="YAML or JSON file or override")
    parser.add_argument("--world-size", type=int, metavar="N", help="number of ranks (default: the fewest)")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=8,
        metavar="N",
        help="consecutive ranks on a node, for the map (default: 8)",
    )
    parser.add_argument("--write-schema", metavar="FILE", help="only write the JSON schema for editors")
    parser.set_defaults(rest="config")  # words after an option belong there too


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Command-line words as (files, overrides): an existing file is a file even with `=` in its name."""
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    return [word for word in words if word not in overrides], overrides


def run(args: argparse.Namespace) -> int:
    """Print the description, or write the schema."""
    if args.write_schema:
        write_schema(args.write_schema)
        print(f"wrote {args.write_schema}")
        return 0
    print(description(load_config(*split(args.config)), args.world_size, args.gpus_per_node))
    return 0


def description(config: RunConfig, world_size: int | None = None, per_node: int = 8) -> str:
    """What a configuration means on that many ranks; None: on the fewest that it runs on.

    Raises:
        TopologyError: the degrees do not fit the number of ranks, or a node holds none.
    """
    if per_node < 1:
        raise TopologyError("A node holds at least one rank.", got=f"--gpus-per-node {per_node}")
    parallel = config.parallel
    fewest = lcm(parallel.tp * parallel.cp, parallel.ep * parallel.etp) * parallel.pp
    world_size = fewest if world_size is None else world_size
    check_world_size(config, world_size)
    topology = Topology(world_size, parallel.tp, parallel.pp, parallel.ep, parallel.etp, parallel.cp)
    return describe(config, world_size, topology.describe(per_node))
