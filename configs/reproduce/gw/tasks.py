"""Five task families made of the interpreter's own standard library, to fine-tune a very small model on.

`python configs/reproduce/gw/tasks.py --out data/gw_tasks` writes FAMILY/train.jsonl and FAMILY/test.jsonl for each
family (one object with `prompt` and `completion` per line), and summary.json. It needs no network and takes seconds.

The families. Answers are one word, so that greedy decoding and exact match measure something:

- `name`: arguments and first sentence of a docstring -> the function's name. Only names whose words all occur in the
  prompt, so that the answer can be put together from what is asked (`remove_option`: "Remove an option from ...").
- `package`: six lines of code -> the package that they are from, one of eight. Lines in which the package's name
  occurs are left out.
- `argument`: a function's signature with one argument masked and the first lines of its body -> the argument. It
  occurs in these lines, so that it can be found there.
- `statement`: up to six lines of a function -> the kind of statement that follows, one of eight. Its indentation shows.
- `builtin`: six lines that call one of eight built-in functions, its name masked -> the function.

Which files. Those of `megamoe.data.corpus`' source `stdlib`, but without tests (they are half of the library and look
alike), idlelib, lib2to3, turtledemo and the tables of encodings and pydoc_data. A file that is no Python of this
interpreter is left out and counted.

Held out. Files are split, not examples: in every package (and among the modules outside packages) the files are
ordered by a hash of their path and moved to the test set until it holds 18 % of the package's characters. All
families share the split. Prompts occur once; one that occurs in both sets is left out of the test set.
This holds test files out of fine-tuning, NOT out of pretraining: that corpus, the source `stdlib`, is split by itself,
so a model pretrained on it may have read a test file, what is masked here included; never in the form of a question.
All arms of a study start from the same models and share this.

Sizes. 1200 lines for training and 250 for testing, or what there is (`candidates` in summary.json). Where the answers
are a fixed set, each occurs equally often, so the smallest class decides; elsewhere an answer has at most 2 % of the
lines. Prompt and answer together have at most 440 characters: with the corpus' own tokenizer of 2048 entries 40 to 90
tokens on average, depending on the family, and at most 211 on Python 3.11. Longer ones are left out and counted.

The same Python release, options and installed parts of the library (some systems package tkinter and distutils apart)
give the same bytes: summary.json holds their hashes. Its `majority` is the accuracy on the test set of whoever always
gives its most frequent answer, `answers_in_train` the share of test lines whose answer is some training line's answer.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import random
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from tqdm import tqdm

from megamoe.config.data import SourceConfig
from megamoe.data.corpus import STDLIB, list_files

EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
TEST_SHARE = 0.18
LARGEST_SHARE = 0.02  # of one answer among open ones
WINDOW = 6  # lines of code
MASK = "___"

# Every Python has these packages, none is a system's option, and each fills its share of a test set.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
BUILTINS = ("getattr", "hasattr", "int", "isinstance", "len", "print", "str", "super")
STATEMENTS: dict[type[ast.stmt], str] = {
    ast.Assign: "assign",
    ast.Expr: "call",
    ast.For: "for",
    ast.If: "if",
    ast.Raise: "raise",
    ast.Return: "return",
    ast.Try: "try",
    ast.While: "while",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """One file of the library; `name` is its path below the library."""

    name: str
    lines: list[str]
    functions: list[Function]

    @property
    def package(self) -> str:
        """Its outermost folder; empty for a module outside packages."""
        return self.name.rpartition("/")[0].partition("/")[0]


class Example(NamedTuple):
    prompt: str
    completion: str


class Family(NamedTuple):
    """How a module gives examples, and the answers where they are a fixed set."""

    examples: Callable[[Module], Iterator[Example]]
    answers: tuple[str, ...] = ()


# ---- reading


def read_modules(files: list[tuple[str, Path]]) -> tuple[list[Module], int]:
    """The files that parse, and the number of those that do not."""
    modules = []
    for name, path in tqdm(files, "reading", unit="file", mininterval=1.0):
        try:
            text = path.read_bytes().decode("utf-8-sig")
            with warnings.catch_warnings():  # of escapes in strings, which are the library's business
                warnings.simplefilter("ignore")
                nodes = ast.walk(ast.parse(text))
        except (SyntaxError, ValueError):  # ValueError: not UTF-8, or with a null character
            continue
        # The parser's lines: str.splitlines would count form feeds as well.
        lines = re.split(r"\r\n?|\n", text)
        modules.append(Module(name, lines, [node for node in nodes if isinstance(node, Function)]))
    return modules, len(files) - len(modules)


def source_files(source: str) -> list[tuple[str, Path]]:
    files = list_files(SourceConfig(name="library", path=source))
    return [(name, path) for name, path in files if name.endswith(".py") and not EXCLUDED & set(name.split("/"))]


def test_names(modules: Iterable[Module], seed: int) -> set[str]:
    """Names of the files that are held out."""
    packages: dict[str, dict[str, int]] = defaultdict(dict)
    for module in modules:
        packages[module.package][module.name] = sum(map(len, module.lines))
    held_out = set()
    for sizes in packages.values():
        wanted = TEST_SHARE * sum(sizes.values())
        for name in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
            # A file that alone would fill a third of the package's text stays, or too little would be left.
            if wanted > 0 and sizes[name] <= 2 * wanted:
                held_out.add(name)
                wanted -= sizes[name]
    return held_out


# ---- families


def arguments(function: Function) -> list[ast.arg]:
    """All but `*rest` and `**rest`."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def code(lines: Iterable[str]) -> Iterator[str]:
    """Without empty lines and comments."""
    return (line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def windows(module: Module) -> Iterator[str]:
    """The module's code in pieces of six lines that do not overlap."""
    lines = list(code(module.lines))
    for start in range(0, len(lines) - WINDOW + 1, WINDOW):
        yield textwrap.dedent("\n".join(lines[start : start + WINDOW]))


def name_examples(module: Module) -> Iterator[Example]:
    for function in module.functions:
        text = " ".join((ast.get_docstring(function) or "").partition("\n\n")[0].split())
        sentence = re.split(r"(?<=[.!?]) ", text)[0]
        words = [word for word in function.name.lower().split("_") if word]
        names = ", ".join(arg.arg for arg in arguments(function))
        documented = sentence and ">>>" not in sentence  # an example of its use would hold the name itself
        if documented and words and all(word in f"{names} {sentence}".lower() for word in words):
            yield Example(f"Arguments: {names or 'none'}\nDocstring: {sentence}\nFunction name?", function.name)


def package_examples(module: Module) -> Iterator[Example]:
    if module.package in PACKAGES:
        for text in windows(module):
            if module.package not in text.lower():
                yield Example(f"{text}\nPackage?", module.package)


def argument_examples(module: Module) -> Iterator[Example]:
    for function in module.functions:
        skipped = ast.get_docstring(function, clean=False) is not None
        if len(function.body) <= skipped or function.body[skipped].lineno == function.lineno:
            continue
        body = islice(code(module.lines[function.body[skipped].lineno - 1 : function.end_lineno]), WINDOW - 1)
        text = textwrap.indent(textwrap.dedent("\n".join(body)), "    ")
        for arg in arguments(function):
            if arg.arg not in ("self", "cls") and re.search(rf"(?<![\w.]){arg.arg}\b", text):
                yield Example(f"{masked_signature(function, arg)}\n{text}\nMissing argument?", arg.arg)


def masked_signature(function: Function, arg: ast.arg) -> str:
    name, arg.arg = arg.arg, MASK
    signature = f"def {function.name}({ast.unparse(function.args)}):"
    arg.arg = name
    return signature


def statement_examples(module: Module) -> Iterator[Example]:
    for function in module.functions:
        for statement in own_statements(function):
            kind = STATEMENTS.get(type(statement))
            line = module.lines[statement.lineno - 1]
            above = module.lines[function.lineno - 1 : statement.lineno - 1]
            before = list(islice(code(reversed(above)), WINDOW))[::-1]
            indent = line[: len(line) - len(line.lstrip())]
            # Not what follows a colon or semicolon in its line, and not `elif`, which the grammar calls an `if`.
            if kind and before and statement.col_offset == len(indent.encode()) and is_plain(statement, line):
                text = textwrap.dedent("\n".join([*before, indent + MASK]))
                yield Example(f"{text}\nNext statement?", kind)


def own_statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of all blocks below a node, without those of functions and classes inside."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.stmt):
                yield child
            if not isinstance(child, Function | ast.ClassDef):
                yield from own_statements(child)


def is_plain(statement: ast.stmt, line: str) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return not line.lstrip().startswith("elif")


def builtin_examples(module: Module) -> Iterator[Example]:
    # A call of the function itself: no method of that name, and not its definition.
    call = re.compile(rf"(?<![\w.])(?<!def )({'|'.join(BUILTINS)})(?=\()")
    for text in windows(module):
        called = set(call.findall(text))
        if len(called) == 1:
            yield Example(f"{call.sub(MASK, text)}\nFunction in place of {MASK}?", called.pop())


FAMILIES = {
    "name": Family(name_examples),
    "package": Family(package_examples, PACKAGES),
    "argument": Family(argument_examples),
    "statement": Family(statement_examples, tuple(STATEMENTS.values())),
    "builtin": Family(builtin_examples, BUILTINS),
}


# ---- drawing


class Candidates(NamedTuple):
    """All examples of a family, before the draw, and how many were left out."""

    train: list[Example]
    test: list[Example]
    too_long: int
    repeated: int


def collect(family: Family, modules: list[Module], held_out: set[str], max_chars: int) -> Candidates:
    """Training files first, so that a prompt that is in both sets remains in the training set."""
    found = Candidates([], [], 0, 0)
    seen: set[str] = set()
    for module in sorted(modules, key=lambda module: (module.name in held_out, module.name)):
        for example in family.examples(module):
            if len(example.prompt) + len(example.completion) > max_chars:
                found = found._replace(too_long=found.too_long + 1)
            elif example.prompt in seen:
                found = found._replace(repeated=found.repeated + 1)
            else:
                seen.add(example.prompt)
                (found.test if module.name in held_out else found.train).append(example)
    return found


def draw(examples: list[Example], answers: tuple[str, ...], size: int, rng: random.Random) -> list[Example]:
    """At most `size` examples in random order, balanced over the answers."""
    shuffled = rng.sample(examples, len(examples))
    if answers:
        counts = Counter(example.completion for example in examples)
        most = min(size // len(answers), *(counts[answer] for answer in answers))
    else:
        most = max(1, int(LARGEST_SHARE * size))
    taken: Counter[str] = Counter()
    drawn: list[Example] = []
    for example in shuffled:
        if taken[example.completion] < most and len(drawn) < size:
            taken[example.completion] += 1
            drawn.append(example)
    return drawn


# ---- writing


def write(path: Path, examples: list[Example]) -> str:
    """Write the lines and return their sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(example._asdict(), ensure_ascii=False) + "\n" for example in examples)
    path.write_bytes(text.encode())
    return hashlib.sha256(text.encode()).hexdigest()


def describe(train: list[Example], test: list[Example], found: Candidates) -> dict[str, Any]:
    known = {example.completion for example in train}
    answers = Counter(example.completion for example in test)
    both = [*train, *test]
    return {
        "train": len(train),
        "test": len(test),
        "candidates": {"train": len(found.train), "test": len(found.test)},
        "left_out": {"too_long": found.too_long, "repeated": found.repeated},
        "mean_prompt_chars": round(mean(len(example.prompt) for example in both), 1),
        "mean_answer_chars": round(mean(len(example.completion) for example in both), 1),
        "answers": {"train": len(known), "test": len(answers)},
        "majority": round(max(answers.values()) / len(test), 4),
        "answers_in_train": round(sum(example.completion in known for example in test) / len(test), 4),
    }


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Write every family; returns the summary."""
    modules, unreadable = read_modules(source_files(options.source))
    held_out = test_names(modules, options.seed)
    families = {name: build_family(name, modules, held_out, options) for name in FAMILIES}
    return {
        "python": platform.python_version(),
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "files": {"train": len(modules) - len(held_out), "test": len(held_out), "unreadable": unreadable},
        "families": families,
        "test_files": sorted(held_out),
    }


def build_family(name: str, modules: list[Module], held_out: set[str], options: argparse.Namespace) -> dict[str, Any]:
    family = FAMILIES[name]
    found = collect(family, modules, held_out, options.max_chars)
    rng = random.Random(f"{options.seed}:{name}")
    train = draw(found.train, family.answers, options.train, rng)
    test = draw(found.test, family.answers, options.test, rng)
    print(f"{name}: {len(train)} of {len(found.train)} for training, {len(test)} of {len(found.test)} for testing")
    if not train or not test:
        raise SystemExit(f"{name}: no lines for training or for testing; more files or larger --train and --test help")
    folder = options.out / name
    hashes = {part: write(folder / f"{part}.jsonl", lines) for part, lines in (("train", train), ("test", test))}
    return describe(train, test, found) | {"sha256": hashes}


def table(families: dict[str, dict[str, Any]]) -> str:
    rows = [f"{'family':<10}{'train':>7}{'test':>6}{'answers':>9}{'majority':>10}{'in train':>10}{'chars':>7}"]
    for name, family in families.items():
        rows.append(
            f"{name:<10}{family['train']:>7}{family['test']:>6}{family['answers']['test']:>9}"
            f"{family['majority']:>10.1%}{family['answers_in_train']:>10.1%}{family['mean_prompt_chars']:>7.0f}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the task families of the fine-tuning study.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the families and of summary.json")
    parser.add_argument("--source", default=STDLIB, help=f"'{STDLIB}', or a folder with some of its files")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the draw")
    parser.add_argument("--train", type=int, default=1200, help="lines per family to train on")
    parser.add_argument("--test", type=int, default=250, help="lines per family to test on")
    parser.add_argument("--max-chars", type=int, default=440, help="longest prompt and answer together")
    options = parser.parse_args()
    summary = build(options)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    files = summary["files"]
    print(f"\n{table(summary['families'])}\n")
    print(f"{files['train']} files for training, {files['test']} for testing, {files['unreadable']} unreadable")


if __name__ == "__main__":
    main()
