"""Perplexity on held-out documents, per source."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.progress import track
from torch import Tensor

from megamoe.config.data import DataConfig
from megamoe.data.batch import IGNORED
from megamoe.data.loader import documents
from megamoe.data.manifest import Manifest
from megamoe.data.tokenizer import Tokenizer
from megamoe.model.decoder import Decoder
from megamoe.parallel import collectives
from megamoe.training.setup import Runtime


@dataclass(frozen=True)
class SourceScore:
    """One source's held-out documents."""

    documents: int
    tokens: int
    text_bytes: int
    loss: float
    """Mean cross entropy per token, in nats."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / max(1, self.text_bytes)

    def as_dict(self) -> dict[str, float]:
        """All numbers, for JSON."""
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def score_source(
    model: Decoder,
    runtime: Runtime,
    data: DataConfig,
    manifest: Manifest,
    source: str,
    tokenizer: Tokenizer,
    *,
    max_documents: int = 0,
    batch_size: int = 8,
) -> SourceScore:
    """Score a source's validation documents. Collective; the work is shared among the ranks.

    A document is read in windows of `data.seq_length` tokens that do not overlap; the end-of-document token stands
    before the first one, as in training. All tokens count, the end of the document included.

    Args:
        max_documents: the first so many; 0: all.
    """
    held_out = list(itertools.islice(documents(data, manifest, source), max_documents or None))
    windows = [w for document in held_out for w in _windows(document, data.seq_length, tokenizer.eod_id)]
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    # Every rank runs as many batches as any other, because the experts' exchange needs all of them.
    rounds = math.ceil(len(batches) / runtime.world_size)
    totals = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    shown = track(range(rounds), description=source, transient=True, disable=runtime.rank != 0)
    for index in (i * runtime.world_size + runtime.rank for i in shown):
        batch = batches[index] if index < len(batches) else []
        totals += _score_batch(model, batch, tokenizer.eod_id, runtime.device)
    nats, tokens = collectives.all_reduce_sum(totals).tolist()
    text_bytes = sum(len(tokenizer.decode(d[:-1].tolist()).encode()) for d in held_out)
    return SourceScore(len(held_out), int(tokens), text_bytes, nats / max(1.0, tokens))


def _windows(document: Tensor, length: int, eod_id: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) of each window, int64 [at most `length`]."""
    inputs = torch.cat([torch.tensor([eod_id]), document[:-1]])
    yield from zip(inputs.split(length), document.split(length), strict=True)


def _score_batch(model: Decoder, batch: list[tuple[Tensor, Tensor]], filler: int, device: torch.device) -> Tensor:
    """(sum of losses, number of tokens), float64 [2]. An empty batch takes part with one token that does not count."""
    longest = max((len(inputs) for inputs, _ in batch), default=1)
    shape = (max(1, len(batch)), longest)
    tokens_BS, labels_BS = torch.full(shape, filler), torch.full(shape, IGNORED)
    for row, (inputs, labels) in enumerate(batch):
        tokens_BS[row, : len(inputs)], labels_BS[row, : len(labels)] = inputs, labels
    scores = model(tokens_BS.to(device), labels_BS.to(device), each=True).scores
    return torch.stack([scores.losses_BS.double().sum(), scores.counted_BS.double().sum()])
