"""Saving while a run goes on: the checkpoint of the moment, one at a time, complete or not there, failures said."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.common.errors import CheckpointError, MegamoeError
from megamoe.config import derive
from megamoe.model.initialise import initialise
from megamoe.parallel import collectives
from megamoe.parallel.groups import build_groups
from megamoe.testing import parity
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import run_ranks
from megamoe.testing.saving import saver_of
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint import saver as saving
from megamoe.training.checkpoint.folder import FileEntry
from megamoe.training.checkpoint.pieces import Piece
from megamoe.training.checkpoint.saver import Saver
from megamoe.training.engine import Engine
from megamoe.training.job import build_engine
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.state import TrainState

EP2 = ("parallel.ep=2", "parallel.zero_stage=2")


def prepared(folder: Path, *more: str) -> tuple[Engine, Saver]:
    config = tiny_config(*EP2, *more)
    groups = build_groups(topology_of(config.parallel, collectives.world_size()))
    runtime = Runtime(groups.rank, groups.topology.world_size, parity.CPU, groups)
    engine = build_engine(
        config, runtime, derive.vocab_size(config), partial(initialise, config=config.model, seed=config.training.seed)
    )
    return engine, saver_of(engine, folder)


def step(engine: Engine, number: int) -> None:
    place = engine.groups.dp
    batches = [parity.random_tokens(engine.config, number, i * place.size + place.place) for i in range(2)]
    engine.train(batches, 1.0, lambda output: None)


class Gate:
    """Lets a part of saving wait until it is opened."""

    def __init__(self, part: str) -> None:
        self.opened, self.original = threading.Event(), getattr(saving, part)
        setattr(saving, part, self)

    def __call__(self, *args: Any) -> Any:
        assert self.opened.wait(60)
        return self.original(*args)


def any_rank(flag: bool) -> bool:
    return any(collectives.gather_objects(flag))


def states(run: Path) -> dict[str, dict[str, str]]:
    """Digests of what was saved, by checkpoint."""
    return {
        path.name: {
            name: entry["sha256"] for name, entry in folders.read_manifest(path).files.items() if "state/" in name
        }
        for path in folders.complete(run)
    }


def save_behind_steps(folder: Path) -> list[object]:
    """Begin to save, take two steps, and only then let it be written."""
    engine, saver = prepared(folder)
    step(engine, 0)
    gate = Gate("write_file")
    saver.save(TrainState(1))
    seen: list[object] = [saver.writing, saver.collect(any_rank(saver.writing)), folders.complete(folder)]
    step(engine, 1)
    step(engine, 2)
    gate.opened.set()
    seen += [saver.finish(), saver.writing, saver.finish()]
    return seen


def save_at_once(folder: Path) -> Path | None:
    engine, saver = prepared(folder, "training.checkpoint.asynchronous=false")
    step(engine, 0)
    saver.save(TrainState(1))
    return saver.collect(False)


def test_it_holds_the_moment_of_the_save(tmp_path: Path) -> None:
    later, at_once = tmp_path / "later" / "run", tmp_path / "at_once" / "run"
    for seen in run_ranks(save_behind_steps, 2, later):
        assert seen == [True, None, [], later / "checkpoints" / "step_00000001", False, None]
    assert run_ranks(save_at_once, 2, at_once) == [at_once / "checkpoints" / "step_00000001"] * 2
    assert states(later) == states(at_once)


def publish_behind_a_step(folder: Path) -> list[object]:
    """All pieces are there; take a step, and only then let rank 0 write the index."""
    engine, saver = prepared(folder)
    step(engine, 0)
    gate = Gate("_write_index")
    saver.save(TrainState(1))
    assert saver._flight is not None
    assert saver._flight.thread is not None
    saver._flight.thread.join()
    seen: list[object] = [saver.collect(any_rank(saver.writing)), saver.writing, folders.complete(folder)]
    step(engine, 1)
    seen.append(saver.collect(any_rank(saver.writing)))
    gate.opened.set()
    return [*seen, saver.finish(), saver.writing, [path.name for path in folders.complete(folder)]]


def test_no_step_waits_for_rank_0_to_publish(tmp_path: Path) -> None:
    first, second = run_ranks(publish_behind_a_step, 2, tmp_path / "run")
    done = [None, tmp_path / "run" / "checkpoints" / "step_00000001", False, ["step_00000001"]]
    assert first == [None, True, [], *done]
    assert second == [None, False, [], *done]


def save_twice(folder: Path) -> list[list[str]]:
    """The second save waits for the first."""
    engine, saver = prepared(folder)
    step(engine, 0)
    gate = Gate("write_file")
    saver.save(TrainState(1))
    threading.Timer(0.2, gate.opened.set).start()
    saver.save(TrainState(2))
    seen = [[path.name for path in folders.complete(folder)], [str(saver.collect(True))[-1]]]
    saver.finish()
    return [*seen, [path.name for path in folders.complete(folder)]]


def test_one_at_a_time(tmp_path: Path) -> None:
    first, second = "step_00000001", "step_00000002"
    assert run_ranks(save_twice, 2, tmp_path / "run") == [[[first], ["1"], [first, second]]] * 2


def fail_on(folder: Path, victim: int, part: str, error: Exception) -> tuple[str, list[str], bool]:
    """A save of which one part fails on one rank, after a save that did not."""
    engine, saver = prepared(folder)
    step(engine, 0)
    saver.save(TrainState(1))
    saver.finish()
    original = getattr(saving, part)

    def fail(*args: Any) -> Any:
        if collectives.rank() == victim:
            raise error
        return original(*args)

    setattr(saving, part, fail)
    saver.save(TrainState(2))
    step(engine, 1)
    said = "nothing"
    try:
        while saver.collect(any_rank(saver.writing)) is None:
            step(engine, 2)
    except (MegamoeError, ZeroDivisionError) as caught:
        said = f"{type(caught).__name__}: {caught}"
    collectives.barrier()
    return said, [path.name for path in folders.root(folder).iterdir()], saver.writing


@pytest.mark.parametrize("victim, part", [(0, "write_file"), (1, "write_file"), (0, "_write_index")])
def test_a_failure_ends_it_on_every_rank_and_loses_nothing(tmp_path: Path, victim: int, part: str) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    first, second = run_ranks(fail_on, 2, tmp_path / "run", victim, part, error)
    assert first[0].startswith("CheckpointError: checkpoint step_00000002 could not be written")
    assert "No space left on device" in first[0]
    assert second[0].startswith("PeerError")
    assert first[1:] == second[1:] == (["step_00000001"], False)


def test_a_defect_of_ours_is_raised_where_it_is(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on, 2, tmp_path / "run", 1, "write_file", ZeroDivisionError("a defect"))
    assert first[0].startswith("PeerError: ZeroDivisionError")
    assert second[0] == "ZeroDivisionError: a defect"


def save_where_only_rank_0_looks(folder: Path) -> str:
    engine, saver = prepared(folder / f"rank_{collectives.rank()}" / "run" if collectives.rank() else folder / "run")
    step(engine, 0)
    try:
        saver.save(TrainState(1))
    except CheckpointError as error:
        return str(error)
    except MegamoeError as error:
        return type(error).__name__
    return "saved"


def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    first, second = run_ranks(save_where_only_rank_0_looks, 2, tmp_path)
    assert "rank 1 does not see the folder" in first
    assert second == "PeerError"
    assert not folders.complete(tmp_path / "run")


def test_the_state_goes_through_the_manifest_as_it_is(tmp_path: Path) -> None:
    state = replace(TrainState(7, 56, 1792), norms=(0.1, 1 / 3, 1e-300, 2.0**-1074))
    target = folders.incomplete_path(tmp_path, 7)
    target.mkdir(parents=True)
    path = folders.publish(target, folders.Manifest(state, {}, {}, "", {}))
    assert folders.read_manifest(path).state == state
    assert torch.tensor(folders.read_manifest(path).state.norms).dtype == torch.float32
