"""What each op has to move and to compute, counted by hand: the floor that no implementation runs below.

Every input that is needed is read once and every output written once, whatever an implementation does. A floor is the
larger of two times: bytes over the memory's rate, and floating-point operations over the matrix units' rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

INDEX, FP32, COUNT = 4, 4, 8
"""Bytes of an int32 index, an fp32 value, an int64 count."""


@dataclass(frozen=True)
class Shape:
    """Size of a case.

    Attributes:
        tokens, hidden, ffn, experts, top_k: T, D, F, E, K.
        itemsize: bytes of an element of the rows.
    """

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    itemsize: int = 2

    @property
    def rows(self) -> int:
        """R, without drops: T * K."""
        return self.tokens * self.top_k

    @property
    def of_tokens(self) -> int:
        """Bytes of a tensor [T, D]."""
        return self.tokens * self.hidden * self.itemsize

    @property
    def of_rows(self) -> int:
        """Bytes of a tensor [R, D]."""
        return self.rows * self.hidden * self.itemsize

    @property
    def of_activations(self) -> int:
        """Bytes of a tensor [R, F]."""
        return self.rows * self.ffn * self.itemsize


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, and floating-point operations on the matrix units in bf16."""

    read: int
    written: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.read + self.written

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Seconds below which it cannot be done at these rates."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def _plan(s: Shape) -> Cost:
    return Cost(read=COUNT * s.rows, written=2 * INDEX * s.rows + COUNT * s.experts)


def _plan_capacity(s: Shape) -> Cost:
    return Cost(_plan(s).read + FP32 * s.rows + COUNT * s.experts, _plan(s).written)


def _permute(s: Shape) -> Cost:
    return Cost(s.of_tokens + INDEX * s.rows, s.of_rows)


def _unpermute(s: Shape) -> Cost:
    return Cost(s.of_rows + INDEX * s.rows, s.of_tokens)


def _unpermute_weighted(s: Shape) -> Cost:
    return Cost(_unpermute(s).read + FP32 * s.rows, s.of_tokens)


def _unpermute_bwd(s: Shape) -> Cost:
    return Cost(s.of_tokens + s.of_rows + (INDEX + FP32) * s.rows, s.of_rows + FP32 * s.rows)


def _glu_fwd(s: Shape) -> Cost:
    return Cost(2 * s.of_activations + FP32 * s.rows + COUNT * s.experts, s.of_activations)


def _glu_bwd(s: Shape) -> Cost:
    return Cost(3 * s.of_activations + FP32 * s.rows + COUNT * s.experts, 3 * s.of_activations + FP32 * s.rows)


def _choices(s: Shape) -> int:
    """Bytes of scores [T, E], inverse norms [T] and experts [T, K]."""
    return FP32 * s.tokens * (s.experts + 1) + INDEX * s.rows


def _grap_fwd(s: Shape) -> Cost:
    return Cost(s.of_tokens + 2 * FP32 * s.hidden, _choices(s))


def _grap_bwd(s: Shape) -> Cost:
    gradient = FP32 * s.tokens * s.experts
    return Cost(
        2 * gradient + FP32 * s.tokens + s.of_tokens + 2 * FP32 * s.hidden,
        s.of_tokens + FP32 * s.hidden,
    )


def _products(s: Shape) -> int:
    """Operations of one product of [T, D] with [E, D]."""
    return 2 * s.tokens * s.experts * s.hidden


def _router_fwd(s: Shape) -> Cost:
    # bf16 rows are exact; fp32 vectors are three bf16 parts, so there are three products.
    return Cost(s.of_tokens + FP32 * s.experts * s.hidden, _choices(s), 3 * _products(s))


def _router_bwd(s: Shape) -> Cost:
    # At least: rows' gradient of two parts by two parts without the smallest, three products; vectors' of two parts by
    # exact rows. (The op itself computes in fp32, which the GPU does at a tenth of that rate.)
    vectors, gradient = FP32 * s.experts * s.hidden, FP32 * s.tokens * s.experts
    read = 2 * gradient + FP32 * s.tokens + s.of_tokens + vectors
    return Cost(read, s.of_tokens + vectors, 5 * _products(s))


COSTS: dict[str, Callable[[Shape], Cost]] = {
    "plan": _plan,
    "plan_capacity": _plan_capacity,
    "permute": _permute,
    "permute_bwd": _unpermute,
    "unpermute": _unpermute,
    "unpermute_weighted": _unpermute_weighted,
    "unpermute_bwd": _unpermute_bwd,
    "glu_fwd": _glu_fwd,
    "glu_bwd": _glu_bwd,
    "grap_fwd": _grap_fwd,
    "grap_bwd": _grap_bwd,
    "router_fwd": _router_fwd,
    "router_bwd": _router_bwd,
}
"""By name of the measurement. `plan`: int64 experts without keys; `plan_capacity`: with keys and capacities."""


def cost(name: str, shape: Shape) -> Cost:
    """Of one measurement."""
    return COSTS[name](shape)


def grouped_flops(shape: Shape) -> int:
    """Operations of the experts' nine grouped products, forward (3), for the rows (3) and for the weights (3)."""
    return 9 * 2 * shape.rows * shape.hidden * shape.ffn
