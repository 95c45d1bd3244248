"""From a cluster's rates to the seconds that a piece of work takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from megamoe.common.errors import ConfigError
from megamoe.config.hardware import HardwareConfig, LinkRates, Pass, Precision, ProductRate
from megamoe.plan.events import Kept

COMPUTE, HOST, INSIDE, BETWEEN = "compute", "host", "inside a node", "between nodes"
"""Resources. A link is that of one rank, in the direction of sending; others send at the same time."""
LINKS = (INSIDE, BETWEEN)


def rate_at(curve: Sequence[ProductRate], rows: float) -> float:
    """FLOP/s of products with so many rows: linear in the logarithm of rows, beyond the ends as at them."""
    if rows <= curve[0].rows:
        return curve[0].flops_per_second
    for low, high in pairwise(curve):
        if rows <= high.rows:
            share = math.log(rows / low.rows) / math.log(high.rows / low.rows)
            return low.flops_per_second + share * (high.flops_per_second - low.flops_per_second)
    return curve[-1].flops_per_second


class Rates:
    """Times of work in one precision on a cluster.

    Raises:
        ConfigError: the cluster's file says nothing of products in this precision.
    """

    def __init__(self, hardware: HardwareConfig, precision: Precision) -> None:
        if precision not in hardware.products:
            raise ConfigError(
                f"The cluster {hardware.name} has no rates of products in {precision}.",
                got=", ".join(hardware.products),
                expected=f"products.{precision}, as training.precision says",
                todo="add them to the file (python -m megamoe bench rates measures), or set training.precision",
            )
        self.hardware, self.precision = hardware, precision
        self.curve, self.experts = hardware.products[precision], hardware.experts.get(precision)

    def product(self, rows: float, flops: float) -> float:
        """A matrix product, or several alike, of so many rows each."""
        return flops / rate_at(self.curve, rows) if flops else 0.0

    def expert_pass(self, kind: Pass, rows: float, width: int, ffn: int, value_bytes: int) -> float:
        """One pass of one expert over its rows: three products and what lies between them."""
        flops = 6.0 * rows * width * ffn
        if not flops:
            return 0.0
        if self.experts is not None:
            return flops / rate_at(getattr(self.experts, kind), rows)
        # Of [rows, ffn]: forward reads h1, h3 and writes the activation; backward reads those two and its gradient and
        # writes two gradients and the activation again (`ops/expert_ffn_fused.py`).
        moved = {"forward": 3, "inputs": 6, "weights": 0}[kind]
        return self.product(rows, flops) + self.moved(moved * rows * ffn * value_bytes)

    def moved(self, size: float) -> float:
        """Bytes read and written one after the other."""
        return size / self.hardware.memory_bytes_per_second

    def rows(self, size: float) -> float:
        """Bytes of rows read and written in another order."""
        return size / (self.hardware.rows_bytes_per_second or self.hardware.memory_bytes_per_second)

    def link(self, name: str) -> LinkRates:
        """Of the resource INSIDE or BETWEEN."""
        link = self.hardware.inside if name == INSIDE else self.hardware.between
        assert link is not None, "ranks on several nodes were refused without it"
        return link

    def transfer(self, link: str, size: float) -> float:
        """One exchange in which this rank sends so many bytes over that class of links."""
        rates = self.link(link)
        return rates.latency_seconds + size / rates.bytes_per_second

    def kept(self) -> Kept:
        """What computation and exchanges leave each other."""
        found = {}
        for name in LINKS if self.hardware.between is not None else (INSIDE,):
            found[COMPUTE, name] = self.link(name).computation_kept
            found[name, COMPUTE] = self.link(name).exchange_kept
        return found
