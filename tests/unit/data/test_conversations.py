import json
from pathlib import Path

import pytest

from megamoe.common.errors import DataError
from megamoe.data.conversations import Conversation, Tally, Turn, conversation_files, read_conversations

ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
GOOD = {"messages": [ASK, ANSWER]}


def _read(path: Path) -> tuple[list[Conversation], Tally]:
    bad = Tally()
    return list(read_conversations(str(path), bad)), bad


def _write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def _messages(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_the_three_forms(tmp_path: Path):
    chat = _messages(("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"))
    path = _write(
        tmp_path / "a.jsonl", chat | {"id": 7}, {"prompt": "", "completion": " x", "n": None}, {"text": "plain\n"}
    )
    conversations, bad = _read(path)
    assert bad.count == 0
    assert [conversation.place for conversation in conversations] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert [conversation.turns for conversation in conversations] == [
        (
            Turn("system", "Be brief.", False),
            Turn("user", "Hi", False),
            Turn("assistant", "Yes?", True),
            Turn("user", "Bye", False),
        ),
        (Turn("user", "", False), Turn("assistant", " x", True)),
        (Turn("text", "plain\n", True),),
    ]


@pytest.mark.parametrize(
    "roles",
    ["assistant", "user assistant assistant", "user user assistant user assistant", "system assistant user"],
)
def test_turns_come_in_any_order_a_person_would_write(tmp_path: Path, roles: str):
    path = _write(tmp_path / "a.jsonl", _messages(*((role, f"say {n}") for n, role in enumerate(roles.split()))))
    (conversation,), bad = _read(path)
    assert bad.count == 0
    assert " ".join(turn.role for turn in conversation.turns) == roles


BAD_LINES = {
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    '{"text": 1' + "0" * 5000 + "}": "not JSON",
    "[1]": "not a JSON object but a list",
    '"text"': "not a JSON object but a string",
    "{}": "the keys are not exactly one of: 'messages', 'prompt' with 'completion', 'text', but none",
    '{"id": 1}': "but 'id'",
    '{"text": "a", "prompt": "b"}': "but 'text', 'prompt'",
    '{"messages": [], "text": "b"}': "but 'messages', 'text'",
    '{"text": 3}': "'text' is not a string but a number",
    '{"text": " \\n"}': "'text' is empty",
    '{"prompt": "a"}': "'completion' is not a string but null or absent",
    '{"completion": "a"}': "'prompt' is not a string but null or absent",
    '{"prompt": "a", "completion": ""}': "'completion' is empty",
    '{"prompt": "a", "completion": "\\ud800"}': "'completion' holds a lone surrogate",
    '{"messages": {"role": "user"}}': "'messages' is not a list but an object",
    '{"messages": []}': "no assistant message",
    '{"messages": ["hello"]}': "messages[0] is not an object but a string",
    '{"messages": [{"content": "a"}]}': "messages[0] has the role None, not one of system, user, assistant",
    '{"messages": [{"role": "text", "content": "a"}]}': "messages[0] has the role 'text'",
    '{"messages": [{"role": ["user"], "content": "a"}]}': "messages[0] has the role ['user']",
    '{"messages": [{"role": "user", "content": "a"}]}': "no assistant message",
    '{"messages": [{"role": "user", "content": ["a"]}]}': "messages[0].content is not a string but a list",
    '{"messages": [{"role": "user", "content": true}]}': "messages[0].content is not a string but a boolean",
    '{"messages": [{"role": "assistant", "content": "\\t"}]}': "messages[0].content is empty",
    '{"messages": [{"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}]}': "a system message",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60])
def test_a_bad_line_is_counted_with_its_place_and_reason(tmp_path: Path, line: str):
    path = _write(tmp_path / "a.jsonl", GOOD, "", "  \t", line, GOOD)
    conversations, bad = _read(path)
    assert [conversation.place for conversation in conversations] == [f"{path}:1", f"{path}:5"]
    assert bad.count == 1
    assert bad.examples[0].startswith(f"{path}:4: ")
    assert BAD_LINES[line] in bad.examples[0]
    assert len(bad.examples[0]) < len(str(path)) + 250


def test_bytes_that_are_not_utf8_are_a_bad_line_and_a_byte_order_mark_is_none(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xff"}\r\n{"text": "b"}')
    conversations, bad = _read(path)
    assert [conversation.turns[0].content for conversation in conversations] == ["a", "b"]
    assert [example.split(":")[1] for example in bad.examples] == ["2"]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path):
    for name in ("b.jsonl", "a/z.jsonl", "a/c/d.jsonl", ".hidden/e.jsonl", "a/.f.jsonl", "notes.txt", "g.json"):
        _write(tmp_path / name, {"text": name})
    (tmp_path / "h.jsonl").mkdir()
    conversations, bad = _read(tmp_path)
    assert [conversation.turns[0].content for conversation in conversations] == ["a/c/d.jsonl", "a/z.jsonl", "b.jsonl"]
    assert [name for name, _ in conversation_files(str(tmp_path))] == ["a/c/d.jsonl", "a/z.jsonl", "b.jsonl"]
    assert bad.count == 0


@pytest.mark.parametrize(
    "name, reason", [("absent", "does not exist"), ("empty", "without .jsonl"), ("a.json", "another kind of file")]
)
def test_a_path_without_conversations_is_an_error(tmp_path: Path, name: str, reason: str):
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "a.json", GOOD)
    with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
        _read(tmp_path / name)


def test_every_byte_is_reported(tmp_path: Path):
    path = _write(tmp_path / "a.jsonl", GOOD, "", "{", GOOD)
    amounts: list[int] = []
    list(read_conversations(str(path), Tally(), amounts.append))
    assert sum(amounts) == path.stat().st_size


def test_the_identity_is_what_is_said(tmp_path: Path):
    same = {"prompt": "Why?", "completion": "Because."}
    conversations, _ = _read(_write(tmp_path / "a.jsonl", GOOD, same, _messages(("assistant", "Because."))))
    assert conversations[0].identity == conversations[1].identity != conversations[2].identity


def test_a_tally_lists_the_first_ones_and_counts_all():
    tallies = [Tally(), Tally()]
    for n in range(30):
        tallies[n % 2].add(f"f:{n}", "odd" if n % 2 else "even")
    whole = Tally.joined(tallies)
    assert whole.count == 30
    assert whole.listed().splitlines()[1:] == [f"    f:{n}: even" for n in range(0, 20, 2)] + ["    and 20 more"]
    assert Tally(1, ["f:1: x"]).listed() == "\n    f:1: x"
