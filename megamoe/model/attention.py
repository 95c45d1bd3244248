"""Causal grouped-query attention with rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.ops.precision import at_least_fp32


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
    """Grouped-query attention through torch's scaled_dot_product_attention, without biases."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_size: int, rope_theta: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.rope_theta = rope_theta
        self.wq = nn.Linear(hidden_size, num_heads * head_size, bias=False)
        self.wk = nn.Linear(hidden_size, num_kv_heads * head_size, bias=False)
        self.wv = nn.Linear(hidden_size, num_kv_heads * head_size, bias=False)
        self.wo = nn.Linear(num_heads * head_size, hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, cache: KeyValueCache | None = None, mask_B1SS: Tensor | None = None) -> Tensor:
        """[B, S, D] to [B, S, D]. With a cache, the S positions follow those already in it.

        Args:
            mask_B1SS: bool, which positions each one sees (`document_mask`), without a cache; None: all up to it.
        """
        past = cache.length if cache is not None else 0
        cos_SH, sin_SH = self._rotation(x_BSD, past)
        queries = rotate(self._heads(self.wq(x_BSD), self.num_heads), cos_SH, sin_SH)
        keys = rotate(self._heads(self.wk(x_BSD), self.num_kv_heads), cos_SH, sin_SH)
        values = self._heads(self.wv(x_BSD), self.num_kv_heads)
        if cache is not None:
            keys, values = cache.append(keys, values)
        out_BNSH = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask_B1SS if mask_B1SS is not None else _mask(x_BSD.shape[1], past, x_BSD.device),
            is_causal=past == 0 and mask_B1SS is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.wo(out_BNSH.transpose(1, 2).flatten(2))

    def _rotation(self, x_BSD: Tensor, past: int) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        return rotation(x_BSD.shape[1], past, self.head_size, self.rope_theta, x_BSD.device, dtype)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_size)).transpose(1, 2)


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
