"""Op `router_scores`: products of tokens with dense expert vectors, or cosines for vectors of length 1.

s_te = <x_t - m, v_e>,   normalised: s_te = <x_t - m, v_e> / |x_t - m|
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.ops.kernels import unavailable
from megamoe.ops.precision import at_least_fp32
from megamoe.ops.registry import Implementation, Op

RouterScores = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


def reference(rows_TD: Tensor, vectors_ED: Tensor, mean_D: Tensor | None, normalize: bool) -> Tensor:
    """The specification, in plain autograd.

    Args:
        rows_TD: tokens x. bf16 is computed in fp32; the gradient has the rows' dtype.
        vectors_ED: v, used as they are.
        mean_D: m, gets no gradient; None: 0.
        normalize: divide by the length of x - m. A row equal to m gives 0 and a gradient of 0.

    Returns:
        Scores [T, E], fp32, or fp64 for fp64 rows.
    """
    centred_TD = at_least_fp32(rows_TD)
    if mean_D is not None:
        centred_TD = centred_TD - mean_D.detach().to(centred_TD)
    scores_TE = F.linear(centred_TD, vectors_ED.to(centred_TD))
    if not normalize:
        return scores_TE
    length_T1 = torch.linalg.vector_norm(centred_TD, dim=-1, keepdim=True)
    return scores_TE / length_T1.masked_fill(length_T1 == 0, math.inf)


def compiled(rows_TD: Tensor, vectors_ED: Tensor, mean_D: Tensor | None, normalize: bool) -> Tensor:
    """As :func:`reference`, with one pass over the rows."""
    return with_choice(rows_TD, vectors_ED, mean_D, normalize, top_k=0)[0]


def with_choice(
    rows_TD: Tensor, vectors_ED: Tensor, mean_D: Tensor | None, normalize: bool, top_k: int
) -> tuple[Tensor, Tensor]:
    """As :func:`compiled`, and from the same pass the experts of each token's K largest scores, int32 [T, K], largest
    first; of equal ones the lower expert."""
    like = at_least_fp32(rows_TD[:0])
    mean_D = None if mean_D is None else mean_D.detach().to(like).contiguous()
    rows_TD = rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()
    vectors_ED = vectors_ED.to(like).contiguous()
    scores_TE, _, experts_TK = torch.ops.megamoe.router_fwd(rows_TD, vectors_ED, mean_D, normalize, top_k)
    return scores_TE, experts_TK


def _unavailable(device: torch.device, dtype: torch.dtype) -> str:
    return unavailable("router_fwd", device, dtype)


def _slower(device: torch.device, dtype: torch.dtype) -> str:
    return "torch's matrix product is faster on a CPU" if device.type == "cpu" else ""


ROUTER_SCORES: Op[RouterScores] = Op(
    "router_scores",
    Implementation("kernels", compiled, _unavailable, not_preferred=_slower),
    Implementation("reference", reference),
)


LARGEST_ON_GPU = 1024, 16384, 1 << 22
"""Experts, features and rows that the compiled op takes there."""


def router_scores(
    rows_TD: Tensor,
    vectors_ED: Tensor,
    mean_D: Tensor | None = None,
    normalize: bool = False,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Scores [T, E]; arguments as in :func:`reference`.

    Raises:
        KernelUnavailable: `implementation` names one that cannot run here.
    """
    sizes = len(vectors_ED), rows_TD.shape[1], len(rows_TD)
    fits = all(size <= most for size, most in zip(sizes, LARGEST_ON_GPU, strict=True))
    if implementation == "auto" and rows_TD.device.type == "cuda" and not fits:
        implementation = "reference"
    run = ROUTER_SCORES.choose(implementation, rows_TD.device, rows_TD.dtype).function
    return run(rows_TD, vectors_ED, mean_D, normalize)
