"""README.md tells the truth: its paths exist, its tree is the repository's, its commands start.

Conventions that these tests read: a path stands in backticks and is relative to the repository's root or to
megamoe/; commands stand in blocks marked ``bash``, the annotated tree of the repository in a block marked
``tree``.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH_SUFFIXES = (".py", ".sh", ".yaml", ".toml", ".md", ".txt")
# First components of paths that a run or a set-up writes; they need not exist in a fresh clone.
WRITTEN = {"runs", "checkpoints", "logs", ".venv", "wandb"}
# Words with a slash that are no paths of this repository, such as units and names of other projects.
NOT_PATHS: set[str] = set()
# Commands of others; only the paths among their words are checked.
FOREIGN = {"cat", "cd", "cp", "git", "head", "ls", "mypy", "pip", "pre-commit", "ruff", "sbatch", "source"}
# Scripts that show what they would do; the others are asked for --help.
DRY_RUN = {"launch/pretrain.py"}
LAUNCHERS = {"deepspeed", "torchrun", "srun", "python", "python3"}
TIME_LIMIT = 120


def fences(text: str, language: str) -> list[str]:
    return [body for marked, body in FENCE.findall(text) if marked == language]


def paths_in(text: str) -> list[str]:
    """What stands in backticks outside code blocks and looks like a path, without placeholders."""
    words = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return [word for word in words if looks_like_path(word)]


def looks_like_path(word: str) -> bool:
    if re.search(r"[\s<>*{}()…$=,]|://|\.\.\.|^-|^/|^~|^@", word) or word in NOT_PATHS or word.endswith("/s"):
        return False
    return ("/" in word or word.endswith(PATH_SUFFIXES)) and Path(word.split("::")[0]).parts[0] not in WRITTEN


def path_problem(word: str) -> str | None:
    """Why ``word`` is wrong, or ``None``. ``file.py::name`` asks for the name inside the file as well."""
    name, _, inner = word.partition("::")
    candidates = [base / (name + suffix) for base in (ROOT, ROOT / "megamoe") for suffix in ("", ".py")]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        return f"{word}: no such path"
    for part in filter(None, re.split(r"::|\[.*", inner)):
        definition = re.compile(rf"^\s*(?:async )?(?:def|class) {re.escape(part)}\b", re.MULTILINE)
        if not definition.search(found.read_text("utf-8")):
            return f"{word}: {name} defines no {part}"
    return None


def commands_in(text: str) -> list[str]:
    """The commands of the bash blocks: continued lines joined, comments and prompts removed, && split."""
    commands: list[str] = []
    for block in fences(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            clean = shlex.join(shlex.split(line.removeprefix("$ "), comments=True))
            commands += filter(None, map(str.strip, clean.split("'&&'")))
    return commands


def trial(command: str) -> list[str] | None:
    """What to run to see that ``command`` starts, without its work; ``None``: looking at its paths is enough.

    Raises:
        AssertionError: the command is of no known kind, or names a script that does not exist.
    """
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    assert words, f"{command}: sets variables and does nothing"
    head = words[0]
    if head == "bash" and len(words) > 1:
        assert (ROOT / words[1]).is_file(), f"{command}: no script {words[1]}"
        return ["bash", "-n", words[1]]
    if head in LAUNCHERS:
        return python_trial(command, words)
    assert head in FOREIGN, f"{command}: unknown kind of command; teach this test how to try it"
    return None


def python_trial(command: str, words: list[str]) -> list[str]:
    if "-m" in words and words[words.index("-m") + 1] == "megamoe":
        rest = words[words.index("-m") + 2 :]
        subcommand = rest[: next((i for i, word in enumerate(rest) if not word.isidentifier()), len(rest))]
        return [sys.executable, "-m", "megamoe", *subcommand, "--help"]
    if "pytest" in words:
        return [sys.executable, "-m", "pytest", "--version"]
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    assert at is not None, f"{command}: starts no script"
    assert (ROOT / words[at]).is_file(), f"{command}: no script {words[at]}"
    if words[at] in DRY_RUN:
        return [sys.executable, *words[at:], *([] if "--dry-run" in words else ["--dry-run"])]
    return [sys.executable, words[at], "--help"]


def file_words(command: str) -> list[str]:
    """Words of a command that name files of the repository; what it writes (`--out`) need not be there."""
    words = shlex.split(command)
    read = [word for before, word in pairwise(words) if before != "--out"]
    return [word for word in read if "=" not in word and looks_like_path(word)]


def tree_paths(block: str) -> Iterator[str]:
    """Paths of an annotated tree: nesting by indentation, with or without drawn lines; first word is the
    name."""
    open_folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        drawn = re.match(r"[\s│├└─|`+-]*", line)
        column, rest = (drawn.end() if drawn else 0), line[drawn.end() if drawn else 0 :].split()
        if not rest or rest[0] in {"…", "#"}:
            continue
        while open_folders and open_folders[-1][0] >= column:
            open_folders.pop()
        name = rest[0].rstrip("/")
        yield "/".join([*(folder for _, folder in open_folders), name])
        if rest[0].endswith("/"):
            open_folders.append((column, name))


def test_paths_exist() -> None:
    problems = [problem for word in paths_in(TEXT) if (problem := path_problem(word))]
    assert not problems, "\n" + "\n".join(problems)


def test_the_tree_is_the_repository() -> None:
    named = [path for block in fences(TEXT, "tree") for path in tree_paths(block)]
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, missing


@pytest.mark.skipif(not TEXT, reason="README.md does not exist yet")
def test_the_readme_has_what_these_tests_read() -> None:
    assert commands_in(TEXT)
    assert paths_in(TEXT)
    assert fences(TEXT, "tree")


@pytest.mark.parametrize("command", sorted(set(commands_in(TEXT))))
def test_commands_start(command: str) -> None:
    attempt = trial(command)
    problems = [problem for word in file_words(command) if (problem := path_problem(word))]
    assert not problems, problems
    if attempt is not None:
        done = subprocess.run(attempt, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
        assert done.returncode == 0, f"{shlex.join(attempt)}\n{done.stdout}\n{done.stderr}"


SAMPLE = """
Start at `launch/setup.sh`, see `common/errors` and `tests/conftest.py::pytest_collection_modifyitems`;
results of `runs/tiny/config.json` in `tokens/s`; `a or b`, `--config x/y`, `<name>/x`.
```bash
$ bash launch/setup.sh test   # set up
FLAG=1 deepspeed --num_gpus 2 \\
    launch/pretrain.py --config configs/tiny.yaml training.steps=5
python -m megamoe data prepare --config configs/tiny.yaml && git status
```
```tree
megamoe/
  common/        ground floor
    errors.py    what users see
README.md
```
"""
DRAWN = """
├── megamoe/
│   ├── common/     ground floor
│   │   └── errors.py
├── README.md
"""


def test_reading_of_a_sample() -> None:
    assert paths_in(SAMPLE) == [
        "launch/setup.sh",
        "common/errors",
        "tests/conftest.py::pytest_collection_modifyitems",
    ]
    assert commands_in(SAMPLE) == [
        "bash launch/setup.sh test",
        "FLAG=1 deepspeed --num_gpus 2 launch/pretrain.py --config configs/tiny.yaml training.steps=5",
        "python -m megamoe data prepare --config configs/tiny.yaml",
        "git status",
    ]
    paths = ["megamoe", "megamoe/common", "megamoe/common/errors.py", "README.md"]
    assert list(tree_paths(fences(SAMPLE, "tree")[0])) == list(tree_paths(DRAWN)) == paths
    assert [path_problem(word) for word in paths_in(SAMPLE)] == [None] * 3


def test_trials() -> None:
    assert trial("bash launch/setup.sh test") == ["bash", "-n", "launch/setup.sh"]
    assert trial("A=1 python -m megamoe data prepare --config x.yaml")[1:] == [
        *("-m", "megamoe", "data", "prepare", "--help"),
    ]
    assert trial("git status") is None
    assert file_words("python x.py --config configs/none.yaml training.output_dir=a/b") == [
        *("x.py", "configs/none.yaml"),
    ]


@pytest.mark.parametrize("word", ["launch/none.sh", "common/none", "tests/conftest.py::no_such_name", "none.md"])
def test_a_wrong_path_is_found(word: str) -> None:
    assert looks_like_path(word)
    assert path_problem(word)


@pytest.mark.parametrize("command", ["bash launch/none.sh", "deepspeed launch/none.py", "python -c 1", "frobnicate x"])
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        trial(command)
