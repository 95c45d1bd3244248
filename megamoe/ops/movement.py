"""Ops `permute_rows` and `unpermute_rows`: rows to their experts' places, and their sum back to their tokens.

    y_r = x_(source_r div K)          out_t = sum over k of weight_tk * y_(place_tk)

Both follow from one plan in two forms (ours): `place`, int32 [T, K], is the row of each choice, -1 where it has none;
`source`, int32 [R], is the choice t * K + k of each row, -1 where the row is a hole. Each is the inverse of the
other, so both ops and their gradients gather: nothing is added by atomics, and results repeat bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megamoe.ops import kernels
from megamoe.ops.precision import at_least_fp32
from megamoe.ops.registry import Implementation, Op

PermuteRows = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
UnpermuteRows = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def permute_rows_reference(
    x_TD: Tensor, source_R: Tensor, place_TK: Tensor, values_TK: Tensor | None = None, empty: float = -1.0
) -> Tensor:
    """The specification of `permute_rows`.

    Args:
        x_TD: rows, [T, D].
        source_R, place_TK: see above.
        values_TK: one value beside each choice, fp32 (fp64 of fp64 rows); its bits travel in further columns.
        empty: what a hole has for a value.

    Returns:
        [R, D], zeros in holes; with values [R, D + max(1, bytes of a value / bytes of an element)].

    Raises:
        NotImplementedError: a gradient through an op with values.
    """
    y_RD = _Permute.apply(x_TD, source_R, place_TK)
    if values_TK is None:
        return y_RD
    if torch.is_grad_enabled() and (x_TD.requires_grad or values_TK.requires_grad):
        raise NotImplementedError("permute_rows has no gradient where values travel with the rows")
    values_R = _of_choice(values_TK.reshape(-1, 1), source_R, empty)
    return torch.cat([y_RD, values_R.view(x_TD.dtype)], dim=1)


def unpermute_rows_reference(
    y_RD: Tensor, place_TK: Tensor, source_R: Tensor, weights_TK: Tensor | None = None
) -> Tensor:
    """The specification of `unpermute_rows`.

    Args:
        y_RD: rows, [R, D].
        place_TK, source_R: see above.
        weights_TK: fp32 (fp64 of fp64 rows), None: 1.

    Returns:
        [T, D] in the rows' dtype: summed in fp32 in the order of k, rounded once.
    """
    return _Unpermute.apply(y_RD, place_TK, source_R, weights_TK)


def unpermute_backward_reference(
    d_out_TD: Tensor, y_RD: Tensor, place_TK: Tensor, source_R: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute_rows` with weights: to the rows, zeros in holes, and to the weights, 0 without a row."""
    top_k = place_TK.shape[1]
    weights_R1 = _of_choice(weights_TK.reshape(-1, 1), source_R)
    d_y_RD = (at_least_fp32(_of_choice(d_out_TD, source_R, divisor=top_k)) * weights_R1).to(y_RD.dtype)
    wide_TD = at_least_fp32(d_out_TD)
    dots = [(at_least_fp32(_of_choice(y_RD, place_T)) * wide_TD).sum(1) for place_T in place_TK.unbind(1)]
    return d_y_RD, torch.stack(dots, 1)


def _of_choice(rows_ND: Tensor, index_M: Tensor, fill: float = 0.0, divisor: int = 1) -> Tensor:
    """Row index // divisor for each index, `fill` where the index is negative. No wait of the host."""
    if not len(rows_ND):
        return rows_ND.new_full((len(index_M), *rows_ND.shape[1:]), fill)
    chosen = rows_ND.index_select(0, index_M.clamp(min=0) // divisor)
    return chosen.masked_fill_((index_M < 0)[:, None], fill)


def _sum_of_choices(y_RD: Tensor, place_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    total_TD = at_least_fp32(y_RD.new_zeros(len(place_TK), y_RD.shape[1]))
    for k, place_T in enumerate(place_TK.unbind(1)):
        part_TD = _of_choice(y_RD, place_T)
        total_TD.add_(part_TD) if weights_TK is None else total_TD.addcmul_(part_TD, weights_TK[:, k, None])
    return total_TD.to(y_RD.dtype)


class _Permute(torch.autograd.Function):
    """By hand, because plain autograd would round each addition of the backward pass to the rows' dtype."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(source_R, place_TK)
        return _of_choice(x_TD, source_R, divisor=place_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source_R, place_TK = ctx.saved_tensors
        return _Unpermute.apply(grads[0], place_TK, source_R, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, place_TK: Tensor, source_R: Tensor, weights_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(None if weights_TK is None else y_RD, place_TK, source_R, weights_TK)
        return _sum_of_choices(y_RD, place_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, place_TK, source_R, weights_TK = ctx.saved_tensors
        if weights_TK is None:
            return _Permute.apply(grads[0], source_R, place_TK), None, None, None
        d_y_RD, d_weights_TK = unpermute_backward_reference(grads[0], y_RD, place_TK, source_R, weights_TK)
        return d_y_RD, None, None, d_weights_TK


def _permute_rows_kernel(
    x_TD: Tensor, source_R: Tensor, place_TK: Tensor, values_TK: Tensor | None = None, empty: float = -1.0
) -> Tensor:
    return torch.ops.megamoe.permute_rows(x_TD, source_R, place_TK, values_TK, empty)


def _unpermute_rows_kernel(
    y_RD: Tensor, place_TK: Tensor, source_R: Tensor, weights_TK: Tensor | None = None
) -> Tensor:
    return torch.ops.megamoe.unpermute_rows(y_RD, place_TK, source_R, weights_TK)


PERMUTE_ROWS: Op[PermuteRows] = Op(
    "permute_rows",
    Implementation(
        "kernels", _permute_rows_kernel, lambda device, dtype: kernels.unavailable("permute_rows", device, dtype)
    ),
    Implementation("reference", permute_rows_reference),
    key="rows",
)
UNPERMUTE_ROWS: Op[UnpermuteRows] = Op(
    "unpermute_rows",
    Implementation(
        "kernels", _unpermute_rows_kernel, lambda device, dtype: kernels.unavailable("unpermute_rows", device, dtype)
    ),
    Implementation("reference", unpermute_rows_reference),
    key="rows",
)
