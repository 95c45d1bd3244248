"""The Mixture-of-Experts layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megamoe.config.moe import MoEConfig
from megamoe.config.ops import OpsConfig
from megamoe.moe.dispatch import build_dispatcher
from megamoe.moe.experts import Experts
from megamoe.moe.ffn import FeedForward
from megamoe.moe.marker import ExpertParallelMarker
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.routers import RouterSize, Rows, build_router
from megamoe.moe.spread import Spread, number_sequences
from megamoe.moe.types import LayerAux
from megamoe.ops.rows import gather_rows, sum_rows


class MoELayer(ExpertParallelMarker):
    """Routed experts, and shared ones if configured.

    1. route: the router decides which rows go to which experts, with which weight;
    2. dispatch: each row travels to the ranks of its experts;
    3. compute: every expert works on its rows and multiplies them by their weights;
    4. combine: the rows return and are added up per token.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_size: int,
        ep: ExpertParallel,
        ops: OpsConfig | None = None,
        vocab_size: int = 0,
        number: int = 0,
    ) -> None:
        super().__init__()
        ops = ops or OpsConfig()
        size = RouterSize(hidden_size, config.num_experts, config.top_k, vocab_size, ops, number, config.broadcast)
        self.router = build_router(config.router, size, config.capacity, ep)
        broadcasts = config.broadcast is not None
        self.dispatcher = build_dispatcher(
            config.dispatcher,
            ep.group,
            broadcasts=broadcasts,
            etp=ep.etp,
            ops=ops,
            layer=number,
            chunks=ep.chunks,
            nodes=ep.nodes,
        )
        self.tokens = ep.tokens
        num_local = config.num_experts // ep.size
        self.experts = Experts(num_local, hidden_size, config.expert_ffn_size, ops.expert_ffn, ep.etp)
        self.shared_experts = (
            FeedForward(hidden_size, config.num_shared_experts * config.expert_ffn_size)
            if config.num_shared_experts
            else None
        )
        self.mark(self.experts, config.num_experts, ep.size, ep.rank)

    def forward(
        self, x: Tensor, token_ids: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, LayerAux]:
        """[..., D] to ([..., D], auxiliary losses, observations and metrics). The residual is the caller's.

        Args:
            token_ids: int64 [...], vocabulary entries of the rows, for routers that look at them; of all rows of the
                micro-batch where these are spread over ranks.
            documents: int64 [B, S], number of each row's document in its sequence, negative: padding; None: each
                sequence (the last but one dim) is one document. Of all rows, as `token_ids`.
        """
        rows_TD, ids_T, sequences_T = x.reshape(-1, x.shape[-1]), None, None
        num_rows, real, spread = rows_TD.shape[0], None, None
        if self.tokens.size > 1:
            spread = Spread(self.tokens, num_rows // x.shape[-2], x.shape[-2])
        if documents is not None or self.router.broadcast is not None:  # nobody else asks which rows belong together
            sequences_T = sequences(x, documents) if spread is None else spread.sequences(documents, x.device)
        if token_ids is not None:
            ids_T = token_ids.reshape(-1)
        if documents is not None and sequences_T is not None:
            # Padding goes to no expert: it would take room there, and count in balance and statistics.
            real = (sequences_T >= 0).nonzero().squeeze(-1)
            if spread is None:
                rows_TD = gather_rows(rows_TD, real)
            else:  # scored with the others, and left out when the scores are together
                spread = spread._replace(real=real)
            sequences_T = torch.unique_consecutive(sequences_T[real], return_inverse=True)[1]
            ids_T = ids_T[real] if ids_T is not None else None
        size = num_rows if spread is None else spread.size
        plan = self.router(rows_TD, Rows(ids_T, sequences_T, size, spread))
        beside = partial(self.shared_experts, x) if self.shared_experts is not None else None
        passage = self.dispatcher.through(rows_TD, plan, self.experts, beside)
        out_TD = passage.out_TD
        if real is not None and spread is None:
            out_TD = sum_rows(out_TD, real, num_rows)
        out = out_TD.view(x.shape)
        if passage.beside is not None:
            out = out + passage.beside
        sent = torch.full((), float(passage.sent_bytes), device=x.device)
        return out, LayerAux(plan.losses, plan.observations, plan.metrics | {"sent_bytes": (sent, "sum")})


def sequences(x: Tensor, documents: Tensor | None) -> Tensor | None:
    """Number of each row's document in [0, T), int64 [T]; negative: padding. None where all rows are one.

    Args:
        x: [..., S, D].
        documents: int64 [..., S] as in :class:`megamoe.data.batch.Batch`.
    """
    if x.dim() < 3:
        return None
    return number_sequences(x.numel() // x.shape[-1], x.shape[-2], documents, x.device)
