"""The house rules of the code: who imports whom, what has a single place, how long things may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((*(ROOT / "megamoe").rglob("*.py"), *(ROOT / "launch").rglob("*.py")))

# Rooms from the ground up. A room imports from itself and from lower lines, never from its neighbours.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("common",),
    ("config",),
    ("ops", "parallel", "data"),
    ("moe",),
    ("model",),
    ("training",),
    ("convert", "eval", "plan", "report"),
    ("testing",),
    ("bench",),
    ("study",),
    ("cli",),
    ("launch",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What may be used in few places only: rule -> (names it covers, beginnings of the paths where it may stand).
SINGLE_PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "torch.distributed": (
        ("torch.distributed",),
        ("megamoe/parallel/", "megamoe/moe/dispatch", "megamoe/training/setup.py", "megamoe/testing/"),
    ),
    "deepspeed": (
        ("deepspeed",),
        (
            "megamoe/moe/marker.py",
            "megamoe/training/engine.py",
            "megamoe/training/pipeline_engine.py",
            "megamoe/training/optimizer_states.py",
            "megamoe/training/workarounds.py",
            "megamoe/training/checkpoint",
            "megamoe/model/context.py",
            "megamoe/data/indexed.py",
            "megamoe/bench/",
        ),
    ),
    "environment": (("os.environ", "os.getenv", "os.putenv"), ("megamoe/common/env.py",)),
    "print": (("print",), ("megamoe/cli/", "launch/")),
}
# Rooms that answer in a blink, because they load neither of these.
LIGHT_ROOMS = ("common", "config", "plan")
HEAVY = ("torch", "deepspeed")
# Files that import the engine only inside functions, so that reading data does not cost its start.
LAZY_ENGINE = ("megamoe/data/indexed.py",)

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

# (rule, path) -> why this file may break it. An entry that nothing needs any more fails as well.
EXCEPTIONS: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Breach:
    rule: str
    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.what}"


def room_of(path: str) -> str:
    parts = Path(path).parts
    if parts[0] == "launch":
        return "launch"
    # megamoe/__init__.py holds the version and imports nothing; megamoe/__main__.py starts the command line.
    return parts[1] if len(parts) > 2 else {"__main__.py": "cli"}.get(parts[1], "common")


def imported_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions too; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def used_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every name read in code, such as ``os.environ`` or ``print``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, ast.unparse(node)


def covers(rule: str, name: str) -> bool:
    return name == rule or name.startswith(f"{rule}.")


def import_breaches(path: str, tree: ast.Module) -> Iterator[Breach]:
    room = room_of(path)
    for line, name in imported_names(tree):
        if name.startswith("."):
            yield Breach("import order", path, line, f"relative import {name}: write megamoe.…")
            continue
        other = name.split(".")[1] if name.startswith("megamoe.") else room
        if other != room and FLOOR_OF.get(other, -1) >= FLOOR_OF[room]:
            yield Breach("import order", path, line, f"{room} may not import {other}")


def place_breaches(path: str, tree: ast.Module) -> Iterator[Breach]:
    names = [*imported_names(tree), *used_names(tree)]
    for rule, (covered, places) in SINGLE_PLACES.items():
        if not path.startswith(places):
            found = {line: name for line, name in names if any(covers(each, name) for each in covered)}
            yield from (Breach(rule, path, line, f"{name}: only in {places}") for line, name in found.items())


def weight_breaches(path: str, tree: ast.Module) -> Iterator[Breach]:
    if room_of(path) in LIGHT_ROOMS:
        for line, name in imported_names(tree):
            if name.split(".")[0] in HEAVY:
                yield Breach("light rooms", path, line, f"{name} loads {name.split('.')[0]}")
    if path in LAZY_ENGINE:
        top_level = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
        for line, name in imported_names(top_level):
            if covers("deepspeed", name):
                yield Breach("lazy engine", path, line, f"{name} is imported outside a function")


def length_breaches(path: str, source: str, tree: ast.Module) -> Iterator[Breach]:
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield Breach("file length", path, lines, f"{lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
            if lines > MAX_FUNCTION_LINES:
                yield Breach("function length", path, node.lineno, f"{node.name}: {lines} lines")


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1 if ast.get_docstring(node) is not None else 0


def breaches(path: str, source: str) -> list[Breach]:
    tree = ast.parse(source)
    return [
        *import_breaches(path, tree),
        *place_breaches(path, tree),
        *weight_breaches(path, tree),
        *length_breaches(path, source, tree),
    ]


def test_the_code_keeps_the_house_rules() -> None:
    found = [
        breach
        for path in SOURCES
        for breach in breaches(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    unexcused = [str(breach) for breach in found if (breach.rule, breach.path) not in EXCEPTIONS]
    assert not unexcused, "\n" + "\n".join(unexcused)
    stale = EXCEPTIONS.keys() - {(breach.rule, breach.path) for breach in found}
    assert not stale, f"exceptions that nothing needs any more: {stale}"


def test_every_room_stands_on_a_floor() -> None:
    rooms = {path.name for path in (ROOT / "megamoe").iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= FLOOR_OF.keys()


def test_light_rooms_load_no_heavy_library() -> None:
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for room in LIGHT_ROOMS
        for path in (ROOT / "megamoe" / room).rglob("*.py")
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    "path, source, rule",
    [
        ("megamoe/common/x.py", "import megamoe.config.load", "import order"),
        ("megamoe/data/x.py", "from megamoe.parallel import topology", "import order"),
        ("megamoe/data/x.py", "from megamoe import ops", "import order"),
        ("megamoe/model/x.py", "def f():\n    from megamoe.training import loop", "import order"),
        ("megamoe/moe/x.py", "from . import types", "import order"),
        ("megamoe/cli/x.py", "import launch\nfrom megamoe.launch import y", "import order"),
        ("megamoe/__init__.py", "from megamoe.config.load import load_config", "import order"),
        ("megamoe/model/x.py", "import torch.distributed as dist", "torch.distributed"),
        ("megamoe/model/x.py", "from torch import distributed", "torch.distributed"),
        ("megamoe/model/x.py", "from torch.distributed.nn import functional", "torch.distributed"),
        ("megamoe/model/x.py", "import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("megamoe/training/loop.py", "def f():\n    import deepspeed", "deepspeed"),
        ("megamoe/training/setup.py", "from deepspeed.ops import adam", "deepspeed"),
        ("megamoe/cli/x.py", "import os\nhome = os.environ['HOME']", "environment"),
        ("launch/x.py", "from os import environ", "environment"),
        ("megamoe/training/x.py", "import os\nos.getenv('A')", "environment"),
        ("megamoe/training/loop.py", "print('step')", "print"),
        ("megamoe/training/loop.py", "show = print", "print"),
        ("megamoe/config/x.py", "import torch", "light rooms"),
        ("megamoe/common/x.py", "from deepspeed import zero", "light rooms"),
        ("megamoe/data/indexed.py", "import deepspeed.runtime", "lazy engine"),
        (
            "megamoe/data/indexed.py",
            "try:\n    import deepspeed\nexcept ImportError: pass",
            "lazy engine",
        ),
        ("megamoe/ops/x.py", "x = 1\n" * (MAX_FILE_LINES + 1), "file length"),
        ("megamoe/ops/x.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "function length"),
    ],
)
def test_a_breach_is_found(path: str, source: str, rule: str) -> None:
    assert rule in {breach.rule for breach in breaches(path, source)}


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "megamoe/training/loop.py",
            "from megamoe.moe.layer import MoELayer\nimport megamoe.common.env",
        ),
        ("megamoe/moe/dispatch/all_to_all.py", "import torch.distributed as dist"),
        ("megamoe/moe/marker.py", "from deepspeed.moe import layer"),
        ("megamoe/data/indexed.py", "def f():\n    import deepspeed"),
        ("megamoe/cli/x.py", "print(1)\nfrom megamoe.training import loop"),
        ("megamoe/__main__.py", "from megamoe.cli import main"),
        ("megamoe/model/x.py", '"""prints nothing: os.environ"""\nblueprint = footprint = 1'),
        ("megamoe/ops/x.py", 'def f():\n    """' + "words\n    " * MAX_FUNCTION_LINES + '"""\n    return 1'),
    ],
)
def test_what_is_allowed_is_not_a_breach(path: str, source: str) -> None:
    assert breaches(path, source) == []
