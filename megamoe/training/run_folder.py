"""The run folder: config.json, metrics.jsonl, checkpoints/, logs/."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamoe.common import strict_json
from megamoe.common.errors import ConfigError
from megamoe.config.load import dump_config
from megamoe.config.run import RunConfig


def open_run_folder(config: RunConfig) -> Path:
    """Make the folder, or find it. Rank 0 does this.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = Path(config.training.output_dir)
    with writing(folder):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    return folder


def write_config(config: RunConfig) -> None:
    """Write the resolved configuration. Rank 0 does this, once nothing speaks against the start any more: a start that
    is refused leaves the configuration of the run that is there.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = Path(config.training.output_dir)
    with writing(folder):
        write_json(folder / "config.json", dump_config(config))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Whatever cannot be written below the folder becomes an error of the configuration."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            "The run folder cannot be written.",
            got=f"training.output_dir = {folder}: {error}",
            expected="a folder that can be made and written",
            todo="free some space, or choose another training.output_dir",
        ) from error


def write_json(path: Path, values: Any) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    write_bytes(path, json.dumps(values, indent=1).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write whole or not at all.

    Raises:
        ConfigError: the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path.parent), partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class MetricsFile:
    """metrics.jsonl: one JSON object per line, one line per logged step, there at once.

    A resumed run first cuts off the lines after its checkpoint's step, which it is about to write again.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self._folder, path = folder, folder / "metrics.jsonl"
        with writing(folder):
            if path.exists():
                os.truncate(path, _length_until(path, resumed_step))
            # Unbuffered: nothing that could not be written is kept back to fail once more on closing.
            self._file = path.open("ab", buffering=0)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; what is not finite in it becomes null.

        Raises:
            ConfigError: the folder cannot be written.
        """
        line = f"{strict_json.dumps(values)}\n".encode()
        with writing(self._folder):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


def _length_until(path: Path, step: int) -> int:
    """Bytes of the lines before the first one that is of a later step."""
    length = 0
    with path.open("rb") as lines:
        for line in lines:
            if _step_of(line) > step:
                break
            length += len(line)
    return length


def _step_of(line: bytes) -> float:
    """The step of a line; a line torn by a crash counts as after every step."""
    if not line.endswith(b"\n"):
        return float("inf")
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
