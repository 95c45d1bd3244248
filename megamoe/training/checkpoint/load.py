"""Finding, checking and reading a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megamoe.common.errors import CheckpointError
from megamoe.config.architecture import differences
from megamoe.config.training import TrainingConfig
from megamoe.parallel import collectives
from megamoe.training import random_state
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.save import ENGINE_TAG
from megamoe.training.engine import Engine
from megamoe.training.state import TrainState


def find(training: TrainingConfig) -> Path | None:
    """The checkpoint that `training.checkpoint.resume` asks for; None to start afresh.

    Raises:
        CheckpointError: it asks for one and there is none, or for none and there is one.
    """
    resume, found = training.checkpoint.resume, folders.complete(training.output_dir)
    if resume not in ("auto", "must", "never"):
        return Path(resume)
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
    return found[-1] if found else None


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
    if changed := differences(manifest.topology, topology):
        raise CheckpointError(
            f"checkpoint {folder} was written by another layout",
            got="; ".join(f"{part} (checkpoint -> this run)" for part in changed),
            expected="the same ranks, parallel degrees, ZeRO stage, precision, optimizer and trained parameters",
            todo="start with the checkpoint's layout; changing it between runs is not supported yet",
        )


def load_checkpoint(engine: Engine, folder: Path, manifest: folders.Manifest) -> TrainState:
    """Restore weights, optimizer, statistics and random streams from files that were verified. Collective."""
    try:
        engine.load(folder / "engine", ENGINE_TAG)
        name = f"rank_{collectives.rank():05d}.pt"
        random_state.set_states(torch.load(folder / "ranks" / name, weights_only=True))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise folders.damaged(folder, str(error)) from error
    return TrainState(manifest.step, manifest.consumed_samples, manifest.consumed_tokens)
