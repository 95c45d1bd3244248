"""Shapes of `plan`. It has no gradient: its results are integers."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("megamoe::plan")
def _plan(
    experts: Tensor,
    num_experts: int,
    keys: Tensor | None = None,
    capacity: Tensor | None = None,
    slots: int = 0,
    max_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = num_experts * slots if slots else max_rows or experts.numel()
    return (
        experts.new_empty(experts.shape, dtype=torch.int32),
        experts.new_empty(rows, dtype=torch.int32),
        experts.new_empty(num_experts, dtype=torch.int64),
    )
