"""A folder that appears complete or not at all: filled under another name beside it, renamed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from megamoe.common.errors import DataError


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, a file beside it; the system releases it however the process ends.

    Raises:
        DataError: another process holds it.
    """
    with _sibling(target, "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{target} is being prepared by another process.", todo="wait for it to end, then start again"
            ) from error
        yield


@contextlib.contextmanager
def staged(target: Path, marker: str) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends without an error, and is removed otherwise.

    A previous `target` is replaced if it is empty or holds a file `marker`. To be used under `exclusive`.

    Raises:
        DataError: `target` holds something else, which is never removed.
    """
    if target.exists() and not (target.is_dir() and _replaceable(target, marker)):
        raise DataError(
            f"{target} exists and was not made here, so it is not replaced.",
            got=f"no {marker} in it",
            todo="remove it yourself or name another folder",
        )
    partial = _sibling(target, "partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        _replace(target, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _replaceable(target: Path, marker: str) -> bool:
    return (target / marker).is_file() or not any(target.iterdir())


def _replace(target: Path, partial: Path) -> None:
    old = _sibling(target, "old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
