"""What no file of the repository may contain: paths of one machine, private hosts, stray exact versions."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Put together from pieces, so that this file passes its own test.
FOLDERS = "|".join(("work", "root", "home", "tmp", "opt"))
MACHINE_PATH = re.compile(rf"(?<![\w.$}}~-])/(?:{FOLDERS})(?:/|\b)")
OUTSIDE = re.compile(r"\.\./" + "shared|" + r"\." + "library/")
URL = re.compile(r"https?://[^\s\"'<>)\]`,;]+")
PUBLIC_HOSTS = {
    "127.0.0.1",
    "api.semanticscholar.org",
    "arxiv.org",
    "developer.nvidia.com",
    "docs.nvidia.com",
    "docs.pytorch.org",
    "download.pytorch.org",
    "github.com",
    "huggingface.co",
    "json-schema.org",
    "keepachangelog.com",
    "localhost",
    "www.w3.org",
    "pypi.org",
    "semver.org",
    "slurm.schedmd.com",
    "www.apache.org",
    "www.deepspeed.ai",
}
CONSTRAINTS = "docker/constraints.txt"
PIN = re.compile(r"\b[A-Za-z][\w.-]*(?:\[[\w,]+\])?\s*===?\s*\d+(?:\.\w+)+")
APEX = re.compile(r"""(?:^\s*|["'\s])apex\s*(?:[=<>~!]=?\s*\d|["'],?\s*$)|pip3? install[^#\n]*\bapex\b""")
DEPENDENCY_FILES = {".toml", ".txt", ".cfg", ".sh", ".yaml", ".yml", ".md", ".dockerfile", ""}


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode != 0:
        pytest.skip("not a git working tree")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def complaints(name: str, text: str) -> Iterator[str]:
    """One line per thing in ``text`` that the file ``name`` may not contain."""
    for number, line in enumerate(text.splitlines(), start=1):
        place = f"{name}:{number}: "
        if not line.startswith("#!"):
            yield from (f"{place}path of one machine: {found}" for found in MACHINE_PATH.findall(line))
        yield from (f"{place}outside the repository: {found.group()}" for found in OUTSIDE.finditer(line))
        for url in URL.findall(line):
            if "{" not in url and urlsplit(url).hostname not in PUBLIC_HOSTS:
                yield f"{place}host that PUBLIC_HOSTS does not list: {url}"
        if Path(name).suffix in DEPENDENCY_FILES and name != CONSTRAINTS:
            yield from (f"{place}exact version outside {CONSTRAINTS}: {pin}" for pin in PIN.findall(line))
            if Path(name).suffix != ".md" and APEX.search(line):
                yield f"{place}the PyPI package apex is not NVIDIA apex"


def test_the_repository_contains_nothing_of_one_machine() -> None:
    found: list[str] = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a binary file
            continue
        found += complaints(path.relative_to(ROOT).as_posix(), text)
    assert not found, "\n" + "\n".join(found)


def test_every_constraint_is_exact() -> None:
    lines = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)] == []
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins]
    assert len(names) == len(set(names))
    assert {"torch", "deepspeed"} <= set(names)
    assert "apex" not in names


@pytest.mark.parametrize(
    "name, line",
    [
        ("megamoe/x.py", 'cache = "/' + 'tmp/cache"'),
        ("README.md", "see /" + "root/notes"),
        ("configs/x.yaml", "path: /" + "home/me/data"),
        ("launch/x.sh", "cp a ../" + "shared/b"),
        ("README.md", "from https:/" + "/registry.example.internal/simple"),
        ("pyproject.toml", '"torch=' + '=2.13.0",'),
        ("launch/setup.sh", "pip install deepspeed=" + "=0.19.8"),
        ("docker/Dockerfile", "RUN pip install torch[opt] =" + "= 2.13"),
        ("pyproject.toml", '    "ap' + 'ex",'),
        ("docker/requirements.txt", "ap" + "ex>=0.1"),
        ("docker/Dockerfile", "RUN pip install ap" + "ex"),
    ],
)
def test_a_complaint_is_made(name: str, line: str) -> None:
    assert len(list(complaints(name, line))) >= 1


@pytest.mark.parametrize(
    "name, line",
    [
        ("launch/x.sh", "#!/usr/bin/env bash"),
        ("megamoe/x.py", "import tempfile  # not ./" + "tmp/x nor network/root/x"),
        ("megamoe/x.py", "if version == 2.13: pass"),
        ("docker/constraints.txt", "torch=" + "=2.13.0"),
        ("pyproject.toml", '"torch>=2.11,<2.14"'),
        ("megamoe/config/model.py", 'norm: Literal["torch", "apex"]'),
        ("README.md", "see https://arxiv.org/abs/2401.04088"),
    ],
)
def test_no_complaint_without_a_reason(name: str, line: str) -> None:
    assert list(complaints(name, line)) == []
