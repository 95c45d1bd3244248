"""The routed experts of one rank, as stacked weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megamoe.ops.expert_ffn import EXPERT_FFN, EXPERT_FFN_SPLIT
from megamoe.ops.expert_ffn_later import Chunks
from megamoe.parallel.axis import SINGLE, Axis
from megamoe.parallel.linear import share
from megamoe.parallel.shards import Shard, mark

Pipeline = Callable[[Tensor, Tensor, Callable[[], Chunks]], Tensor]
"""Rows, their gate weights and a maker of the experts' work in chunks, called once, to the results."""


class Experts(nn.Module):
    """L SwiGLU feed-forwards without biases, or of each the part of this rank of an expert-tensor group of P.

    w1, w3: [L, F/P, D]; w2: [L, D, F/P]. DeepSpeed saves and loads experts under exactly these names. The results of
    parts are partial: the whole feed-forward is their sum.

    Args:
        ffn_size: F, of the whole feed-forward.

    Raises:
        TopologyError: P does not divide F.
    """

    def __init__(
        self, num_local: int, hidden_size: int, ffn_size: int, implementation: str = "auto", etp: Axis = SINGLE
    ) -> None:
        super().__init__()
        part = share(ffn_size, etp, f"experts of width {ffn_size}", "moe.expert_ffn_size or parallel.etp")
        self.w1 = nn.Parameter(torch.empty(num_local, part, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_local, hidden_size, part))
        self.w3 = nn.Parameter(torch.empty(num_local, part, hidden_size))
        for parameter, ffn_dim in ((self.w1, 1), (self.w2, 2), (self.w3, 1)):
            mark(parameter, Shard(0, "ep"), Shard(ffn_dim, "etp"))
        self.implementation = implementation

    def forward(
        self, rows: Tensor, weights: Tensor, rows_per_expert_L: Tensor | None, pipeline: Pipeline | None = None
    ) -> Tensor:
        """Rows grouped by expert [R, D] to rows [R, D], each multiplied by its gate weight [R].

        Args:
            pipeline: brings rows to some of the experts at a time. Then rows and weights are what it takes, and the
                result is what it gives. It runs inside of this call, because at ZeRO-3 the weights are whole as long as
                it lasts, and in the backward pass from the gradient of its result to those of its tensors.
        """
        if pipeline is not None:
            return pipeline(rows, weights, self._in_chunks)
        assert rows_per_expert_L is not None
        ffn = EXPERT_FFN.choose(self.implementation, rows.device, rows.dtype).function
        return ffn(rows, weights, self.w1, self.w2, self.w3, rows_per_expert_L)

    def _in_chunks(self) -> Chunks:
        split = EXPERT_FFN_SPLIT.choose(self.implementation, self.w1.device, self.w1.dtype).function
        return split((self.w1, self.w2, self.w3))
