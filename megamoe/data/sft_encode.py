"""From the files of conversations to tokens and their split, all sources one after the other."""

from __future__ import annotations

import contextlib
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn

from megamoe.common.errors import DataError
from megamoe.config.finetune import ConversationSource, FinetuneConfig
from megamoe.data.conversations import Conversation, Tally, conversation_files, read_conversations
from megamoe.data.prepare import split_position
from megamoe.data.template import ChatTemplate, Encoded
from megamoe.data.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_BATCH_CHARS = 1_000_000  # text per thread and turn: large against the start of a thread, small against memory
_BAR_BYTES = 1_000_000  # the bar costs more time than reading a line, so it moves only now and then


class Tokenized(NamedTuple):
    """C conversations of N tokens in all, each with the end-of-document id before and after it.

    Attributes:
        tokens: int32 [N].
        learnt: bool [N], see `template.Encoded`.
        ends: int64 [C], where each conversation's tokens end.
        sources: int64 [C], number of the source in `finetune.sources`.
        held_out: bool [C], whether it is for validation.
    """

    tokens: npt.NDArray[np.int32]
    learnt: Bools
    ends: Ints
    sources: Ints
    held_out: Bools


@dataclass
class Left:
    """What is missing of a source, and what was cut.

    Attributes:
        bad: lines that are no conversation.
        long: too long, where the settings refuse that.
        longest: tokens of the longest of those.
        dropped: too long, and left out.
        truncated: too long, and cut.
    """

    bad: Tally = field(default_factory=Tally)
    long: Tally = field(default_factory=Tally)
    longest: int = 0
    dropped: Tally = field(default_factory=Tally)
    truncated: Tally = field(default_factory=Tally)


def tokenize_sources(
    config: FinetuneConfig, tokenizer: Tokenizer, seq_length: int, *, progress: bool = False
) -> tuple[Tokenized, list[Left]]:
    """Read, tokenize and split every source; what is missing is told per source, in the order of `config.sources`.

    Raises:
        DataError: a source cannot be read, holds no usable conversation or learns from what is held out, or lines are
            bad or conversations too long and the settings do not allow for that; one error tells all lines of all
            sources.
    """
    _refuse_overlap(config.sources)
    collected = _Collected(config, ChatTemplate(config.template, tokenizer, config.loss_on), seq_length)
    with _bar(sum(map(_num_bytes, config.sources)), progress) as advance:
        lefts = [collected.add_source(number, source, advance) for number, source in enumerate(config.sources)]
    if config.bad_lines == "error":
        _refuse_bad(lefts)
    _refuse_long(lefts, seq_length)
    tokenized = collected.result()
    for number, (source, left) in enumerate(zip(config.sources, lefts, strict=True)):
        _check_source(source, tokenized.held_out[tokenized.sources == number], left)
    return tokenized, lefts


class _Collected:
    """Everything that was tokenized so far."""

    def __init__(self, config: FinetuneConfig, template: ChatTemplate, seq_length: int) -> None:
        self._config, self._template, self._seq_length = config, template, seq_length
        self._threads = len(os.sched_getaffinity(0))
        self._tokens, self._learnt, self._ends = array("i"), bytearray(), array("q")
        self._sources, self._held_out = array("q"), bytearray()

    def add_source(self, number: int, source: ConversationSource, advance: Callable[[int], None]) -> Left:
        """Both splits of one source."""
        left = Left()
        positions = self._add_path(source.path, left, advance)
        if source.validation is None:
            self._held_out += _lowest(positions, self._config.validation_fraction)
        else:
            self._held_out += bytes(len(positions))
            self._held_out += b"\1" * len(self._add_path(source.validation, left, advance))
        self._sources.extend([number] * (len(self._held_out) - len(self._sources)))
        return left

    def result(self) -> Tokenized:
        """All of it, without a copy."""
        return Tokenized(
            np.frombuffer(self._tokens, dtype=np.int32),
            np.frombuffer(self._learnt, dtype=np.bool_),
            np.frombuffer(self._ends, dtype=np.int64),
            np.frombuffer(self._sources, dtype=np.int64),
            np.frombuffer(self._held_out, dtype=np.bool_),
        )

    def _add_path(self, path: str, left: Left, advance: Callable[[int], None]) -> list[float]:
        """The split positions of the conversations that were added."""
        positions: list[float] = []
        for batch in _batches(read_conversations(path, left.bad, advance), self._threads * _BATCH_CHARS):
            if left.bad.count and self._config.bad_lines == "error":
                continue  # only read on, to tell the other bad lines
            for conversation, encoded in zip(batch, self._template.encode_batch(batch, self._threads), strict=True):
                if self._add(conversation.place, encoded, left):
                    positions.append(split_position(conversation.identity))
        return positions

    def _add(self, place: str, encoded: Encoded, left: Left) -> bool:
        """Whether it was added, and not only counted in `left`."""
        if not any(encoded.learnt):
            left.bad.add(place, "the tokenizer makes no tokens of what is to be learnt")
            return False
        fitting = self._fit(place, encoded, left)
        if fitting is None:
            return False
        self._tokens.extend(fitting.ids)
        self._learnt.extend(fitting.learnt)
        self._ends.append(len(self._tokens))
        return True

    def _fit(self, place: str, encoded: Encoded, left: Left) -> Encoded | None:
        """What a row can hold of it; None: nothing to learn from."""
        length, room = len(encoded.ids) - 1, self._seq_length
        if length <= room:
            return encoded
        if self._config.too_long == "truncate":
            cut = Encoded(encoded.ids[: room + 1], encoded.learnt[: room + 1])
            if any(cut.learnt):
                left.truncated.add(place, f"{length} tokens")
                return cut
            left.dropped.add(place, f"{length} tokens, no answer among the first {room}")
        elif self._config.too_long == "drop":
            left.dropped.add(place, f"{length} tokens")
        else:
            left.long.add(place, f"{length} tokens")
            left.longest = max(left.longest, length)
        return None


def _lowest(positions: list[float], fraction: float) -> bytes:
    """Which conversations are held out, as bytes of 0 and 1: those whose split position is lowest.

    Equal conversations have the same position and are therefore in the same split. At least the lowest position is
    held out (unless the fraction is 0), and the highest is always learnt.
    """
    if not positions or not fraction:
        return bytes(len(positions))
    limit = min(max(fraction, math.nextafter(min(positions), 2.0)), max(positions))
    return bytes(position < limit for position in positions)


def _refuse_bad(lefts: list[Left]) -> None:
    bad = Tally.joined(left.bad for left in lefts)
    if bad.count:
        raise DataError(
            f"{bad.count} lines in finetune.sources are no conversations.",
            got=bad.listed(),
            expected="an object with 'messages' (a list of {role, content}), with 'prompt' and 'completion', or with "
            "'text'; answers that are not empty",
            todo="correct the lines, or leave them out: finetune.bad_lines=skip",
        )


def _refuse_long(lefts: list[Left], seq_length: int) -> None:
    long = Tally.joined(left.long for left in lefts)
    if long.count:
        raise DataError(
            f"{long.count} conversations in finetune.sources are too long.",
            got=f"up to {max(left.longest for left in lefts)} tokens{long.listed()}",
            expected=f"at most data.seq_length = {seq_length} tokens, template and end of document included",
            todo="raise data.seq_length, leave them out (finetune.too_long=drop), or cut their ends off "
            "(finetune.too_long=truncate)",
        )


def _refuse_overlap(sources: Sequence[ConversationSource]) -> None:
    """A file that is held out is not learnt from as well, by any source."""
    learnt = {file.resolve(): s.name for s in sources for _, file in conversation_files(s.path)}
    held_out = {f.resolve() for s in sources if s.validation is not None for _, f in conversation_files(s.validation)}
    both = sorted(learnt.keys() & held_out)
    if both:
        raise DataError(
            "Conversations are held out for validation and learnt from.",
            got=", ".join(f"{file} (in {learnt[file]})" for file in both[:4]),
            expected="validation files outside of every source's path",
            todo="move them, or name the other files one by one",
        )


def _check_source(source: ConversationSource, held_out: Bools, left: Left) -> None:
    """There is something to learn, and something to validate with where the source names it."""
    empty = None if (~held_out).any() else source.path
    if source.validation is not None and not held_out.any():
        empty = empty or source.validation
    if empty is not None:
        raise DataError(
            f"Source '{source.name}' holds no usable conversation.",
            got=f"{empty}; left out of this source: {left.bad.count} bad lines, {left.dropped.count} too long "
            f"conversations{left.bad.listed()}{left.dropped.listed()}",
            expected="at least one conversation",
            todo="correct finetune.sources",
        )


def _batches(conversations: Iterator[Conversation], chars: int) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    held = 0
    for conversation in conversations:
        batch.append(conversation)
        held += sum(len(turn.content) for turn in conversation.turns)
        if held >= chars:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _num_bytes(source: ConversationSource) -> int:
    paths = [path for path in (source.path, source.validation) if path is not None]
    return sum(file.stat().st_size for path in paths for _, file in conversation_files(path))


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, as the function that moves it on by so many bytes."""
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task, waiting = progress.add_task("tokenize", total=total), 0

        def advance(amount: int) -> None:
            nonlocal waiting
            waiting += amount
            if waiting >= _BAR_BYTES:
                progress.advance(task, waiting)
                waiting = 0

        yield advance
        progress.advance(task, waiting)
