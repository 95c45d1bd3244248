"""Finding, checking and reading a checkpoint to go on from, on any layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megamoe.common.errors import CheckpointError, DamagedCheckpointError
from megamoe.common.log import get_logger
from megamoe.config.architecture import differences
from megamoe.config.problems import nearest
from megamoe.config.training import TrainingConfig
from megamoe.parallel import collectives
from megamoe.training import random_state
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.reader import Reader
from megamoe.training.checkpoint.saver import RANKS
from megamoe.training.engine import Engine
from megamoe.training.fragments import restore
from megamoe.training.state import TrainState

WORDS = ("auto", "must", "never")
"""What `training.checkpoint.resume` may say besides a path."""
KEPT = ("precision", "optimizer", "trainable", "frozen")
"""What of the layout that wrote a checkpoint a run that goes on from it has to keep."""

Check = Callable[[Path, folders.Manifest], None]

log = get_logger("megamoe.checkpoint")


def find(training: TrainingConfig) -> list[Path]:
    """The checkpoints that `training.checkpoint.resume` asks for, the newest first; none to start afresh.

    Raises:
        CheckpointError: it asks for one and there is none, or for none and there is one.
    """
    resume = training.checkpoint.resume
    folders.recover(training.output_dir)
    found = folders.complete(training.output_dir)
    if resume not in WORDS:
        _check_word(resume)
        return found[::-1] if found and _has_begun(training) else [folders.locate(resume)]
    if resume == "never" and found:
        raise CheckpointError(
            f"{training.output_dir} holds checkpoints already",
            got=f"training.checkpoint.resume=never and {found[-1]}",
            expected="an output_dir without checkpoints",
            todo="choose another training.output_dir, or resume with training.checkpoint.resume=auto",
        )
    if resume == "must" and not found:
        raise CheckpointError(
            f"there is no complete checkpoint in {folders.root(training.output_dir)}",
            got="training.checkpoint.resume=must",
            expected="at least one complete checkpoint",
            todo="check training.output_dir, or start with training.checkpoint.resume=auto",
        )
    return found[::-1]


def _check_word(resume: str) -> None:
    if (near := nearest(resume, WORDS)) and not Path(resume).exists():
        raise CheckpointError(
            "training.checkpoint.resume is neither one of its words nor a folder",
            got=resume,
            expected=f"{', '.join(WORDS)}, or the folder of a checkpoint",
            todo=f"did you mean {near}?",
        )


def _has_begun(training: TrainingConfig) -> bool:
    """Whether a run that is to begin at a certain checkpoint did so before: it is the same command again."""
    asked = Path(training.checkpoint.resume)
    if _is_own(asked, training):
        return goes_back(training) is None
    return (asked / folders.MANIFEST).is_file()  # else it is a slip of the pen


def _is_own(checkpoint: Path, training: TrainingConfig) -> bool:
    return checkpoint.resolve().parent == folders.root(training.output_dir).resolve()


def goes_back(training: TrainingConfig) -> Path | None:
    """The checkpoint of this same run that it is told to go back to, and has not yet."""
    asked = Path(training.checkpoint.resume)
    if training.checkpoint.resume in WORDS or not _is_own(asked, training):
        return None
    return asked if folders.went_back_to(training.output_dir) != asked.name else None


def remember(training: TrainingConfig) -> None:
    """Note on the disk where the run begins, once nothing speaks against it. Rank 0 does this."""
    if (back := goes_back(training)) is not None:
        folders.go_back(training.output_dir, back)
    elif training.checkpoint.resume in WORDS:
        folders.go_back(training.output_dir, None)


def choose(
    found: Sequence[Path], check_it: Check, tick: Callable[[], None] = lambda: None
) -> tuple[Path, folders.Manifest] | None:
    """The first of the checkpoints that is sound, with its manifest. Collective.

    Those before it are set aside under another name, so that they neither count as kept nor come up again.

    Args:
        found: on rank 0; the others' do not count.
        check_it: whether the run can go on from it; for the reasons other than damage that raise.
        tick: told as long as any rank gets on.

    Raises:
        CheckpointError: `check_it` says so, or none of them is sound.
    """
    broken: dict[Path, DamagedCheckpointError] = {}
    for folder in collectives.gather_objects(list(found))[0]:
        looked = collectives.gather_objects(_looked(folder, check_it, tick))
        damage = next((one for one in looked if isinstance(one, DamagedCheckpointError)), None)
        if damage is None:
            _set_aside(broken, folder)
            return folder, looked[collectives.rank()]  # type: ignore[return-value]
        broken[folder] = damage
    if broken:
        collectives.together(lambda: _fail(_none_is_sound(broken)))
    return None


def _looked(folder: Path, check_it: Check, tick: Callable[[], None]) -> folders.Manifest | DamagedCheckpointError:
    def look(progress: Callable[[], None]) -> folders.Manifest | DamagedCheckpointError:
        try:
            manifest = folders.read_manifest(folder)
            check_it(folder, manifest)
            folders.verify(folder, manifest, collectives.rank(), collectives.world_size(), progress)
        except DamagedCheckpointError as damage:
            return damage
        return manifest

    return collectives.together_at_length(look, tick)


def _none_is_sound(broken: Mapping[Path, DamagedCheckpointError]) -> CheckpointError:
    first, *others = broken.values()
    if not others:
        return first
    return DamagedCheckpointError(
        f"none of the {len(broken)} checkpoints is sound",
        got="; ".join(f"{folder}: {damage.got}" for folder, damage in broken.items()),
        expected="files as written",
        todo="bring one back from a copy, or move them away to start again",
    )


def _fail(error: Exception) -> None:
    raise error


def _set_aside(broken: Mapping[Path, DamagedCheckpointError], sound: Path) -> None:
    for folder, damage in broken.items():
        log.warning("%s: %s; going on from %s", damage.what, damage.got, sound)
        collectives.together(partial(folders.set_aside, folder) if collectives.rank() == 0 else _nothing)


def _nothing() -> None:
    pass


def check(
    folder: Path,
    manifest: folders.Manifest,
    architecture: dict[str, Any],
    topology: dict[str, Any],
    digest: str,
) -> None:
    """Whether this run can go on from the checkpoint.

    Raises:
        CheckpointError: other architecture, tokenizer or layout.
    """
    if changed := differences(manifest.architecture, architecture):
        raise CheckpointError(
            f"checkpoint {folder} is of another architecture",
            got="; ".join(f"{part} (checkpoint -> this run)" for part in changed),
            expected="the same network",
            todo="restore these settings, or choose another training.output_dir",
        )
    if manifest.tokenizer_digest != digest:
        raise CheckpointError(
            f"checkpoint {folder} was trained with another tokenizer",
            got=f"tokenizer {digest[:12]}",
            expected=f"tokenizer {manifest.tokenizer_digest[:12]}, as in {folder}/tokenizer.model",
            todo="prepare the data with data.tokenizer.path set to that file",
        )
    kept = {name: (manifest.topology.get(name), topology[name]) for name in KEPT}
    if changed := [f"{name}: {before} -> {now}" for name, (before, now) in kept.items() if before != now]:
        raise CheckpointError(
            f"checkpoint {folder} was trained another way",
            got="; ".join(f"{part} (checkpoint -> this run)" for part in changed),
            expected="the same precision, optimizer and trained parameters; everything else of the layout may differ",
            todo="restore these settings, or start a new run from its weights",
        )


def load_checkpoint(
    engine: Engine, folder: Path, manifest: folders.Manifest, tick: Callable[[], None] = lambda: None
) -> TrainState:
    """Restore weights, optimizer, statistics and random streams from files that were verified. Collective.

    Args:
        tick: told as long as any rank gets on.
    """
    restore(engine, collectives.together(lambda: Reader(folder)), manifest.state.updates, tick)
    collectives.together(lambda: _restore_streams(engine, folder, manifest))
    return manifest.state


def _restore_streams(engine: Engine, folder: Path, manifest: folders.Manifest) -> None:
    """Each rank's own, if there are as many ranks as there were; else new ones, since there is nothing to continue."""
    ranks = manifest.topology.get("world_size")
    if ranks != collectives.world_size():
        log.info("random generators start anew: the checkpoint has those of %s ranks", ranks)
        random_state.seed_all(engine.config.training.seed, collectives.rank(), manifest.step)
        return
    path = folder / RANKS / f"rank_{collectives.rank():05d}.json"
    try:
        random_state.set_states(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise folders.damaged(folder, f"{path.name} cannot be read: {error}") from error
