"""The part of a decoder that one stage of a pipeline holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megamoe.config.run import RunConfig
from megamoe.config.stages import stage_bounds
from megamoe.data.batch import Batch
from megamoe.model.block import Block
from megamoe.model.decoder import Head, ModelOutput, auxiliary_loss, embedded, output_of, through
from megamoe.model.norms import build_norm
from megamoe.moe.placement import WHOLE, Placement
from megamoe.moe.types import LayerAux
from megamoe.parallel.vocab import VocabParallelEmbedding


class DecoderStage(nn.Module):
    """Consecutive blocks of a :class:`Decoder`; the first stage has the embedding too, the last one norm and head.

    Parameters have the names that they have in the whole decoder (`blocks.3.attention.wq.weight`). A tied embedding is
    on the first and the last stage, under the name `embedding.weight` on both.

    Args:
        config: the run; `parallel.pp` and what `stage_bounds` looks at say which blocks.
        vocab_size: rows V of the embedding.
        place: this rank's place among those that the stage is spread over.
        stage: number of the stage.
    """

    def __init__(self, config: RunConfig, vocab_size: int, place: Placement = WHOLE, stage: int = 0) -> None:
        super().__init__()
        model, bounds = config.model, stage_bounds(config)
        self.place, self.num_blocks = place, model.num_layers
        self.first, self.last = stage == 0, stage == len(bounds) - 2
        self.tied = model.tie_embeddings and not (self.first and self.last)
        """Whether the embedding is on two stages."""
        self.embedding: VocabParallelEmbedding | None = None
        if self.first or (self.last and model.tie_embeddings):
            self.embedding = VocabParallelEmbedding(vocab_size, model.hidden_size, place.tp)
        numbers = range(bounds[stage], bounds[stage + 1])
        self.blocks = nn.ModuleDict({str(i): Block(config, i, place, vocab_size) for i in numbers})
        self.norm = build_norm(model.norm, model.hidden_size, model.norm_eps) if self.last else None
        self.head = Head(vocab_size, model.hidden_size, model.loss_chunk_size, place.tp) if self.last else None
        if self.head is not None and self.embedding is not None:
            self.head.tie(self.embedding.weight)
        self.recompute = config.training.recompute == "full"

    def numbered_blocks(self) -> dict[int, Block]:
        """The blocks by their number in the whole decoder, in order."""
        return {int(name): block for name, block in self.blocks.items() if isinstance(block, Block)}

    def forward(
        self, hidden_BSD: Tensor | None, batch: Batch, loss_share: float = 1.0, each: bool = False
    ) -> tuple[Tensor, ModelOutput]:
        """From what the stage before gave, [B, S, D] of this rank's positions, to what the next one gets.

        The last stage gives its loss instead. Auxiliary losses of the others have their gradients all the same: they
        ride on what these stages give.

        Args:
            hidden_BSD: None on the first stage.
            batch: the same on every stage.
            loss_share: gradient of the total loss with respect to this micro-batch's, for stages before the last.
            each: as in `Decoder.forward`.

        Returns:
            What the next stage gets, and this stage's part of the decoder's output: `loss` and `cross_entropy` of all
            stages add up to the whole ones, and blocks elsewhere have an empty entry in `layers`.
        """
        if self.first:
            assert self.embedding is not None
            hidden_BSD = embedded(self.embedding, batch.tokens_BS, self.place)
        assert hidden_BSD is not None
        again = self.recompute and self.training
        hidden_BSD, own = through(self.blocks.values(), hidden_BSD, batch.tokens_BS, batch.documents_BS, again)
        numbered = dict(zip(self.numbered_blocks(), own, strict=True))
        layers = tuple(numbered.get(number, LayerAux({}, {}, {})) for number in range(self.num_blocks))
        if self.head is None or self.norm is None:
            auxiliary = auxiliary_loss(layers, self.place.cp, hidden_BSD)
            zero = torch.zeros_like(auxiliary)
            return with_losses(hidden_BSD, auxiliary, loss_share), ModelOutput(auxiliary, zero, layers)
        hidden_BSD = self.norm(hidden_BSD)
        output = output_of(self.head, hidden_BSD, layers, batch.labels_BS, batch.targets, each, self.place.cp)
        return output.loss, output


def with_losses(hidden: Tensor, losses: Tensor, share: float) -> Tensor:
    """`hidden`; its backward pass adds the gradients of `losses`, a scalar, times `share`."""
    return _WithLosses.apply(hidden, losses, share)


class _WithLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Tensor, share: float) -> Tensor:
        ctx.share = losses.new_full((), share)
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.share, None
