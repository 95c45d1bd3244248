"""Op `glu`: gated linear unit with the gate weight of each row folded in.

    act_rf = weight_r * gate(h1_rf) * h3_rf,     gate: silu (swiglu) or the exact, erf-based gelu (geglu)

(GLU variants: arXiv 2002.05202. Ours: the weight folded in, so its gradient needs nothing that comes after the
activation, and the rows beyond those that count are known on the device only.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megamoe.ops import kernels
from megamoe.ops.precision import at_least_fp32
from megamoe.ops.registry import Implementation, Op

Glu = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, str], Tensor]
GluBackward = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, str], tuple[Tensor, Tensor, Tensor, Tensor]
]
KINDS = ("swiglu", "geglu")


def reference(
    h1_RF: Tensor,
    h3_RF: Tensor,
    weights_R: Tensor | None = None,
    counts_L: Tensor | None = None,
    kind: str = "swiglu",
) -> Tensor:
    """The specification.

    Args:
        h1_RF, h3_RF: [R, F]. Computed in fp32 (fp64 of fp64), rounded once.
        weights_R: fp32 (fp64 of fp64), None: 1.
        counts_L: int64; rows beyond their sum become zeros, whatever they hold. None: all rows count.
        kind: swiglu or geglu.

    Returns:
        [R, F] in the dtype of h1.
    """
    return _Reference.apply(h1_RF, h3_RF, weights_R, counts_L, kind)


def backward_reference(
    d_act_RF: Tensor,
    h1_RF: Tensor,
    h3_RF: Tensor,
    weights_R: Tensor | None = None,
    counts_L: Tensor | None = None,
    kind: str = "swiglu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to h1, h3 and the weights (fp32 [R], [0] without weights), and the activation once more.

    Rows beyond the counts are zeros in all four.
    """
    d_act, h1, h3 = (_counted(at_least_fp32(t), counts_L) for t in (d_act_RF, h1_RF, h3_RF))
    value, slope = _gate(h1, kind)
    plain = value * h3
    d_weights_R = plain.new_empty(0) if weights_R is None else (plain * d_act).sum(1)
    weights_R1 = 1.0 if weights_R is None else _counted(weights_R[:, None], counts_L)
    d_plain = d_act * weights_R1
    results = (d_plain * h3 * slope, d_plain * value, plain * weights_R1)
    d_h1, d_h3, act = (result.to(h1_RF.dtype) for result in results)
    return d_h1, d_h3, d_weights_R, act


def _forward(h1_RF: Tensor, h3_RF: Tensor, weights_R: Tensor | None, counts_L: Tensor | None, kind: str) -> Tensor:
    value = _gate(at_least_fp32(h1_RF), kind)[0] * h3_RF
    return _counted(value if weights_R is None else value * weights_R[:, None], counts_L).to(h1_RF.dtype)


def _gate(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gate and its derivative."""
    if kind == "swiglu":
        sigmoid = torch.sigmoid(x)
        value = x * sigmoid
        return value, sigmoid + value * (1 - sigmoid)
    if kind == "geglu":
        below = 0.5 * torch.special.erfc(x / -math.sqrt(2))  # exact far below 0 too, where ndtr is not
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        return x * below, below + x * density
    raise ValueError(f"no gate {kind!r}; there are {', '.join(KINDS)}")


def _counted(rows: Tensor, counts_L: Tensor | None) -> Tensor:
    """Zeros instead of rows beyond the sum of the counts, NaN among them. The host does not wait."""
    if counts_L is None:
        return rows
    beyond_R = torch.arange(len(rows), device=rows.device) >= counts_L.sum()
    return rows.masked_fill(beyond_R[:, None], 0.0)


class _Reference(torch.autograd.Function):
    """By hand: each gradient is rounded once, as in the kernels."""

    @staticmethod
    def forward(
        ctx: Any, h1_RF: Tensor, h3_RF: Tensor, weights_R: Tensor | None, counts_L: Tensor | None, kind: str
    ) -> Tensor:
        ctx.save_for_backward(h1_RF, h3_RF, weights_R, counts_L)
        ctx.kind = kind
        return _forward(h1_RF, h3_RF, weights_R, counts_L, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h1_RF, h3_RF, weights_R, counts_L = ctx.saved_tensors
        d_h1, d_h3, d_weights_R, _ = backward_reference(grads[0], h1_RF, h3_RF, weights_R, counts_L, ctx.kind)
        return d_h1, d_h3, None if weights_R is None else d_weights_R, None, None


def _glu_kernel(
    h1_RF: Tensor,
    h3_RF: Tensor,
    weights_R: Tensor | None = None,
    counts_L: Tensor | None = None,
    kind: str = "swiglu",
) -> Tensor:
    return torch.ops.megamoe.glu_fwd(h1_RF, h3_RF, weights_R, counts_L, kind)


def _glu_backward_kernel(
    d_act_RF: Tensor,
    h1_RF: Tensor,
    h3_RF: Tensor,
    weights_R: Tensor | None = None,
    counts_L: Tensor | None = None,
    kind: str = "swiglu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.megamoe.glu_bwd(d_act_RF, h1_RF, h3_RF, weights_R, counts_L, kind)


def _no_kernel(device: torch.device, dtype: torch.dtype) -> str:
    return kernels.unavailable("glu_fwd", device, dtype) or kernels.unavailable("glu_bwd", device, dtype)


GLU: Op[Glu] = Op("glu", Implementation("kernels", _glu_kernel, _no_kernel), Implementation("reference", reference))
# The same choice as above, for ops with a backward pass of their own.
GLU_BACKWARD: Op[GluBackward] = Op(
    "glu",
    Implementation("kernels", _glu_backward_kernel, _no_kernel),
    Implementation("reference", backward_reference),
)
