"""Causal grouped-query attention with rotary positions."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.model.context import attend_over
from megamoe.ops.precision import at_least_fp32
from megamoe.parallel.axis import SINGLE, Axis
from megamoe.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megamoe.parallel.regions import gather_sequence, reduce_scatter_sequence


class KeyValueCache:
    """Keys and values of the positions seen so far, for generation. One per attention layer."""

    def __init__(self) -> None:
        self.keys_BGSH: Tensor | None = None
        self.values_BGSH: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions held."""
        return 0 if self.keys_BGSH is None else self.keys_BGSH.shape[2]

    def append(self, keys_BGSH: Tensor, values_BGSH: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions and return all of them."""
        if self.keys_BGSH is not None and self.values_BGSH is not None:
            keys_BGSH = torch.cat([self.keys_BGSH, keys_BGSH], dim=2)
            values_BGSH = torch.cat([self.values_BGSH, values_BGSH], dim=2)
        self.keys_BGSH, self.values_BGSH = keys_BGSH, values_BGSH
        return keys_BGSH, values_BGSH


class Attention(nn.Module):
    """Grouped-query attention through torch's scaled_dot_product_attention, without biases.

    Over tp, heads are cut: N/P query heads with the key/value heads that they look at. Where there are fewer of those
    than ranks, every rank holds the projections of all of them and computes the one it needs. Between layers a rank has
    its part of the positions only, so it gathers them first and adds up and scatters its part of the output at last
    (Megatron-LM's tensor and sequence parallelism, arXiv 1909.08053 and 2205.05198). Over cp, see `context`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        rope_theta: float,
        tp: Axis = SINGLE,
        cp: Axis = SINGLE,
    ) -> None:
        super().__init__()
        self.tp, self.cp, self.head_size, self.rope_theta = tp, cp, head_size, rope_theta
        self.num_heads, self.num_kv_heads = num_heads // tp.size, max(1, num_kv_heads // tp.size)
        self.kv_head = tp.rank * num_kv_heads // tp.size if num_kv_heads < tp.size else None
        kv_tp = tp if self.kv_head is None else SINGLE
        self.wq = ColumnParallelLinear(hidden_size, num_heads * head_size, tp)
        self.wk = ColumnParallelLinear(hidden_size, num_kv_heads * head_size, kv_tp)
        self.wv = ColumnParallelLinear(hidden_size, num_kv_heads * head_size, kv_tp)
        self.wo = RowParallelLinear(num_heads * head_size, hidden_size, tp)

    def forward(self, x_BSD: Tensor, cache: KeyValueCache | None = None, mask_B1SS: Tensor | None = None) -> Tensor:
        """[B, S, D] to [B, S, D], of this rank's positions. With a cache, these follow those already in it.

        Args:
            mask_B1SS: bool, which positions each one sees (`document_mask`), without a cache; None: all up to it.
        """
        x_BSD = gather_sequence(x_BSD, self.tp)
        past = cache.length if cache is not None else 0
        cos_SH, sin_SH = self._rotation(x_BSD, past)
        queries = rotate(self._heads(self.wq(x_BSD)), cos_SH, sin_SH)
        keys = rotate(self._heads(self._key_value(self.wk, x_BSD)), cos_SH, sin_SH)
        values = self._heads(self._key_value(self.wv, x_BSD))
        if cache is not None:
            keys, values = cache.append(keys, values)
        mask = mask_B1SS if mask_B1SS is not None else _mask(x_BSD.shape[1], past, x_BSD.device)
        attend = partial(
            F.scaled_dot_product_attention,
            attn_mask=mask,
            is_causal=past == 0 and mask_B1SS is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        out_BNSH = attend_over(self.cp, attend, queries, keys, values)
        return reduce_scatter_sequence(self.wo(out_BNSH.transpose(1, 2).flatten(2)), self.tp)

    def _key_value(self, projection: nn.Linear, x_BSD: Tensor) -> Tensor:
        if self.kv_head is None:
            return projection(x_BSD)
        # All heads, which are few, and not a part of the weight: ZeRO-3 has that there only while its module runs.
        return projection(x_BSD).unflatten(-1, (-1, self.head_size))[..., self.kv_head, :]

    def _rotation(self, x_BSD: Tensor, past: int) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        start = past + self.cp.rank * x_BSD.shape[1]
        return rotation(x_BSD.shape[1], start, self.head_size, self.rope_theta, x_BSD.device, dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


def document_mask(documents_BS: Tensor) -> Tensor:
    """Positions up to each one in the same document, bool [B, 1, S, S]; padding (-1) sees padding."""
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS.tril_()[:, None]


def _mask(new: int, past: int, device: torch.device) -> Tensor | None:
    """Which of the past + new positions each new one sees; None where a plain causal mask or no mask says it."""
    if past == 0 or new == 1:
        return None
    positions = torch.arange(past + new, device=device)
    return positions[None, :] <= positions[past:, None]


def rotation(
    length: int, start: int, head_size: int, theta: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles (RoFormer, arXiv 2104.09864), [S, H], for positions start ... ."""
    exponents = torch.arange(0, head_size, 2, device=device, dtype=dtype) / head_size
    positions = torch.arange(start, start + length, device=device, dtype=dtype)
    angles_SH = torch.outer(positions, theta**-exponents).repeat(1, 2)
    return angles_SH.cos(), angles_SH.sin()


def rotate(x_BNSH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Rotate feature pairs (i, i + H/2) by the position's angle, in fp32 at least."""
    wide_BNSH = at_least_fp32(x_BNSH)
    first, second = wide_BNSH.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide_BNSH * cos_SH + turned * sin_SH).to(x_BNSH.dtype)
