"""Op `grap_affinity`: cosine between tokens and expert vectors that live on disjoint slices of the features.

delta_ti = cos(x_t - m, w_i),   w_i = 0 outside the i-th of E contiguous slices     (GrAP, arXiv 2406.00023)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.ops import affinity_kernels
from megamoe.ops.memory import recycled_like
from megamoe.ops.precision import at_least_fp32
from megamoe.ops.registry import Implementation, Op
from megamoe.ops.slices import slice_owners, through_length, unit_values

GrapAffinity = Callable[[Tensor, Tensor | None, Tensor | None, int], Tensor]

CHUNK_ELEMENTS = 1 << 20
"""Elements of the rows worked on at once: they stay in a CPU's cache, and starting its threads costs little."""
SAFE_SHARE = 1 / 64
"""|x - m|^2 / |x|^2 below which |x|^2 - 2 x m + |m|^2 would lose two of fp32's seven digits."""


def reference(rows_TD: Tensor, mean_D: Tensor | None, values_D: Tensor | None, num_experts: int) -> Tensor:
    """The specification, in plain autograd.

    Args:
        rows_TD: tokens x. bf16 is computed in fp32; the gradient has the rows' dtype.
        mean_D: m, gets no gradient; None: 0.
        values_D: the expert vectors' values on their slices, of any length; None: constant, grouped average pooling.

    Returns:
        Affinity [T, E] in [-1, 1], fp32, or fp64 for fp64 rows. A row equal to m, or a slice of zeros, gives 0 and a
        gradient of 0.
    """
    rows32_TD = at_least_fp32(rows_TD)
    centred_TD = rows32_TD if mean_D is None else rows32_TD - mean_D.detach().to(rows32_TD)
    values_D = torch.ones_like(rows32_TD[:0].sum(0)) if values_D is None else values_D.to(rows32_TD)
    owner_D = slice_owners(rows_TD.shape[1], num_experts, rows_TD.device)
    experts_E1 = torch.arange(num_experts, device=owner_D.device)[:, None]
    vectors_ED = (owner_D == experts_E1) * values_D
    lengths = (_length(centred_TD)[:, None], _length(vectors_ED)[:, None])
    return F.linear(centred_TD / lengths[0], vectors_ED / lengths[1])


def _length(vectors: Tensor) -> Tensor:
    """Of each vector; infinite where it is 0, so that the quotient and its derivative are 0."""
    length = torch.linalg.vector_norm(vectors, dim=-1)
    return length.masked_fill(length == 0, math.inf)


class _Slices(NamedTuple):
    """Unit expert vectors in n groups of neighbours: a product with one group needs only that group's features.

    Attributes:
        vectors: [n, E/n + 2, D/n], each group's vectors on its features, then the mean, then 0 (an odd number of
            columns is slower in a product than the next even one).
        unit_D: the vectors without the zeros. length_D: of the vector a feature belongs to, before it became 1.
    """

    vectors: Tensor
    unit_D: Tensor
    length_D: Tensor


def _unit_slices(values_D: Tensor, mean_D: Tensor, num_experts: int) -> _Slices:
    unit_D, length_D = unit_values(values_D, num_experts)
    groups = _num_groups(len(values_D), num_experts)
    vectors = values_D.new_zeros(groups, num_experts // groups + 2, len(values_D) // groups)
    vectors.scatter_(1, _place(len(values_D), groups, num_experts, values_D.device), unit_D.view(groups, 1, -1))
    vectors[:, -2] = mean_D.view(groups, -1)
    return _Slices(vectors, unit_D, length_D)


def _num_groups(hidden_size: int, num_experts: int) -> int:
    """Groups of 8: narrower products are no faster, wider ones multiply more zeros."""
    return num_experts // 8 if num_experts > 8 and num_experts % 8 == 0 and hidden_size % num_experts == 0 else 1


def _place(hidden_size: int, groups: int, num_experts: int, device: torch.device) -> Tensor:
    """Which vector of its group owns each feature, [n, 1, D/n]."""
    return (slice_owners(hidden_size, num_experts, device) % (num_experts // groups)).view(groups, 1, -1)


class _SlicedAffinity(torch.autograd.Function):
    """Forward and backward by hand: x - m, its unit vector and the expert vectors' zeros are never multiplied out.

    With u_t = (x_t - m) / |x_t - m| and the gradient g of delta:
        d x_t = (sum_i g_ti w_i - u_t sum_i g_ti delta_ti) / |x_t - m|,     d w_i = sum_t g_ti u_t on the slice.
    m is one more vector beside w in the products, since (x - m) w = x w - m w and |x - m|^2 = |x|^2 - 2 x m + |m|^2.
    """

    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, mean_D: Tensor, values_D: Tensor, num_experts: int) -> Tensor:
        ctx.dtype = rows_TD.dtype
        slices = _unit_slices(values_D, mean_D, num_experts)
        products, square_T = _products(rows_TD, slices.vectors)
        from_mean_T = square_T - 2 * products[:, :, -2].sum(0) + mean_D.dot(mean_D)
        if bool((from_mean_T < SAFE_SHARE * square_T).any()):
            rows_TD = rows_TD.to(mean_D) - mean_D
            slices.vectors[:, -2] = 0
            products, from_mean_T = _products(rows_TD, slices.vectors)
        inverse_T = from_mean_T.masked_fill(from_mean_T == 0, math.inf).rsqrt_()
        of_mean = slices.vectors[:, :-2] @ slices.vectors[:, -2, :, None]
        affinity_TE = mean_D.new_empty(len(rows_TD), num_experts)
        torch.sub(products[:, :, :-2], of_mean.transpose(1, 2), out=_grouped(affinity_TE, len(products)))
        affinity_TE.mul_(inverse_T[:, None])
        ctx.save_for_backward(rows_TD, *slices, affinity_TE, inverse_T)
        return affinity_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_TD, vectors, unit_D, length_D, affinity_TE, inverse_T = ctx.saved_tensors
        along_T = (grads[0] * affinity_TE).sum(-1).mul_(inverse_T.square())
        # As the products had a column for the mean: x - m is shortened by `along`, x in the loop below and m here.
        grad = vectors.new_zeros(len(vectors), len(rows_TD), vectors.shape[1])
        torch.mul(_grouped(grads[0], len(vectors)), inverse_T[:, None], out=grad[:, :, :-2])
        grad[:, :, -2] = along_T
        same = rows_TD.dtype == ctx.dtype
        d_rows = recycled_like(rows_TD) if same else torch.empty_like(rows_TD, dtype=ctx.dtype)
        d_vectors = torch.zeros_like(vectors[:, :-2])
        read, written = _Buffer(grad), _Buffer(grad)
        for x, d_x, along, g in _chunks((rows_TD, d_rows, along_T, grad.transpose(0, 1))):
            x, out, g = read.filled(x), written.like(d_x), g.transpose(0, 1)
            torch.bmm(g, vectors, out=_grouped(out, len(vectors)))
            out.addcmul_(x, along[:, None], value=-1)
            if out is not d_x:
                d_x.copy_(out)
            if ctx.needs_input_grad[2]:
                d_vectors.baddbmm_(g[:, :, :-2].transpose(1, 2), _grouped(x, len(vectors)))
        if not ctx.needs_input_grad[2]:
            return d_rows, None, None, None
        d_vectors -= grad[:, :, :-2].sum(1)[:, :, None] * vectors[:, -2:-1]
        num_experts = affinity_TE.shape[1]
        place = _place(len(unit_D), len(vectors), num_experts, unit_D.device)
        d_unit_D = d_vectors.gather(1, place).view(-1)
        return d_rows, None, through_length(d_unit_D, unit_D, length_D, num_experts), None


def _products(rows_TD: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows with every group's vectors [n, T, E/n + 2], and their squared lengths [T]."""
    products = vectors.new_empty(len(vectors), len(rows_TD), vectors.shape[1])
    length_T = vectors.new_empty(len(rows_TD))
    read = _Buffer(vectors)
    for x, length, product in _chunks((rows_TD, length_T, products.transpose(0, 1))):
        x = read.filled(x)
        torch.bmm(_grouped(x, len(vectors)), vectors.transpose(1, 2), out=product.transpose(0, 1))
        torch.linalg.vector_norm(x, dim=-1, out=length)
    return products, length_T.square_()


class _Buffer:
    """Rows of another precision, chunk after chunk in the same memory, so that it stays in the cache."""

    def __init__(self, precision: Tensor) -> None:
        self.memory = precision.new_empty(0)

    def like(self, rows: Tensor) -> Tensor:
        """Uninitialised memory for as many rows; the rows themselves if they have the precision already."""
        if rows.dtype == self.memory.dtype:
            return rows
        if self.memory.numel() < rows.numel():
            self.memory = self.memory.new_empty(rows.shape)
        return self.memory[: len(rows)]

    def filled(self, rows: Tensor) -> Tensor:
        """The rows in the precision."""
        memory = self.like(rows)
        return memory if memory is rows else memory.copy_(rows)


def _chunks(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor, chunk by chunk; the first tensor's width decides how many."""
    size = max(1, CHUNK_ELEMENTS // tensors[0].shape[1])
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """[T, n * w] as a view [n, T, w]."""
    return rows.unflatten(1, (groups, -1)).transpose(0, 1)


def sliced(rows_TD: Tensor, mean_D: Tensor | None, values_D: Tensor | None, num_experts: int) -> Tensor:
    """As :func:`reference`; the fastest one of torch's own ops on a CPU. Waits for one comparison on the host."""
    like = at_least_fp32(rows_TD[:0])
    mean_D = like.new_zeros(rows_TD.shape[1]) if mean_D is None else mean_D.detach().to(like)
    values_D = like.new_ones(rows_TD.shape[1]) if values_D is None else values_D.to(like)
    affinity_TE: Tensor = _SlicedAffinity.apply(rows_TD, mean_D, values_D, num_experts)
    return affinity_TE


def _waits(device: torch.device, dtype: torch.dtype) -> str:
    return "" if device.type == "cpu" else "the host would wait for the device in every call"


GRAP_AFFINITY: Op[GrapAffinity] = Op(
    "grap_affinity",
    Implementation("kernels", affinity_kernels.compiled, affinity_kernels.unavailable),
    Implementation("sliced", sliced, not_preferred=_waits),
    Implementation("reference", reference),
)
