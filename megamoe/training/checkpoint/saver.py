"""Saving a run while it goes on.

A save copies what this rank is to write into memory of its own, and a thread writes it, while the run takes its next
steps. Once all ranks have written, which they tell each other with the numbers of the step, a thread of rank 0 writes
the index of what they wrote, gives the checkpoint its manifest and its name, and deletes older ones. That takes rank 0
50 us a piece and time for the deleting, which the steps need not wait for. At most one checkpoint is being written; a
failure ends the run at the next step.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megamoe.common.errors import CheckpointError, ConfigError, MegamoeError
from megamoe.common.log import get_logger
from megamoe.config import derive
from megamoe.config.load import dump_config
from megamoe.config.memory import FP32, WIDTH
from megamoe.config.run import RunConfig
from megamoe.parallel import collectives
from megamoe.training import random_state
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.files import SUFFIX, write_file
from megamoe.training.checkpoint.index import STATE, Index
from megamoe.training.checkpoint.pieces import Piece
from megamoe.training.engine import Engine
from megamoe.training.fragments import pieces_to_write
from megamoe.training.run_folder import write_bytes, write_json
from megamoe.training.state import TrainState
from megamoe.training.trainable import frozen_patterns

RANKS = "ranks"

log = get_logger("megamoe.checkpoint")


@dataclass
class _Flight:
    """A checkpoint that is being written.

    Attributes:
        manifest: without the files.
        pieces: what this rank writes, in memory that nothing else changes.
        streams: this rank's random generators.
        files: what this rank wrote, once the thread has ended without an error.
        final: the name it gets; None until all ranks have written their pieces.
    """

    target: Path
    manifest: folders.Manifest
    pieces: list[Piece]
    streams: dict[str, Any]
    files: dict[str, folders.FileEntry] = field(default_factory=dict)
    final: Path | None = None
    error: Exception | None = None
    thread: threading.Thread | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Have a thread do it, which keeps what goes wrong for whoever asks."""

        def run() -> None:
            try:
                work()
            except OSError as error:
                self.error = _cannot_write(self.target, str(error))
            except ConfigError as error:  # of the small files
                self.error = _cannot_write(self.target, error.got)
            except Exception as error:  # a defect, or of ours: raised where the run is
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def raise_error(self) -> None:
        """What went wrong on this rank."""
        if self.error is not None:
            raise self.error


class _HostMemory:
    """Memory for what a save copies, kept for the next one, which comes when this one is written. Pinned beside a GPU,
    whose copies are several times as fast then."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copies(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with values that nothing else changes, all of them copied when it returns."""
        on_gpu = any(piece.value.is_cuda for piece in pieces)
        room = sum(_aligned(piece.value.nbytes) for piece in pieces)
        if len(self._bytes) < room:
            self._bytes = torch.empty(room, dtype=torch.uint8, pin_memory=on_gpu)
        copied, place = [], 0
        for piece in pieces:
            mine = self._bytes[place : place + piece.value.nbytes].view(piece.value.dtype).view(piece.box.shape)
            mine.copy_(piece.value, non_blocking=True)
            copied.append(replace(piece, value=mine))
            place += _aligned(piece.value.nbytes)
        if on_gpu:
            torch.cuda.synchronize()
        return copied


def _aligned(count: int) -> int:
    """Bytes up to the next place where any dtype may begin."""
    return -(-count // 16) * 16


class Saver:
    """Writes the checkpoints of a run. All methods are collective but `writing`.

    Args:
        architecture: of the model.
        tokenizer: file that goes into every checkpoint; digest: sha256 of it.
        tick: told whenever a wait for the writing has seen it get on.
    """

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        architecture: dict[str, Any],
        tokenizer: Path,
        digest: str,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._config = engine, config
        self._architecture, self._tokenizer, self._digest = architecture, tokenizer, digest
        self._writer = str(collectives.gather_objects(secrets.token_hex(4))[0])
        self._memory, self._tick = _HostMemory(), tick
        self._flight: _Flight | None = None
        self._unreported: Path | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing; no longer once it failed."""
        return self._flight is not None and self._flight.thread is not None and self._flight.thread.is_alive()

    def save(self, state: TrainState) -> None:
        """Begin to save the run as it is after `state.step` steps, when the one before is complete.

        Raises:
            CheckpointError: this one or the one before cannot be written (no space, no permission); those that are
                complete are untouched.
        """
        self._unreported = self.finish() or self._unreported
        target = folders.incomplete_path(self._config.training.output_dir, state.step, self._writer)
        self._cleaning(lambda: _prepare(target, self._config, self._architecture["model.vocab_size"]))
        manifest = folders.Manifest(
            state=state,
            architecture=self._architecture,
            topology=topology_of(self._config),
            tokenizer_digest=self._digest,
            files={},
        )
        asynchronous = self._config.training.checkpoint.asynchronous
        pieces = list(pieces_to_write(self._engine))
        if asynchronous:
            pieces = self._cleaning(lambda: collectives.together(lambda: self._memory.copies(pieces)))
        self._flight = _Flight(target, manifest, pieces, random_state.get_states())
        self._flight.begin(partial(_write, self._flight, self._config, self._tokenizer))
        if not asynchronous:
            self._unreported = self.finish()

    def collect(self, writing_anywhere: bool) -> Path | None:
        """Go on with the checkpoint that was being written, if it is; to be called after every step.

        Args:
            writing_anywhere: whether any rank said that it is `writing`, before this call and the same on all.

        Returns:
            The folder of a checkpoint that has become complete, once.

        Raises:
            CheckpointError: it could not be written, on any rank.
        """
        if self._flight is not None and not writing_anywhere:
            self._go_on(self._flight)
        published, self._unreported = self._unreported, None
        return published

    def finish(self) -> Path | None:
        """As `collect`, but wait for the writing, as long as any rank gets on with it or nobody ends it."""
        while self._flight is not None:
            self._wait_for(self._flight)
            self._go_on(self._flight)
        return self.collect(writing_anywhere=False)

    def _wait_for(self, flight: _Flight) -> None:
        before: list[int] = []
        while True:
            progress = collectives.gather_objects(self._look_at(flight))
            if not any(writing for writing, _ in progress):
                return
            if (now := [size for _, size in progress]) != before:
                self._tick()
            before = now

    def _look_at(self, flight: _Flight) -> tuple[bool, int]:
        """Whether this rank is still writing, after a second at most, and how much it has."""
        if flight.thread is not None:
            flight.thread.join(1.0)
        try:
            size = (flight.target / _state_file()).stat().st_size
        except OSError:  # not there yet; or it has its final name by now
            size = 0
        return self.writing, size

    def _go_on(self, flight: _Flight) -> None:
        """No rank is writing any more: begin to publish what they wrote; or it is published."""
        self._cleaning(lambda: collectives.together(flight.raise_error))
        if flight.final is not None:
            self._flight, self._unreported = None, flight.final
            return
        flight.final = flight.target.with_name(folders.final_name(flight.manifest.step))
        shares = collectives.gather_objects(flight.files)
        if collectives.rank() == 0:
            files = {name: entry for share in shares for name, entry in share.items()}
            flight.begin(partial(_publish, flight, files, self._config))

    def _cleaning(self, step: Callable[[], Any]) -> Any:
        """Run a step on all ranks; where one fails, none is writing any more, so what is incomplete can go."""
        try:
            return step()
        except Exception as error:
            self._flight = None
            if collectives.rank() == 0 and isinstance(error, MegamoeError):
                folders.clear_incomplete(self._config.training.output_dir)
            raise


def topology_of(config: RunConfig) -> dict[str, Any]:
    """The layout of a run, and what of it has to stay as it is: see `load.check`."""
    parallel, training = config.parallel.model_dump(), config.training
    patterns = {"trainable": list(training.trainable), "frozen": list(frozen_patterns(config))}
    return {
        "world_size": collectives.world_size(),
        **parallel,
        "precision": training.precision,
        "optimizer": training.optimizer.type,
        **patterns,
    }


def _prepare(target: Path, config: RunConfig, vocab_size: int) -> None:
    """Rank 0 makes room and checks that there is enough of it, before anything is written; every rank sees it."""

    def make() -> None:
        if collectives.rank() != 0:
            return
        try:
            folders.clear_incomplete(config.training.output_dir)
            for part in (STATE, RANKS):
                (target / part).mkdir(parents=True)
            free = shutil.disk_usage(target).free
        except OSError as error:
            raise _cannot_write(target, str(error)) from error
        needed = _estimate_bytes(config, vocab_size)
        if free < needed:
            raise _cannot_write(target, f"{free / 1e6:,.1f} MB free, about {needed / 1e6:,.1f} MB needed")

    def look() -> None:
        if not (target / STATE).is_dir():
            raise CheckpointError(
                f"rank {collectives.rank()} does not see the folder that rank 0 made for a checkpoint",
                got=f"no {target / STATE} on its machine",
                expected="a training.output_dir that all ranks share",
                todo="choose one on a file system that all nodes mount",
            )

    collectives.together(make)
    collectives.together(look)


def _estimate_bytes(config: RunConfig, vocab_size: int) -> int:
    """Master weights and two moments, once."""
    width = max(FP32, WIDTH[config.training.precision])
    return 3 * width * derive.parameter_counts(config, vocab_size)["total"].total


def _state_file() -> str:
    """What this rank writes its pieces into."""
    return f"{STATE}/rank_{collectives.rank():05d}{SUFFIX}"


def _write(flight: _Flight, config: RunConfig, tokenizer: Path) -> None:
    """Write this rank's files."""
    rank, target = collectives.rank(), flight.target
    name = _state_file()
    flight.files[name] = write_file(target / name, flight.pieces)
    flight.pieces.clear()
    streams = f"{RANKS}/rank_{rank:05d}.json"
    write_json(target / streams, flight.streams)
    flight.files[streams] = folders.describe(target / streams)
    if rank == 0:
        write_json(target / "config.json", dump_config(config))
        write_bytes(target / "tokenizer.model", tokenizer.read_bytes())


def _publish(flight: _Flight, files: dict[str, folders.FileEntry], config: RunConfig) -> None:
    """Make the checkpoint visible; and older ones go."""
    target, checkpoint = flight.target, config.training.checkpoint
    _write_index(target, [name for name in files if name.startswith(f"{STATE}/")])
    small = folders.digests(target, but=files)
    folders.publish(target, replace(flight.manifest, files={**files, **small}))
    try:
        folders.retain(config.training.output_dir, checkpoint.keep, checkpoint.keep_every)
    except OSError as error:
        log.warning("older checkpoints could not be deleted: %s", error)


def _write_index(target: Path, files: Sequence[str]) -> None:
    """From the files that the ranks say they wrote: a folder's listing may be old on a network."""
    index = Index.scan(target, files)
    try:
        index.check()
    except CheckpointError as error:  # better known now than when it is read
        raise CheckpointError(
            f"checkpoint {folders.final_name_of(target)} would not be whole",
            got=error.got,
            expected="pieces that cover every tensor once",
            todo="report this, it is a defect of megamoe; the checkpoints before it are untouched",
        ) from error
    index.write()


def _cannot_write(target: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folders.final_name_of(target)} could not be written",
        got=reason,
        expected=f"room and permission to write {target.parent}",
        todo="free some space and start again: the run resumes from its newest complete checkpoint",
    )
