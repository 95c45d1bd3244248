"""Compiler calls, made in parallel, and once for the same inputs."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One compiler call.

    Attributes:
        name, suffix: of the output's file name.
        command: with {out} in the place of the output.
        reads: what it reads; of sources, the headers are found from them.
        versions: of compiler and torch, which decide the result beside all this.
    """

    name: str
    suffix: str
    command: tuple[str, ...]
    reads: tuple[Path, ...]
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Made:
    """What a step made, and what the compiler said about it."""

    path: Path
    log: str


class CompileFailed(Exception):
    """A compiler refused a source; the text is its command and its words."""


@dataclass(frozen=True)
class Store:
    """Outputs of steps, under names that hold the hash of everything that makes them.

    Attributes:
        folder: where they are kept.
        headers: the folders in which an #include is looked for. Headers found elsewhere are the compiler's or torch's.
    """

    folder: Path
    headers: tuple[Path, ...]

    def make_all(self, steps: Sequence[Step], jobs: int) -> list[Made | CompileFailed]:
        """Every step's output, in order; a failure does not stop the others."""
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(self._attempt, steps))

    def _attempt(self, step: Step) -> Made | CompileFailed:
        try:
            return self.make(step)
        except CompileFailed as failure:
            return failure

    def make(self, step: Step) -> Made:
        """The step's output, from an earlier run where nothing changed since.

        Raises:
            CompileFailed: the compiler's words.
        """
        path = self.folder / f"{step.name}-{self._hash(step)}{step.suffix}"
        log = path.with_name(f"{path.name}.log")
        if not (path.exists() and log.exists()):
            self.folder.mkdir(parents=True, exist_ok=True)
            _compile(step, path, log)
        return Made(path, log.read_text())

    def _hash(self, step: Step) -> str:
        digest = hashlib.sha256(repr((step.command, step.versions)).encode())
        for file in self._with_headers(step.reads):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:20]

    def _with_headers(self, files: Iterable[Path]) -> list[Path]:
        """The files, and of what they include all that is ours, in a fixed order."""
        seen: dict[Path, None] = {}
        waiting = list(files)
        while waiting:
            file = waiting.pop()
            if file in seen:
                continue
            seen[file] = None
            text = "" if file.suffix in (".o", ".so") else file.read_text(encoding="utf-8")
            for name in re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', text, re.MULTILINE):
                places = [folder / name for folder in (file.parent, *self.headers)]
                waiting += [place.resolve() for place in places if place.is_file()][:1]
        return list(seen)


def _compile(step: Step, path: Path, log: Path) -> None:
    # Under a name of its own until it is whole: two builds may run at once, and one may be interrupted.
    unfinished = path.with_name(f"{os.getpid()}-{path.name}")
    command = [part.replace("{out}", str(unfinished)) for part in step.command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        raise CompileFailed(f"{command[0]} fails for {step.name}{step.suffix}\n{shlex.join(command)}\n{done.stdout}")
    log.write_text(done.stdout, encoding="utf-8")
    os.replace(unfinished, path)
