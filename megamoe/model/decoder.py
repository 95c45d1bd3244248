"""The whole forward pass on one page."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamoe.config.run import RunConfig
from megamoe.model.attention import KeyValueCache
from megamoe.model.block import Block
from megamoe.model.norms import build_norm
from megamoe.moe.placement import ALONE, ExpertParallel
from megamoe.moe.types import LayerAux
from megamoe.ops.linear_cross_entropy import linear_cross_entropy, token_losses
from megamoe.ops.precision import at_least_fp32


class ModelOutput(NamedTuple):
    """What one micro-batch gives."""

    loss: Tensor
    """Cross entropy plus auxiliary losses: what is differentiated. fp32 scalar (fp64 in an fp64 model)."""
    cross_entropy: Tensor
    """Mean over tokens, in nats; dtype as of `loss`."""
    layers: tuple[LayerAux, ...]
    """One per block, in order; empty dicts for dense blocks. Each loss appears once, recomputed or not."""


class Head(nn.Module):
    """Output projection [V, D]: loss from hidden rows and labels, or logits."""

    def __init__(self, vocab_size: int, hidden_size: int, chunk_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.chunk_size = chunk_size

    def tie(self, embedding_VD: Tensor) -> None:
        """Use the embedding's parameter as this one, so that there is only one."""
        assert isinstance(embedding_VD, nn.Parameter)
        self.weight = embedding_VD

    def forward(self, hidden_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Mean cross entropy, or without labels the logits [B, S, V]; in fp32 at least."""
        if labels_BS is None:
            return at_least_fp32(F.linear(hidden_BSD, self.weight))
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.weight, labels_BS.flatten(), self.chunk_size)


class Decoder(nn.Module):
    """Decoder-only transformer with experts.

    Args:
        config: the run; `model`, `moe` and `ops` shape the network, `training.recompute` its memory.
        vocab_size: rows V of the embedding.
        ep: this rank's place in its expert-parallel group.
    """

    def __init__(self, config: RunConfig, vocab_size: int, ep: ExpertParallel = ALONE) -> None:
        super().__init__()
        model = config.model
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i, ep, vocab_size) for i in range(model.num_layers))
        self.norm = build_norm(model.norm, model.hidden_size, model.norm_eps)
        self.head = Head(vocab_size, model.hidden_size, model.loss_chunk_size)
        if model.tie_embeddings:
            self.head.tie(self.embedding.weight)
        self.recompute = config.training.recompute == "full"

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> ModelOutput:
        """Loss of a micro-batch. `labels[b, s]` is the token that follows `tokens[b, s]`."""
        hidden_BSD, layers = self._hidden(tokens_BS)
        cross_entropy = self.head(hidden_BSD, labels_BS)
        auxiliary = [term for aux in layers for term in aux.losses.values()]
        return ModelOutput(sum(auxiliary, cross_entropy), cross_entropy, layers)

    def logits(self, tokens_BS: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Last position's logits, [B, V] in fp32 at least. With caches (one per block) the tokens continue them."""
        hidden_BSD, _ = self._hidden(tokens_BS, caches)
        logits_BV: Tensor = self.head(hidden_BSD[:, -1:]).squeeze(1)
        return logits_BV

    def token_losses(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross entropy of every token, [B, S] in fp32 at least, without gradients."""
        with torch.no_grad():
            hidden_BSD, _ = self._hidden(tokens_BS)
            losses_T = token_losses(
                hidden_BSD.flatten(0, 1), self.head.weight, labels_BS.flatten(), self.head.chunk_size
            )
        return losses_T.view(tokens_BS.shape)

    def new_caches(self) -> list[KeyValueCache]:
        """Empty caches for one generation."""
        return [KeyValueCache() for _ in self.blocks]

    def _hidden(
        self, tokens_BS: Tensor, caches: list[KeyValueCache] | None = None
    ) -> tuple[Tensor, tuple[LayerAux, ...]]:
        x_BSD, layers = self.embedding(tokens_BS), []
        for index, block in enumerate(self.blocks):
            if self.recompute and self.training:
                x_BSD, aux = checkpoint(block, x_BSD, tokens_BS, use_reentrant=False)
            else:
                x_BSD, aux = block(x_BSD, tokens_BS, caches[index] if caches is not None else None)
            layers.append(aux)
        return self.norm(x_BSD), tuple(layers)
