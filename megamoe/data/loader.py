"""The loader: which tokens sample number n of a run holds, as a pure function of the seed and n.

Nothing here has a position. A batch is asked for by the number of samples consumed before it, so a resumed
run, and a run on another number of ranks, reads the same samples in the same order.

One epoch of a source is all its documents in a shuffled order, one after the other, cut into samples of S
tokens, the samples shuffled again; sample i also holds the first token of sample i+1 as its last label. Each
epoch has its own order. Tokens that do not fill a last sample are left out of that epoch. The validation
split has one fixed order, whatever the run's seed: a validation that reads only its first samples still reads from
many documents, and always the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megamoe.common.determinism import stream_seed
from megamoe.common.errors import DataError
from megamoe.config.data import DataConfig
from megamoe.data.batch import Batch
from megamoe.data.blend import Blend
from megamoe.data.indexed import IndexedTokens, Tokens
from megamoe.data.manifest import Manifest, Split, pair_prefix
from megamoe.data.shuffle import permute

_VALIDATION_SEED = 0


class _Order(NamedTuple):
    """One epoch's documents [documents] and where each ends in its stream [documents]."""

    documents: Tokens
    ends: Tokens


class TokenSamples:
    """The samples of one source and split.

    Args:
        tokens: the token files.
        seq_length: S.
        name: named in errors, and part of the shuffle's random stream.
        seed: of the run; None keeps the order of the files in every epoch.

    Attributes:
        num_samples: samples of one epoch.

    Raises:
        DataError: there are fewer than S+1 tokens.
    """

    def __init__(self, tokens: IndexedTokens, seq_length: int, name: str, seed: int | None) -> None:
        self.num_samples = (tokens.num_tokens - 1) // seq_length
        if self.num_samples < 1:
            raise DataError(
                f"Source '{name}' has too little text for one sample.",
                got=f"{tokens.num_tokens} tokens in {tokens.prefix}",
                expected=f"at least data.seq_length + 1 = {seq_length + 1}",
                todo="lower data.seq_length, add text, or change data.validation_fraction",
            )
        self._tokens, self._seq_length = tokens, seq_length
        self._name, self._seed = name, seed
        self._orders: dict[int, _Order] = {}

    def sample(self, index: int) -> Tokens:
        """Sample `index` >= 0, counted on through the epochs, int64 [S+1]."""
        epoch, within = divmod(index, self.num_samples)
        if self._seed is None:
            return self._read(self._order(0), within)
        key = stream_seed(self._seed, "data", "samples", self._name, epoch)
        return self._read(self._order(epoch), int(permute(within, self.num_samples, key)[0]))

    def _order(self, epoch: int) -> _Order:
        """Computed once per epoch and kept for two, since a batch can cross from one into the next."""
        if epoch not in self._orders:
            count = len(self._tokens)
            documents = np.arange(count)
            if self._seed is not None:
                documents = permute(documents, count, stream_seed(self._seed, "data", "documents", self._name, epoch))
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = _Order(documents, np.cumsum(self._tokens.sizes[documents]))
        return self._orders[epoch]

    def _read(self, order: _Order, within: int) -> Tokens:
        """S+1 tokens of the epoch's stream from within·S on, out of as many documents as they span."""
        out = np.empty(self._seq_length + 1, dtype=np.int64)
        position, filled = within * self._seq_length, 0
        place = int(np.searchsorted(order.ends, position, side="right"))
        while filled < len(out):
            document, end = int(order.documents[place]), int(order.ends[place])
            take = min(end - position, len(out) - filled)
            start = int(self._tokens.sizes[document]) - (end - position)
            out[filled : filled + take] = self._tokens.read(document, start, take)
            position, filled, place = position + take, filled + take, place + 1
        return out


class BatchLoader:
    """Batches blended from all sources by weight.

    Args:
        config: the `data` section.
        manifest: of `config.prepared_dir`, from `check_prepared`.
        split: `train` is shuffled by `seed`, `validation` always in the same way.
        seed: of the run.

    Attributes:
        num_samples: per source, samples of one epoch; a source is repeated in a new order after them.

    Raises:
        DataError: token files are missing or damaged, a source is too small for one sample, or the weights
        have
            too many digits.
    """

    def __init__(self, config: DataConfig, manifest: Manifest, split: Split, seed: int) -> None:
        self._blend = Blend([source.weight for source in config.sources])
        self._samples = [
            TokenSamples(
                _open(config, manifest, source.name, split),
                config.seq_length,
                source.name,
                seed if split == "train" else _VALIDATION_SEED,
            )
            for source in config.sources
        ]
        names = [source.name for source in config.sources]
        self.num_samples = {name: s.num_samples for name, s in zip(names, self._samples, strict=True)}

    def batch(self, consumed_samples: int, count: int) -> Tensor:
        """Samples consumed_samples .. consumed_samples + count - 1 of the run, int64 [count, S+1]."""
        sources, positions = self._blend.locate(np.arange(consumed_samples, consumed_samples + count))
        rows = [self._samples[s].sample(int(p)) for s, p in zip(sources, positions, strict=True)]
        return torch.from_numpy(np.stack(rows))

    def rank_batch(
        self, consumed: int, micro_step: int, dp_rank: int, dp_size: int, micro_batch_size: int, micro_steps: int
    ) -> Batch:
        """What a data-parallel rank reads in a micro-step: tokens and next-token labels.

        Its rows are the samples consumed + (micro_step·dp_size + dp_rank)·B + k: micro-batch (m, r) of P
        ranks is micro-batch m·P + r of one process.

        Args:
            consumed: samples that the run consumed before this optimizer step.
            micro_step: which gradient accumulation step.
            dp_rank: this rank among those that read different samples, expert-parallel ranks included.
            dp_size: how many there are, P.
            micro_batch_size: B.
            micro_steps: gradient accumulation steps; every sample has equally many labels here, so nothing follows.
        """
        first = consumed + (micro_step * dp_size + dp_rank) * micro_batch_size
        samples = self.batch(first, micro_batch_size)
        return Batch(samples[:, :-1].contiguous(), samples[:, 1:].contiguous())


def documents(config: DataConfig, manifest: Manifest, source: str, split: Split = "validation") -> Iterator[Tensor]:
    """Every document of a source in the order of the files, whole, int64 [tokens], its last token the eod id.

    Raises:
        DataError: the source is unknown, or its files are missing or damaged.
    """
    tokens = _open(config, manifest, source, split)
    return (torch.from_numpy(tokens.read(document)) for document in range(len(tokens)))


def _open(config: DataConfig, manifest: Manifest, source: str, split: Split) -> IndexedTokens:
    expected = manifest.source(source).split(split)
    tokens = IndexedTokens(pair_prefix(Path(config.prepared_dir), source, split))
    if (len(tokens), tokens.num_tokens) != (expected.documents, expected.tokens):
        raise DataError(
            f"Token files {tokens.prefix} are not the ones in the manifest.",
            got=f"{len(tokens)} documents, {tokens.num_tokens} tokens",
            expected=f"{expected.documents} documents, {expected.tokens} tokens",
            todo="restore them, or prepare the data again with --overwrite",
        )
    return tokens
