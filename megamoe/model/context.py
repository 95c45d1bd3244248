"""Attention over sequences that are spread over ranks: Ulysses (arXiv 2309.14509), through DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

from torch import Tensor

from megamoe.parallel.axis import Axis

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, N, S, H], keys and values [B, G, S, H] to [B, N, S, H]."""


def attend_over(cp: Axis, attend: Attend, queries_BNSH: Tensor, keys_BGSH: Tensor, values_BGSH: Tensor) -> Tensor:
    """`attend` for S positions of which each rank has S / P: in exchange for some of its positions of all heads, a rank
    gets all positions of some heads; afterwards back.

    N has to divide by P. Where G does not, keys and values are repeated as often as it takes, which costs their part of
    the exchange once more each time.
    """
    if cp.size == 1:
        return attend(queries_BNSH, keys_BGSH, values_BGSH)
    from deepspeed.sequence.layer import DistributedAttention

    num_kv_heads = keys_BGSH.shape[1]
    repeats = cp.size // gcd(cp.size, num_kv_heads)
    repeated = (x.repeat_interleave(repeats, 1) for x in (keys_BGSH, values_BGSH))
    inputs = [x.transpose(1, 2) for x in (queries_BNSH, *repeated)]

    def local(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
        return attend(*(x.transpose(1, 2) for x in (queries, keys, values))).transpose(1, 2).contiguous()

    exchanged = DistributedAttention(local, cp.group, scatter_idx=2, gather_idx=1)  # of [B, S, heads, H]
    out_BSNH: Tensor = exchanged(*inputs, 0)
    return out_BSNH.transpose(1, 2)
