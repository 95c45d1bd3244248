"""The routed experts of one rank, as stacked weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamoe.ops.expert_ffn import EXPERT_FFN


class Experts(nn.Module):
    """L SwiGLU feed-forwards without biases.

    w1, w3: [L, F, D]; w2: [L, D, F]. DeepSpeed saves and loads experts under exactly these names.
    """

    def __init__(self, num_local: int, hidden_size: int, ffn_size: int, implementation: str = "auto") -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_local, hidden_size, ffn_size))
        self.w3 = nn.Parameter(torch.empty(num_local, ffn_size, hidden_size))
        self.implementation = implementation

    def forward(self, rows_RD: Tensor, weights_R: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        """Rows grouped by expert [R, D] to rows [R, D], each multiplied by its gate weight."""
        ffn = EXPERT_FFN.choose(self.implementation, rows_RD.device, rows_RD.dtype).function
        return ffn(rows_RD, weights_R, self.w1, self.w2, self.w3, rows_per_expert_L)
