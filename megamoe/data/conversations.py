"""Reading conversations: JSONL files, one conversation per line, written in one of three ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from megamoe.common.errors import DataError

ChatRole = Literal["system", "user", "assistant"]
Role = ChatRole | Literal["text"]
MAX_EXAMPLES = 10

_CHAT_ROLES: tuple[str, ...] = get_args(ChatRole)
_FORMS = "exactly one of: 'messages', 'prompt' with 'completion', 'text'"


class Turn(NamedTuple):
    """What one side says; `learnt`: it is an answer, or plain text."""

    role: Role
    content: str
    learnt: bool


class Conversation(NamedTuple):
    """The turns in their order; `place` is `file:line`."""

    turns: tuple[Turn, ...]
    place: str

    @property
    def identity(self) -> str:
        """Equal for conversations in which the same is said, wherever and in whichever form they are written."""
        return json.dumps([turn[:2] for turn in self.turns])


@dataclass
class Tally:
    """How many of something, and the first few of them.

    Attributes:
        count: all of them.
        examples: `place: what` of the first ones.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, place: str, what: str) -> None:
        """Count one."""
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{place}: {what}")

    @classmethod
    def joined(cls, tallies: Iterable[Tally]) -> Tally:
        """All of them as one."""
        parts = list(tallies)
        examples = [example for part in parts for example in part.examples]
        return cls(sum(part.count for part in parts), examples[:MAX_EXAMPLES])

    def listed(self) -> str:
        """The examples, one per line, for a message."""
        more = [f"and {self.count - len(self.examples)} more"] if self.count > len(self.examples) else []
        return "".join(f"\n    {line}" for line in [*self.examples, *more])


def conversation_files(path: str) -> list[tuple[str, Path]]:
    """The .jsonl files of a source as (name below the source, path), ordered by name; hidden ones are left out.

    Raises:
        DataError: the path does not exist or holds no .jsonl file.
    """
    root = Path(path).expanduser()
    if root.is_file() and root.suffix == ".jsonl":
        return [(root.name, root)]
    found = ((file.relative_to(root), file) for file in root.rglob("*.jsonl") if file.is_file())
    files = [(name.as_posix(), file) for name, file in found if not any(part.startswith(".") for part in name.parts)]
    if files:
        return sorted(files)
    raise DataError(
        "A source of conversations cannot be read.",
        got=f"{path}: {_what_is(root)}",
        expected="a .jsonl file, or a folder with at least one",
        todo="correct finetune.sources",
    )


def read_conversations(
    path: str, bad: Tally, advance: Callable[[int], None] = lambda amount: None
) -> Iterator[Conversation]:
    """Yield every conversation of a .jsonl file or a folder of them; count the other lines in `bad`.

    A line is an object with `messages` (a list of {role, content}), with `prompt` and `completion` (a user's and an
    assistant's turn), or with `text`; other keys are ignored. Lines of white space are no lines.

    Args:
        path: see `conversation_files`.
        bad: gets place and reason of every line that is no conversation.
        advance: called with the bytes of each line that was read.

    Raises:
        DataError: the path does not exist or holds no .jsonl file, or a file cannot be opened.
    """
    for _, file in conversation_files(path):
        try:
            stream = file.open("rb")
        except OSError as error:
            raise DataError(f"{file} cannot be read.", got=str(error.strerror), todo="correct it") from error
        with stream:
            for number, line in enumerate(stream, start=1):
                advance(len(line))
                if not line.strip():
                    continue
                place = f"{file}:{number}"
                try:
                    yield Conversation(_turns(line), place)
                except _BadLine as reason:
                    bad.add(place, str(reason))


class _BadLine(Exception):
    """Why a line is no conversation."""


def _what_is(root: Path) -> str:
    if root.is_dir():
        return "a folder without .jsonl files"
    return "another kind of file" if root.exists() else "does not exist"


def _turns(line: bytes) -> tuple[Turn, ...]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError covers bytes that are not UTF-8
        raise _BadLine(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise _BadLine(f"not a JSON object but {_kind(record)}")
    forms = ["messages"] * ("messages" in record) + ["text"] * ("text" in record)
    forms += ["prompt"] * ("prompt" in record or "completion" in record)
    if len(forms) != 1:
        keys = ", ".join(repr(key) for key in record) or "none"
        raise _BadLine(f"the keys are not {_FORMS}, but {_short(keys)}")
    return _READERS[forms[0]](record)


def _from_messages(record: dict[str, Any]) -> tuple[Turn, ...]:
    messages = record["messages"]
    if not isinstance(messages, list):
        raise _BadLine(f"'messages' is not a list but {_kind(messages)}")
    turns = tuple(_message(message, f"messages[{n}]") for n, message in enumerate(messages))
    if any(turn.role == "system" for turn in turns[1:]):
        raise _BadLine("a system message that is not the first message")
    if not any(turn.learnt for turn in turns):
        raise _BadLine("no assistant message")
    return turns


def _message(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise _BadLine(f"{where} is not an object but {_kind(message)}")
    role = message.get("role")
    if role not in _CHAT_ROLES:
        raise _BadLine(f"{where} has the role {_short(repr(role))}, not one of {', '.join(_CHAT_ROLES)}")
    return _turn(role, message.get("content"), f"{where}.content")


def _from_prompt(record: dict[str, Any]) -> tuple[Turn, ...]:
    return (
        _turn("user", record.get("prompt"), "'prompt'"),
        _turn("assistant", record.get("completion"), "'completion'"),
    )


def _from_text(record: dict[str, Any]) -> tuple[Turn, ...]:
    return (_turn("text", record["text"], "'text'"),)


_READERS: dict[str, Callable[[dict[str, Any]], tuple[Turn, ...]]] = {
    "messages": _from_messages,
    "prompt": _from_prompt,
    "text": _from_text,
}


def _turn(role: Role, content: object, where: str) -> Turn:
    learnt = role in ("assistant", "text")
    if not isinstance(content, str):
        raise _BadLine(f"{where} is not a string but {_kind(content)}")
    if learnt and not content.strip():
        raise _BadLine(f"{where} is empty")
    if not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadLine(f"{where} holds a lone surrogate, which UTF-8 cannot hold") from error
    return Turn(role, content, learnt)


def _kind(value: object) -> str:
    """What JSON calls a value of this type."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null or absent")


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
