"""Hash routing (arXiv 2106.04426): a token's experts follow from its vocabulary entry."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.common.determinism import stream_seed
from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import HashRouterConfig
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.routers.base import NOTHING, RouterSize, Rows
from megamoe.moe.routers.fixed import FixedRouter
from megamoe.moe.types import RoutingPlan


class HashRouter(FixedRouter):
    """K different experts per vocabulary entry, from a random table that is the same in every layer and never changes.

    Raises:
        ValueError: from the constructor without the size of the vocabulary, from `forward` without the tokens.
    """

    table_VK: Tensor

    def __init__(
        self, config: HashRouterConfig, size: RouterSize, capacity: CapacityConfig, ep: ExpertParallel = ALONE
    ) -> None:
        super().__init__(size, capacity, ep)
        if size.vocab_size < 1:
            raise ValueError("the hash router needs the size of the vocabulary")
        table_VK = hash_table(config.seed, size.vocab_size, size.num_experts, size.top_k)
        self.register_buffer("table_VK", table_VK, persistent=False)

    def forward(self, rows_TD: Tensor, about: Rows = NOTHING) -> RoutingPlan:
        if about.token_ids_T is None:
            raise ValueError("the hash router needs the rows' vocabulary entries")
        return self.fixed_plan(rows_TD, self.table_VK[about.token_ids_T], about)


def hash_table(seed: int, vocab_size: int, num_experts: int, top_k: int) -> Tensor:
    """K different experts for each vocabulary entry, int64 [V, K]; an expert's share of entries is even within 1.

    Ours: any E consecutive entries (from a multiple of E) use every expert K times. Vocabularies are roughly in the
    order of frequency, so the experts' shares of a text are closer to even, too, than by chance.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "hash-router"))
    blocks = -(-vocab_size // num_experts)
    shuffled_BE = torch.rand(blocks, num_experts, generator=generator).argsort(dim=-1, stable=True)
    places_EK = torch.arange(num_experts * top_k).view(num_experts, top_k) % num_experts
    return shuffled_BE[:, places_EK].flatten(0, 1)[:vocab_size].contiguous()
