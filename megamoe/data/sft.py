"""Conversations ready for training: their tokens, which of them are learnt, and the rows that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Strict

from megamoe.config.base import Section
from megamoe.config.finetune import ConversationSource, FinetuneConfig
from megamoe.data.conversations import Tally
from megamoe.data.packing import Rows, arrange
from megamoe.data.sft_encode import Left, Tokenized, tokenize_sources
from megamoe.data.tokenizer import Tokenizer

SFTSplit = Literal["train", "validation"]
Ints = npt.NDArray[np.int64]
# Not the run's seed: a validation loss is compared between runs.
_VALIDATION_SEED = 0


class Listing(Section):
    """How many of something, and the first few of them as `place: what`."""

    count: int
    examples: Annotated[tuple[str, ...], Strict(False)]


class SplitSummary(Section):
    """The conversations of one source and split, each counted once, whatever the source's `repeat`."""

    conversations: int
    tokens: int
    """Input tokens: with the beginning mark, without the end of the document."""
    answer_tokens: int
    """Labels that count."""


class SourceSummary(Section):
    """Both splits of one source, and what is missing of it."""

    name: str
    train: SplitSummary
    validation: SplitSummary
    bad_lines: Listing
    dropped: Listing
    truncated: Listing


class RowsSummary(Section):
    """The rows of one split: of an epoch, repetitions included, or of a whole validation."""

    rows: int
    fill: float
    """Share of the positions that hold a token."""
    answer_share: float
    """Share of the positions that are learnt."""


class SFTSummary(Section):
    """What became of the sources, in the order of `finetune.sources`."""

    sources: Annotated[tuple[SourceSummary, ...], Strict(False)]
    train: RowsSummary
    validation: RowsSummary


@dataclass(frozen=True, eq=False, repr=False)  # arrays have no plain equality, and are long
class SFTData:
    """C conversations with N tokens in all; arrays are read, never written, and may be memory-mapped files.

    Attributes:
        tokens: int32 [N], of one conversation after the other, each with the end-of-document id before and after it.
        learnt: bool [N], whether the token is learnt as a label; never the first of a conversation.
        ends: int64 [C], where each conversation's tokens end.
        answer_tokens: int64 [C], labels that count in each conversation.
        sources: int64 [C], the number of its source in `summary.sources`.
        train: the rows of an epoch.
        validation: all rows for validation; each holds conversations of one source only.
        seq_length: S, the tokens of a row.
        eod_id: the end-of-document id, which also fills what is left of a row.
        summary: what became of the sources.
    """

    tokens: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]
    ends: Ints
    answer_tokens: Ints
    sources: Ints
    train: Rows
    validation: Rows
    seq_length: int
    eod_id: int
    summary: SFTSummary

    @classmethod
    def build(
        cls, config: FinetuneConfig, tokenizer: Tokenizer, seq_length: int, seed: int, progress: bool = False
    ) -> SFTData:
        """Read and tokenize the sources.

        Args:
            config: the section `finetune`.
            tokenizer: the model's.
            seq_length: S.
            seed: of the run; decides which conversations share a row in training.
            progress: show a bar on stderr.

        Raises:
            DataError: see `tokenize_sources`.
        """
        tokenized, lefts = tokenize_sources(config, tokenizer, seq_length, progress=progress)
        firsts = tokenized.ends - np.diff(tokenized.ends, prepend=0)
        answer_tokens = np.add.reduceat(tokenized.learnt, firsts, dtype=np.int64)
        train = _train_rows(config, tokenized, seq_length, seed)
        validation = _validation_rows(config, tokenized, seq_length)
        summary = SFTSummary(
            sources=_summaries(config.sources, tokenized, answer_tokens, lefts),
            train=_rows_summary(train, tokenized, answer_tokens, seq_length),
            validation=_rows_summary(validation, tokenized, answer_tokens, seq_length),
        )
        return cls(
            *tokenized[:3], answer_tokens, tokenized.sources, train, validation, seq_length, tokenizer.eod_id, summary
        )

    @property
    def rows_per_epoch(self) -> int:
        """Samples of one pass over all training conversations."""
        return len(self.train.ends)

    def span(self, conversation: int) -> slice:
        """Where the tokens of one conversation stand, its beginning mark included."""
        return slice(int(self.ends[conversation - 1]) if conversation else 0, int(self.ends[conversation]))


def _train_rows(config: FinetuneConfig, tokenized: Tokenized, seq_length: int, seed: int) -> Rows:
    learnt_from = np.flatnonzero(~tokenized.held_out)
    repeats = np.array([source.repeat for source in config.sources])
    items = np.repeat(learnt_from, repeats[tokenized.sources[learnt_from]])
    return arrange(items, _lengths(tokenized.ends)[items], seq_length, seed, packing=config.packing)


def _validation_rows(config: FinetuneConfig, tokenized: Tokenized, seq_length: int) -> Rows:
    """Source by source, so that each can be validated by itself with the same rows as all together."""
    lengths, parts = _lengths(tokenized.ends), []
    for number in range(len(config.sources)):
        items = np.flatnonzero(tokenized.held_out & (tokenized.sources == number))
        parts.append(arrange(items, lengths[items], seq_length, _VALIDATION_SEED, packing=config.packing))
    members = np.concatenate([part.members for part in parts])
    counts = np.concatenate([np.diff(part.ends, prepend=0) for part in parts])
    return Rows(members, np.cumsum(counts))


def _summaries(
    sources: Sequence[ConversationSource], tokenized: Tokenized, answer_tokens: Ints, lefts: list[Left]
) -> tuple[SourceSummary, ...]:
    lengths = _lengths(tokenized.ends)

    def split(number: int, held_out: bool) -> SplitSummary:
        inside = (tokenized.sources == number) & (tokenized.held_out == held_out)
        return SplitSummary(
            conversations=int(inside.sum()),
            tokens=int(lengths[inside].sum()),
            answer_tokens=int(answer_tokens[inside].sum()),
        )

    return tuple(
        SourceSummary(
            name=source.name,
            train=split(number, False),
            validation=split(number, True),
            bad_lines=_listing(left.bad),
            dropped=_listing(left.dropped),
            truncated=_listing(left.truncated),
        )
        for number, (source, left) in enumerate(zip(sources, lefts, strict=True))
    )


def _rows_summary(rows: Rows, tokenized: Tokenized, answer_tokens: Ints, seq_length: int) -> RowsSummary:
    count = len(rows.ends)
    positions = max(1, count * seq_length)
    return RowsSummary(
        rows=count,
        fill=float(_lengths(tokenized.ends)[rows.members].sum() / positions),
        answer_share=float(answer_tokens[rows.members].sum() / positions),
    )


def _listing(tally: Tally) -> Listing:
    return Listing(count=tally.count, examples=tuple(tally.examples))


def _lengths(ends: Ints) -> Ints:
    """Inputs of each conversation, which are one fewer than its tokens."""
    return np.diff(ends, prepend=0) - 1
