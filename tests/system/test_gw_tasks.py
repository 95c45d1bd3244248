"""The task families of the fine-tuning study: what is asked, what is held out, and the same bytes every time."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "configs/reproduce/gw/tasks.py"
SIZES = {"train": 160, "test": 32}  # multiples of the eight classes
FAMILIES = ("name", "package", "argument", "statement", "builtin")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gw_tasks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tasks = script()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of the library that the classes need, with files that must not be used."""
    folder = tmp_path_factory.mktemp("library")
    for package in tasks.PACKAGES:
        shutil.copytree(Path(sysconfig.get_path("stdlib"), package), folder / package)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    (folder / "notes.txt").write_text("no Python")
    (folder / "test").mkdir()
    (folder / "test/test_it.py").write_text("def f(): pass\n")
    return folder


@pytest.fixture(scope="module")
def outputs(library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What two processes wrote that order sets and dictionaries of strings differently."""
    folders = [tmp_path_factory.mktemp("out") for _ in range(2)]
    words = ["--source", str(library), *(word for part, size in SIZES.items() for word in (f"--{part}", str(size)))]
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "--out", str(folder), *words],
            env=os.environ | {"PYTHONHASHSEED": str(number), "PYTHONPATH": str(SCRIPT.parents[3])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, folder in enumerate(folders, start=1)
    ]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    return folders


def lines(folder: Path, family: str, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / family / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return read


def test_two_processes_write_the_same_bytes(outputs: list[Path]) -> None:
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.json*")} for f in outputs)
    assert len(one) == 2 * len(FAMILIES) + 1
    assert one == two


def test_the_summary_says_what_was_written(outputs: list[Path]) -> None:
    written = summary(outputs[0])
    assert written["files"]["unreadable"] == 2
    assert set(written["families"]) == set(FAMILIES)
    for family, told in written["families"].items():
        for part, size in SIZES.items():
            data = (outputs[0] / family / f"{part}.jsonl").read_bytes()
            assert told["sha256"][part] == hashlib.sha256(data).hexdigest()
            assert told[part] == len(data.splitlines()) == size
        answers = Counter(line["completion"] for line in lines(outputs[0], family, "test"))
        assert told["majority"] == round(max(answers.values()) / SIZES["test"], 4)


def test_files_are_held_out_for_all_families(library: Path, outputs: list[Path]) -> None:
    modules, _ = tasks.read_modules(tasks.source_files(str(library)))
    held_out = set(summary(outputs[0])["test_files"])
    assert {name.split("/")[0] for name in held_out} == set(tasks.PACKAGES)
    for family in FAMILIES:
        prompts: dict[bool, set[str]] = {False: set(), True: set()}
        for module in modules:
            prompts[module.name in held_out] |= {e.prompt for e in tasks.FAMILIES[family].examples(module)}
        train, test = ({line["prompt"] for line in lines(outputs[0], family, part)} for part in SIZES)
        assert train <= prompts[False]
        assert test <= prompts[True] - prompts[False]
        assert len(train) + len(test) == sum(SIZES.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_short_and_no_answer_prevails(outputs: list[Path], family: str) -> None:
    for part, size in SIZES.items():
        answers = Counter(line["completion"] for line in lines(outputs[0], family, part))
        assert all(answer.isidentifier() for answer in answers)
        if tasks.FAMILIES[family].answers:
            assert answers == dict.fromkeys(tasks.FAMILIES[family].answers, size // 8)
        else:
            assert max(answers.values()) <= max(1, 0.02 * size)
        assert all(len(line["prompt"] + line["completion"]) <= 440 for line in lines(outputs[0], family, part))


def test_an_answer_is_in_its_prompt_only_where_it_should_be(outputs: list[Path]) -> None:
    for part in SIZES:
        for line in lines(outputs[0], "package", part):
            assert line["completion"] not in line["prompt"].lower()
        for line in lines(outputs[0], "builtin", part):
            assert tasks.MASK in line["prompt"]
        for line in lines(outputs[0], "argument", part):
            signature, body = line["prompt"].split("\n", 1)
            assert tasks.MASK in signature
            assert line["completion"] in body


SAMPLE = '''
def remove_option(self, option, *, count=1):
    """Remove an option. It may
    be missing.

    More.
    """
    # why
    if option in self:
        option = 2; self.count()
    elif other:
        raise KeyError(option)
    def inner():
        return count
\x0c
    return inner


def value(value): return value
'''


@pytest.fixture
def sample(tmp_path: Path) -> Any:
    (tmp_path / "sample.py").write_text(SAMPLE)
    (module,), unreadable = tasks.read_modules(tasks.source_files(str(tmp_path)))
    assert unreadable == 0
    return module


def test_names_are_asked_where_the_prompt_holds_their_words(sample: Any) -> None:
    # Not `value`, which has no docstring.
    prompt = "Arguments: self, option, count\nDocstring: Remove an option.\nFunction name?"
    assert list(tasks.name_examples(sample)) == [(prompt, "remove_option")]


def test_arguments_are_masked_one_at_a_time(sample: Any) -> None:
    body = (
        "    if option in self:\n        option = 2; self.count()\n    elif other:\n        raise KeyError(option)\n"
        "    def inner():\nMissing argument?"
    )
    # `self.count` is no use of the argument `count`.
    prompt = f"def remove_option(self, ___, *, count=1):\n{body}"
    assert list(tasks.argument_examples(sample)) == [(prompt, "option")]


def test_statements_that_begin_a_line_are_asked(sample: Any) -> None:
    found = [(e.prompt.splitlines()[-3:-1], e.completion) for e in tasks.statement_examples(sample)]
    # Neither `elif`, nor what follows a semicolon or colon, nor the docstring; comments and form feeds are no lines.
    # Six lines at most are shown, moved to the left.
    assert found == [
        (['    """', "    ___"], "if"),
        (["    if option in self:", "        ___"], "assign"),
        (["elif other:", "    ___"], "raise"),
        (["    return count", "___"], "return"),
        (["def inner():", "    ___"], "return"),
    ]
