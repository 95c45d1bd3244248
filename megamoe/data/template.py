"""How a conversation becomes tokens, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Literal, NamedTuple

from megamoe.config.finetune import TemplateConfig
from megamoe.data.conversations import ChatRole, Conversation, Role, Turn
from megamoe.data.tokenizer import Tokenizer

LossOn = Literal["answers", "all"]


class Encoded(NamedTuple):
    """One conversation as tokens, the end-of-document id before it and after it.

    Attributes:
        ids: [n+1].
        learnt: [n+1], whether to learn to say this token after those before it; never the first.
    """

    ids: list[int]
    learnt: list[bool]


class _Around(NamedTuple):
    """Tokens before and after what a role says."""

    prefix: list[int]
    suffix: list[int]


class ChatTemplate:
    """A template in the tokens of one tokenizer.

    Prefix, content and suffix are tokenized one by one: in generation the tokens before an answer are known without
    the answer, so in training no token may reach across that boundary either (ours: many tokenizers would merge
    the space after a prefix with the first word of the answer).

    Args:
        config: the section `finetune.template`.
        tokenizer: the model's.
        loss_on: what is learnt: the answers with their suffixes, or every token.
    """

    def __init__(self, config: TemplateConfig, tokenizer: Tokenizer, loss_on: LossOn = "answers") -> None:
        self._tokenizer = tokenizer
        self._all = loss_on == "all"
        roles: tuple[ChatRole, ...] = ("system", "user", "assistant")
        self._around: dict[Role, _Around] = {"text": _Around([], [])}
        for role in roles:
            turn = getattr(config, role)
            self._around[role] = _Around(tokenizer.encode(turn.prefix), tokenizer.encode(turn.suffix))

    def encode(self, conversation: Conversation) -> Encoded:
        """One conversation."""
        return self.encode_batch([conversation], num_threads=1)[0]

    def encode_batch(self, conversations: Sequence[Conversation], num_threads: int) -> list[Encoded]:
        """Many at once, on the tokenizer's own threads.

        Where the tokenizer makes no tokens of any answer (one from elsewhere may drop characters), nothing is learnt.
        """
        texts = [turn.content for conversation in conversations for turn in conversation.turns]
        contents = iter(self._tokenizer.encode_batch(texts, num_threads))
        return [self._whole(turns, list(islice(contents, len(turns)))) for turns, _ in conversations]

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens that come before an answer to `turns`, exactly as in training; generation goes on from them."""
        contents = self._tokenizer.encode_batch([turn.content for turn in turns], num_threads=1)
        return self._written(turns, contents).ids + self._around["assistant"].prefix

    def _whole(self, turns: Sequence[Turn], contents: Sequence[list[int]]) -> Encoded:
        ids, learnt = self._written(turns, contents)
        ids.append(self._tokenizer.eod_id)
        learnt.append(self._all or turns[-1].learnt)
        answered = any(content for turn, content in zip(turns, contents, strict=True) if turn.learnt)
        return Encoded(ids, learnt if answered else [False] * len(ids))

    def _written(self, turns: Sequence[Turn], contents: Sequence[list[int]]) -> Encoded:
        """The beginning mark and `turns`."""
        ids, learnt = [self._tokenizer.eod_id], [False]
        for turn, content in zip(turns, contents, strict=True):
            prefix, suffix = self._around[turn.role]
            said = content + suffix
            ids += prefix + said
            learnt += [self._all] * len(prefix) + [self._all or turn.learnt] * len(said)
        return Encoded(ids, learnt)
