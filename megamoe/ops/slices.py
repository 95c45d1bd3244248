"""Contiguous slices of the features, one for each expert, and the unit vectors that live on them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.cache
def slice_owners(hidden_size: int, num_experts: int, device: torch.device) -> Tensor:
    """The expert that each feature belongs to, int64 [D]: contiguous slices, the first D mod E one feature longer."""
    small, longer = divmod(hidden_size, num_experts)
    lengths = torch.tensor([small + (i < longer) for i in range(num_experts)], device=device)
    return torch.repeat_interleave(torch.arange(num_experts, device=device), lengths)


def unit_values(values_D: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The values on their slices, each slice of length 1, and the length it had, [D] each; a slice of zeros stays one,
    and its length counts as infinite."""
    owner_D = slice_owners(len(values_D), num_experts, values_D.device)
    square_E = values_D.new_zeros(num_experts).index_add_(0, owner_D, values_D.square())
    length_D = square_E.masked_fill_(square_E == 0, math.inf).sqrt_()[owner_D]
    return values_D / length_D, length_D


def through_length(d_unit_D: Tensor, unit_D: Tensor, length_D: Tensor, num_experts: int) -> Tensor:
    """Gradient of the values, from that of :func:`unit_values`."""
    owner_D = slice_owners(len(unit_D), num_experts, unit_D.device)
    along_E = unit_D.new_zeros(num_experts).index_add_(0, owner_D, unit_D * d_unit_D)
    return (d_unit_D - unit_D * along_E[owner_D]) / length_D
