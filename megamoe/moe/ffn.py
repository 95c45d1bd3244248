"""The SwiGLU feed-forward that every token passes: in dense blocks, and as shared experts of an MoE block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.parallel.axis import SINGLE, Axis
from megamoe.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megamoe.parallel.regions import gather_sequence, reduce_scatter_sequence


class FeedForward(nn.Module):
    """y = w2( silu(w1 x) * w3 x ), without biases. F is cut over tp, outside of it positions are."""

    def __init__(self, hidden_size: int, ffn_size: int, tp: Axis = SINGLE) -> None:
        super().__init__()
        self.tp = tp
        self.w1 = ColumnParallelLinear(hidden_size, ffn_size, tp)
        self.w2 = RowParallelLinear(ffn_size, hidden_size, tp)
        self.w3 = ColumnParallelLinear(hidden_size, ffn_size, tp)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]; [B, S, D] of this rank's positions where there is more than one rank."""
        x = gather_sequence(x, self.tp)
        return reduce_scatter_sequence(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.tp)
