"""`preflight`: are these nodes fit for a long training, and if not, which of them?"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.common import env
from megamoe.common.errors import ConfigError, TopologyError

if TYPE_CHECKING:
    from megamoe.testing.nodes import Facts
    from megamoe.testing.parity_cases import Plan
    from megamoe.testing.preflight import Result

SUMMARY = "check the nodes of a cluster before a long training, and name the bad ones"
DESCRIPTION = """\
Under srun, torchrun or deepspeed (launch/preflight.sh starts it), three things:

  nodes     the same versions and GPUs everywhere, nothing else on the GPUs, a disk to write to, clocks together
  links     what every two nodes exchange, all of their ranks at once, and every two ranks of a node; pairs take turns,
            so that none disturbs another
  parity    some steps in a parallel layout over all ranks against one process (python -m megamoe parity)

A node is refused that does not answer, that differs from the others, or whose links are slower than half of what the
others reach, or than --min-bandwidth.

Exit code: 0; 1 if parity missed, 2 for bad input, 3 if nodes are refused.
"""
REFUSED = 3
HEADER = ["host", "ranks", "GPUs", "disk GB", "clock s", "within GB/s", "to others GB/s", "verdict"]
_POSITIVE = ("megabytes", "limit", "steps")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("preflight", help=SUMMARY, description=DESCRIPTION, formatter_class=layout)

    def number(name: str, about: str, default: float | None = None) -> None:
        parser.add_argument(name, type=float, metavar="N", default=default, help=about)

    number("--min-bandwidth", "GB/s that two nodes have to reach, each way at once", 0.0)
    number("--min-disk", "GB to be free in --folder (default: %(default)g)", 1.0)
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs will write (default: this one)")
    number("--megabytes", "that two ranks send each other at a time (default: 64 on GPUs, 4 without)")
    number("--limit", "seconds for a node to answer, and for an exchange (default: %(default)g)", 60.0)
    parser.add_argument("--parity", metavar="LAYOUT", help="as tp2-ep4, or none (default: ep over all ranks)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of parity (default: %(default)s)")
    parser.add_argument("--refused", type=Path, metavar="FILE", help="write their names there, for sbatch --exclude")


def run(args: argparse.Namespace) -> int:
    """Check; print the table on rank 0; the same exit code on all ranks."""
    _check(args)
    plan = _plan(args)
    # Only now: these bring in the engine.
    from megamoe.testing.parity_ranks import quieten
    from megamoe.testing.preflight import Options, preflight

    quieten(env.rank())
    options = Options(args.min_bandwidth, 1e9 * args.min_disk, args.megabytes, args.limit, plan)
    return preflight(options, _facts(args.folder), lambda result: _publish(args, result))


def _check(args: argparse.Namespace) -> None:
    for name in ("min_bandwidth", "min_disk", *_POSITIVE):
        value = getattr(args, name)
        if value is not None and (value < 0 or (value == 0 and name in _POSITIVE)):
            raise ConfigError(f"--{name.replace('_', '-')} makes no sense.", got=f"{value:g}", expected="more than 0")


def _plan(args: argparse.Namespace) -> Plan | None:
    """One layout over all ranks, in fp32; None: no parity."""
    from megamoe.testing.parity_cases import Wanted, list_settings, make_plan
    from megamoe.testing.parity_topologies import parse

    ranks = env.world_size()
    if args.parity == "none" or ranks == 1:
        return None
    layout = parse(args.parity or f"ep{ranks}")
    if layout.ranks != ranks:
        raise TopologyError(
            "The layout for parity has to be one of all ranks.",
            got=f"{layout.name}, which is {layout.ranks} ranks",
            expected=f"{ranks} ranks",
            todo="give dp as well, to fill them, or --parity none",
        )
    plan = make_plan(Wanted([layout], [1], list_settings(["topk"], ["dropless"], ["fp32"]), args.steps))
    if not plan.runnable():
        raise ConfigError("The layout for parity is refused.", got=plan.cases[0].refusal, todo="choose another one")
    return plan


def _facts(folder: Path) -> Facts:
    """The first rank of a host looks around on it; the others only say where they are."""
    from megamoe.cli import doctor
    from megamoe.testing.nodes import Facts, facts

    if env.local_rank() > 0:
        return Facts(socket.gethostname())
    kernels = str(doctor.kernels.state().get("version", "not installed"))
    return facts(doctor.versions() | {"megamoe-kernels": kernels}, doctor.gpus(), folder)


def _publish(args: argparse.Namespace, result: Result) -> int:
    """Print what was found, and write the names."""
    from megamoe.cli.tables import print_table

    print_table(
        ["host", "ranks", "GPUs", "disk GB", "clock s", "within GB/s", "to others GB/s", "verdict"], _rows(result)
    )
    missed = [finding for finding in result.parity if finding.verdict not in ("equal", "flip")]
    for finding in result.parity:
        print(f"parity, {finding.case}: {finding.verdict} ({finding.seconds:.0f} s) {finding.note}".rstrip())
    names = [host for host in result.ranks if host in result.refused]
    print(f"refused: {','.join(names)}" if names else f"none of {len(result.ranks)} nodes refused")
    sys.stdout.flush()
    if args.refused is not None:
        args.refused.write_text(",".join(names) + "\n" if names else "")
    return REFUSED if names else int(bool(missed))


def _rows(result: Result) -> list[list[str]]:
    rows = []
    for host, ranks in result.ranks.items():
        node, rates = result.nodes.get(host), result.rates
        others = [rate for pair, rate in rates.between.items() if host in pair] if rates is not None else []
        rows.append(
            [
                host,
                f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
                _gpus(node.gpus) if node is not None else "?",
                f"{node.free_bytes / 1e9:.0f}" if node is not None else "?",
                f"{result.clocks[host]:+.1f}" if host in result.clocks else "?",
                f"{rates.within[host]:.3g}" if rates is not None and host in rates.within else "-",
                f"{min(others):.3g} to {max(others):.3g}" if others else "-",
                "refused: " + "; ".join(result.refused[host]) if host in result.refused else "good",
            ]
        )
    return rows


def _gpus(names: Sequence[str]) -> str:
    return f"{len(names)} x {names[0].partition(',')[0]}" if names else "none"
