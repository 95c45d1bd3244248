"""One transformer block: attention, then a feed-forward that is dense or a mixture of experts."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.model.attention import Attention, KeyValueCache
from megamoe.model.norms import build_norm
from megamoe.model.recompute import recomputed
from megamoe.moe.ffn import FeedForward
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import Placement
from megamoe.moe.types import LayerAux


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: RunConfig, index: int, place: Placement, vocab_size: int = 0) -> None:
        super().__init__()
        model = config.model
        self.attention_norm = build_norm(model.norm, model.hidden_size, model.norm_eps)
        self.attention = Attention(
            model.hidden_size,
            model.num_heads,
            derive.num_kv_heads(config),
            derive.head_size(config),
            model.rope_theta,
            place.tp,
            place.cp,
        )
        self.ffn_norm = build_norm(model.norm, model.hidden_size, model.norm_eps)
        self.is_moe = derive.is_moe_layer(config, index)
        self.recompute = config.training.recompute
        self.ffn: nn.Module
        if self.is_moe:
            self.ffn = MoELayer(config.moe, model.hidden_size, place.experts, config.ops, vocab_size, index)
        else:
            self.ffn = FeedForward(model.hidden_size, model.ffn_size, place.tp)

    def forward(
        self,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        cache: KeyValueCache | None = None,
        documents_BS: Tensor | None = None,
        mask_B1SS: Tensor | None = None,
    ) -> tuple[Tensor, LayerAux]:
        """[B, S, D], of this rank's positions, to ([B, S, D], what the MoE layer returned besides).

        `tokens_BS` are the vocabulary entries at all positions of the micro-batch, `documents_BS` the numbers of their
        documents, for routers that look at them; `mask_B1SS` which positions each one attends to. What a dense block
        returns besides is empty.
        """
        attend = self._attend
        if self.recompute == "attention" and self.training:
            attend = partial(recomputed, attend)
        x_BSD = x_BSD + attend(x_BSD, cache, mask_B1SS)
        feed = self._feed
        if self.recompute == "moe" and self.training and self.is_moe:
            feed = partial(recomputed, feed)
        out_BSD, aux = feed(x_BSD, tokens_BS, documents_BS)
        return x_BSD + out_BSD, aux

    def _attend(self, x_BSD: Tensor, cache: KeyValueCache | None, mask_B1SS: Tensor | None) -> Tensor:
        out_BSD: Tensor = self.attention(self.attention_norm(x_BSD), cache, mask_B1SS)
        return out_BSD

    def _feed(self, x_BSD: Tensor, tokens_BS: Tensor, documents_BS: Tensor | None) -> tuple[Tensor, LayerAux]:
        normed_BSD = self.ffn_norm(x_BSD)
        if not self.is_moe:
            return self.ffn(normed_BSD), LayerAux({}, {}, {})
        out_BSD, aux = self.ffn(normed_BSD, tokens_BS, documents_BS)
        return out_BSD, aux
