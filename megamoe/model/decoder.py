"""The whole forward pass on one page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config.run import RunConfig
from megamoe.data.batch import IGNORED
from megamoe.model.attention import KeyValueCache, document_mask
from megamoe.model.block import Block
from megamoe.model.norms import build_norm
from megamoe.model.recompute import recomputed
from megamoe.moe.losses import with_gradient_share
from megamoe.moe.placement import WHOLE, Placement
from megamoe.moe.types import LayerAux
from megamoe.ops.linear_cross_entropy import linear_cross_entropy, token_scores
from megamoe.ops.precision import at_least_fp32
from megamoe.parallel.axis import SINGLE, Axis
from megamoe.parallel.linear import mark_part, share
from megamoe.parallel.regions import gather_sequence, reduce_scatter_sequence
from megamoe.parallel.shards import shards_of
from megamoe.parallel.vocab import VocabParallelEmbedding, vocab_parallel_cross_entropy, vocab_parallel_scores


class Scores(NamedTuple):
    """Of every label by itself, without gradients."""

    losses_BS: Tensor
    """Cross entropy, fp32 at least; 0 where the label is IGNORED."""
    right_BS: Tensor
    """bool: the label is the likeliest token; False where it is IGNORED."""
    counted_BS: Tensor
    """bool: the label is not IGNORED."""

    def mean(self, targets: float | None = None) -> Tensor:
        """Sum of the losses over `targets`; None: over their number."""
        return self.losses_BS.sum() / (self.counted_BS.sum().clamp_min(1) if targets is None else targets)


class ModelOutput(NamedTuple):
    """What one micro-batch gives."""

    loss: Tensor
    """Cross entropy plus auxiliary losses: what is differentiated. fp32 scalar (fp64 in an fp64 model)."""
    cross_entropy: Tensor
    """Mean over labels, in nats; dtype as of `loss`."""
    layers: tuple[LayerAux, ...]
    """One per block, in order; empty dicts for dense blocks. Each loss appears once, recomputed or not."""
    scores: Scores | None = None
    """Only where asked for."""


class Head(nn.Module):
    """Output projection [V, D]: loss from hidden rows and labels, or logits. V is cut over tp."""

    def __init__(self, vocab_size: int, hidden_size: int, chunk_size: int, tp: Axis = SINGLE) -> None:
        super().__init__()
        entries = share(vocab_size, tp, f"{vocab_size} vocabulary entries")
        self.weight = nn.Parameter(torch.empty(entries, hidden_size))
        mark_part(self.weight, 0, tp)
        self.chunk_size, self.tp = chunk_size, tp

    def tie(self, embedding_VD: Tensor) -> None:
        """Use the embedding's parameter as this one, so that there is only one."""
        assert isinstance(embedding_VD, nn.Parameter)
        self.weight = embedding_VD

    def forward(
        self,
        hidden_BSD: Tensor,
        labels_BS: Tensor | None = None,
        targets: float | None = None,
        each: bool = False,
    ) -> Any:
        """Mean cross entropy, or without labels the logits [B, S, V]; in fp32 at least.

        Labels are those of the positions of all tp ranks, hidden rows of this one's. With `targets`, the sum over the
        labels that are not IGNORED, divided by it. With `each`, the :class:`Scores` instead. One method
        for all, because ZeRO-3 has the weight there only while `forward` runs.
        """
        if labels_BS is None:
            assert self.tp.size == 1, "logits are for generation, which takes no tensor parallelism"
            return at_least_fp32(F.linear(hidden_BSD, self.weight))
        hidden_BSD = gather_sequence(hidden_BSD, self.tp)
        if each:
            return self.scores(hidden_BSD, labels_BS)
        hidden_TD, labels_T = hidden_BSD.flatten(0, 1), labels_BS.flatten()
        if targets is not None:  # no logits for what does not count
            counted = (labels_T != IGNORED).nonzero().squeeze(-1)
            hidden_TD, labels_T = hidden_TD[counted], labels_T[counted]
        if self.tp.size > 1:
            return vocab_parallel_cross_entropy(hidden_TD, self.weight, labels_T, self.tp, self.chunk_size, targets)
        return linear_cross_entropy(hidden_TD, self.weight, labels_T, self.chunk_size, targets)

    def scores(self, hidden_BSD: Tensor, labels_BS: Tensor) -> Scores:
        """Of every label by itself."""
        labels_T, counted_BS = labels_BS.flatten().clamp_min(0), labels_BS != IGNORED
        hidden_TD = hidden_BSD.flatten(0, 1)
        if self.tp.size > 1:
            losses_T, right_T = vocab_parallel_scores(hidden_TD, self.weight, labels_T, self.tp, self.chunk_size)
        else:
            losses_T, right_T = token_scores(hidden_TD, self.weight, labels_T, self.chunk_size)
        losses_BS, right_BS = losses_T.view(labels_BS.shape), right_T.view(labels_BS.shape)
        return Scores(losses_BS.masked_fill(~counted_BS, 0.0), right_BS & counted_BS, counted_BS)


class Decoder(nn.Module):
    """Decoder-only transformer with experts.

    Args:
        config: the run; `model`, `moe` and `ops` shape the network, `training.recompute` its memory.
        vocab_size: rows V of the embedding.
        place: this rank's place among those that the model is spread over.
    """

    def __init__(self, config: RunConfig, vocab_size: int, place: Placement = WHOLE) -> None:
        super().__init__()
        model = config.model
        self.place = place
        self.embedding = VocabParallelEmbedding(vocab_size, model.hidden_size, place.tp)
        self.blocks = nn.ModuleList(Block(config, i, place, vocab_size) for i in range(model.num_layers))
        self.norm = build_norm(model.norm, model.hidden_size, model.norm_eps)
        self.head = Head(vocab_size, model.hidden_size, model.loss_chunk_size, place.tp)
        if model.tie_embeddings:
            self.head.tie(self.embedding.weight)
        self.recompute = config.training.recompute == "full"

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        documents_BS: Tensor | None = None,
        targets: float | None = None,
        each: bool = False,
    ) -> ModelOutput:
        """Loss of a micro-batch; arguments as in :class:`megamoe.data.batch.Batch`, the same on all of its ranks.

        Over cp, loss and gradients are such that their mean over the ranks is right: of the cross entropy each has that
        of its positions; of the auxiliary losses, which are of the whole micro-batch everywhere, each has the gradients
        of its own rows, times P.

        Args:
            each: score every label by itself; the loss has no gradient then.
        """
        hidden_BSD, layers = self._hidden(tokens_BS, documents_BS=documents_BS)
        return output_of(self.head, hidden_BSD, layers, labels_BS, targets, each, self.place.cp)

    def logits(self, tokens_BS: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Last position's logits, [B, V] in fp32 at least. With caches (one per block) the tokens continue them."""
        hidden_BSD, _ = self._hidden(tokens_BS, caches)
        logits_BV: Tensor = self.head(hidden_BSD[:, -1:]).squeeze(1)
        return logits_BV

    def new_caches(self) -> list[KeyValueCache]:
        """Empty caches for one generation."""
        return [KeyValueCache() for _ in self.blocks]

    def _hidden(
        self, tokens_BS: Tensor, caches: list[KeyValueCache] | None = None, documents_BS: Tensor | None = None
    ) -> tuple[Tensor, tuple[LayerAux, ...]]:
        x_BSD = embedded(self.embedding, tokens_BS, self.place)
        again = self.recompute and self.training
        x_BSD, layers = through(self.blocks, x_BSD, tokens_BS, documents_BS, again, caches)
        return self.norm(x_BSD), layers


def embedded(embedding: nn.Module, tokens_BS: Tensor, place: Placement) -> Tensor:
    """Hidden states of this rank's positions."""
    return reduce_scatter_sequence(embedding(own_positions(tokens_BS, place.cp)), place.tp)


def through(
    blocks: Iterable[nn.Module],
    x_BSD: Tensor,
    tokens_BS: Tensor,
    documents_BS: Tensor | None,
    again: bool,
    caches: list[KeyValueCache] | None = None,
) -> tuple[Tensor, tuple[LayerAux, ...]]:
    """Hidden states after the blocks, and what each block gave besides. `again`: blocks run again in backward."""
    layers, mask_B1SS = [], document_mask(documents_BS) if documents_BS is not None else None
    for index, block in enumerate(blocks):
        cache = caches[index] if caches is not None else None
        inputs = (x_BSD, tokens_BS, cache, documents_BS, mask_B1SS)
        x_BSD, aux = recomputed(block, *inputs) if again else block(*inputs)
        layers.append(aux)
    return x_BSD, tuple(layers)


def output_of(
    head: nn.Module,
    hidden_BSD: Tensor,
    layers: tuple[LayerAux, ...],
    labels_BS: Tensor,
    targets: float | None,
    each: bool,
    cp: Axis,
) -> ModelOutput:
    """Losses, from the hidden states of this rank's positions and the labels of all; arguments as in `Decoder`."""
    labels_BS = own_positions(labels_BS, cp)
    if targets is not None:
        targets /= cp.size
    scores = head(hidden_BSD, labels_BS, each=True) if each else None
    cross_entropy = head(hidden_BSD, labels_BS, targets) if scores is None else scores.mean(targets)
    return ModelOutput(cross_entropy + auxiliary_loss(layers, cp, cross_entropy), cross_entropy, layers, scores)


def auxiliary_loss(layers: tuple[LayerAux, ...], cp: Axis, like: Tensor) -> Tensor:
    """Sum of what the blocks lose besides, with its gradients as `Decoder.forward` says; dtype and device as `like`."""
    losses = (with_gradient_share(loss, cp.size) for aux in layers for loss in aux.losses.values())
    return sum(losses, at_least_fp32(like.new_zeros(())))


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that every tp rank holds whole and applies to its own positions or heads only: norms,
    routers, shared experts, and key and value projections with fewer heads than ranks."""
    return [p for p in model.parameters() if p.requires_grad and not shards_of(p)]


def own_positions(values_BS: Tensor, cp: Axis) -> Tensor:
    """Those of the sequence's positions that this rank has, [B, S/P]."""
    if values_BS.shape[1] % cp.size:
        raise ValueError(f"{values_BS.shape[1]} positions do not divide over {cp.size} context-parallel ranks")
    return values_BS.chunk(cp.size, dim=1)[cp.rank].contiguous() if cp.size > 1 else values_BS
