from itertools import pairwise
from pathlib import Path

import pytest

from megamoe.config.data import DataConfig
from megamoe.config.finetune import AssistantTurnConfig, SystemTurnConfig, TemplateConfig, UserTurnConfig
from megamoe.data.conversations import Conversation, Turn
from megamoe.data.manifest import TOKENIZER, Manifest
from megamoe.data.template import ChatTemplate, Encoded
from megamoe.data.tokenizer import Tokenizer

SYSTEM = Turn("system", "Be exact \u2581 caf\u00e9.", False)
FIRST, SECOND = Turn("user", "What is json?", False), Turn("user", "  And \u4f60\u597d?", False)
ANSWER, LAST = Turn("assistant", "A format\n of text", True), Turn("assistant", " \U0001f600 bytes", True)
CHAT = Conversation((SYSTEM, FIRST, ANSWER, SECOND, LAST), "f:1")
TEXT = Conversation((Turn("text", "import json", True),), "f:2")
# Of many tokenizers the prefix's last space would merge with the first word of the answer.
TEMPLATE = TemplateConfig(assistant=AssistantTurnConfig(suffix=" ###\n"))


@pytest.fixture(scope="module")
def tokenizer(prepared: tuple[DataConfig, Manifest]) -> Tokenizer:
    return Tokenizer(Path(prepared[0].prepared_dir) / TOKENIZER)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(TEMPLATE, tokenizer)


def _learnt_runs(encoded: Encoded) -> list[list[int]]:
    """The runs of learnt tokens."""
    runs: list[list[int]] = []
    for (_, before), (token, learnt) in pairwise(zip(*encoded, strict=True)):
        if learnt and not before:
            runs.append([])
        if learnt:
            runs[-1].append(token)
    return runs


def test_the_tokens_give_the_text_back(template: ChatTemplate, tokenizer: Tokenizer):
    ids, _ = template.encode(CHAT)
    assert ids.count(tokenizer.eod_id) == 2
    assert ids[0] == ids[-1] == tokenizer.eod_id
    assert tokenizer.decode(ids) == (
        "Be exact \u2581 caf\u00e9.\n\nUser: What is json?\nAssistant: A format\n of text ###\n"
        "User:   And \u4f60\u597d?\nAssistant:  \U0001f600 bytes ###\n"
    )


def test_the_answers_with_their_suffixes_are_learnt_and_nothing_else(template: ChatTemplate, tokenizer: Tokenizer):
    encoded = template.encode(CHAT)
    runs = _learnt_runs(encoded)
    assert not encoded.learnt[0]
    assert [tokenizer.decode(run) for run in runs] == ["A format\n of text ###\n", " \U0001f600 bytes ###\n"]
    assert [tokenizer.eod_id in run for run in runs] == [False, True]
    assert runs[1][-1] == tokenizer.eod_id


def test_the_end_after_a_question_is_not_learnt(template: ChatTemplate, tokenizer: Tokenizer):
    ids, learnt = template.encode(Conversation((FIRST, ANSWER, SECOND), "f:1"))
    assert (ids[-1], learnt[-1]) == (tokenizer.eod_id, False)


def test_plain_text_has_no_template_and_is_learnt_whole(template: ChatTemplate, tokenizer: Tokenizer):
    ids, learnt = template.encode(TEXT)
    assert ids == [tokenizer.eod_id, *tokenizer.encode("import json"), tokenizer.eod_id]
    assert learnt == [False] + [True] * (len(ids) - 1)


def test_everything_but_the_beginning_can_be_learnt(template: ChatTemplate, tokenizer: Tokenizer):
    ids, learnt = ChatTemplate(TEMPLATE, tokenizer, "all").encode(CHAT)
    assert ids == template.encode(CHAT).ids
    assert learnt == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize(
    "config",
    [
        TEMPLATE,
        TemplateConfig(),
        # No white space anywhere: a tokenizer would merge across every one of these boundaries.
        TemplateConfig(
            system=SystemTurnConfig(suffix="js"),
            user=UserTurnConfig(prefix="on", suffix="im"),
            assistant=AssistantTurnConfig(prefix="re", suffix="port"),
        ),
        TemplateConfig(
            system=SystemTurnConfig(suffix=""),
            user=UserTurnConfig(prefix="", suffix=""),
            assistant=AssistantTurnConfig(prefix="", suffix=""),
        ),
    ],
)
def test_generation_goes_on_from_the_tokens_before_an_answer_in_training(tokenizer: Tokenizer, config: TemplateConfig):
    template = ChatTemplate(config, tokenizer)
    ids, learnt = template.encode(CHAT)
    for place, turn in enumerate(CHAT.turns):
        if turn.role != "assistant":
            continue
        prompt = template.prompt_ids(CHAT.turns[:place])
        answer = tokenizer.encode(turn.content) + tokenizer.encode(config.assistant.suffix)
        end = len(prompt) + len(answer)
        assert ids[:end] == prompt + answer
        assert all(learnt[len(prompt) : end])
        assert not learnt[len(prompt) - 1] or not config.assistant.prefix
    assert ids[end:] == [tokenizer.eod_id]


def test_an_answer_to_nothing_begins_like_a_document(template: ChatTemplate, tokenizer: Tokenizer):
    assert template.prompt_ids(()) == [tokenizer.eod_id, *tokenizer.encode("Assistant: ")]


def test_many_at_once_are_the_same_as_one_by_one(template: ChatTemplate):
    batch = [CHAT, TEXT, Conversation((ANSWER,), "f:3"), CHAT]
    for threads in (1, 3):
        assert template.encode_batch(batch, threads) == [template.encode(conversation) for conversation in batch]


def test_an_answer_without_tokens_leaves_nothing_to_learn(template: ChatTemplate):
    # Reading refuses empty answers; tokenizers from elsewhere may make no tokens of one that is not empty.
    _, learnt = template.encode(Conversation((FIRST, Turn("assistant", "", True)), "f:1"))
    assert not any(learnt)
    assert any(template.encode(Conversation((Turn("assistant", "", True), LAST), "f:1")).learnt)
