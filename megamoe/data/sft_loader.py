"""The loader of conversations: which rows a micro-batch holds, as a pure function of the seed and its place in the run.

As in pretraining nothing here has a position, so a resumed run, and a run on another number of ranks, reads the same
rows in the same order. Each epoch has its own order of the rows; what stands in a row is the same in all epochs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from megamoe.common.determinism import stream_seed
from megamoe.common.errors import DataError
from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.data.packing import Rows
from megamoe.data.sft import SFTData, SFTSplit
from megamoe.data.shuffle import permute

Ints = npt.NDArray[np.int64]
_NO_ROW = -1


class SFTLoader:
    """Batches of conversations.

    Args:
        data: the conversations.
        split: `train` goes on for ever, each epoch in an order of its own; `validation` has one fixed order, whatever
            the seed, and ends: rows past its end hold no tokens and no labels.
        seed: of the run.
        source: validation only: the rows of this source alone; None: of all of them.

    Attributes:
        num_rows: rows of one epoch, or of the validation.

    Raises:
        DataError: no source is called `source`.
        ValueError: `source` in training, where rows hold conversations of several sources.
    """

    def __init__(self, data: SFTData, split: SFTSplit, seed: int, source: str | None = None) -> None:
        if split == "train" and source is not None:
            raise ValueError("training has no rows of one source alone")
        self._data, self._split, self._seed = data, split, seed
        self._rows: Rows = data.train if split == "train" else data.validation
        members_answers = np.concatenate([[0], np.cumsum(data.answer_tokens[self._rows.members])])
        self._answers = np.diff(members_answers[self._rows.ends], prepend=0)  # per row
        self._order = None if split == "train" else _validation_order(data, source)
        self.num_rows = data.rows_per_epoch if self._order is None else len(self._order)

    @property
    def rows_per_epoch(self) -> int:
        """The same as `num_rows`."""
        return self.num_rows

    def rank_batch(
        self, consumed: int, micro_step: int, dp_rank: int, dp_size: int, micro_batch_size: int, micro_steps: int
    ) -> Batch:
        """What a data-parallel rank reads in a micro-step, B rows of S tokens.

        Its rows are the samples consumed + (micro_step·dp_size + dp_rank)·B + k: micro-batch (m, r) of P ranks is
        micro-batch m·P + r of one process. What is left of a row is filled with the end-of-document id.

        Args:
            consumed: samples that the run consumed before this optimizer step; in validation, rows read before.
            micro_step: which gradient accumulation step.
            dp_rank: this rank among those that read different samples, expert-parallel ranks included.
            dp_size: how many there are, P.
            micro_batch_size: B.
            micro_steps: gradient accumulation steps of the optimizer step.
        """
        micro_batches = micro_steps * dp_size
        rows = self._locate(consumed, micro_batches * micro_batch_size)
        answers = int(self._answers[rows[rows != _NO_ROW]].sum())
        first = (micro_step * dp_size + dp_rank) * micro_batch_size
        return self._batch(rows[first : first + micro_batch_size], answers / micro_batches or 1.0)

    def _locate(self, first: int, count: int) -> Ints:
        """The rows of samples first .. first + count - 1 of the run, int64 [count]; -1: past the end."""
        samples = np.arange(first, first + count)
        if self._order is not None:
            inside = samples < len(self._order)
            rows = np.full(count, _NO_ROW)
            rows[inside] = self._order[samples[inside]]
            return rows
        epochs, places = np.divmod(samples, self.num_rows)
        parts = [
            permute(places[epochs == epoch], self.num_rows, stream_seed(self._seed, "sft", "rows", int(epoch)))
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts)

    def _batch(self, rows: Ints, targets: float) -> Batch:
        shape = (len(rows), self._data.seq_length)
        tokens_BS = np.full(shape, self._data.eod_id)
        labels_BS, documents_BS = np.full(shape, IGNORED), np.full(shape, PADDING)
        for place, row in enumerate(rows.tolist()):
            if row != _NO_ROW:
                self._fill(row, tokens_BS[place], labels_BS[place], documents_BS[place])
        return Batch(torch.from_numpy(tokens_BS), torch.from_numpy(labels_BS), torch.from_numpy(documents_BS), targets)

    def _fill(self, row: int, tokens_S: Ints, labels_S: Ints, documents_S: Ints) -> None:
        start = 0
        for document, conversation in enumerate(self._rows.of(row)):
            span = self._data.span(conversation)
            ids, learnt = self._data.tokens[span], self._data.learnt[span]
            here = slice(start, start + len(ids) - 1)
            tokens_S[here], documents_S[here] = ids[:-1], document
            labels_S[here] = np.where(learnt[1:], ids[1:], IGNORED)
            start = here.stop


def _validation_order(data: SFTData, source: str | None) -> Ints:
    """Rows in a fixed shuffled order: the first ones are of many sources, also where only those are read."""
    rows = np.arange(len(data.validation.ends))
    if source is not None:
        names = [summary.name for summary in data.summary.sources]
        if source not in names:
            raise DataError(f"No source is called '{source}'.", expected=f"one of: {', '.join(names)}")
        rows = rows[data.sources[data.validation.members[data.validation.firsts]] == names.index(source)]
    return rows[permute(np.arange(len(rows)), len(rows), stream_seed(0, "sft", "validation"))]
