"""A model from a checkpoint folder, on any number of ranks and without an optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.data.tokenizer import Tokenizer
from megamoe.model.decoder import Decoder
from megamoe.parallel import collectives
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.weights import load_weights
from megamoe.training.setup import Runtime, placement


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and read, but whose weights are not loaded yet."""

    folder: Path
    manifest: folders.Manifest
    config: RunConfig


def open_checkpoint(path: str | Path, overrides: Sequence[str], world_size: int) -> Checkpoint:
    """Find a checkpoint and its configuration.

    Args:
        path: a checkpoint's folder, or a run's folder for its newest complete checkpoint.
        overrides: `section.field=value` over the checkpoint's configuration, for instance another data folder.
        world_size: ranks to use; the experts are spread over as many of them as divide both.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    folder = folders.locate(path)
    manifest = folders.read_manifest(folder)
    config = load_config([folder / "config.json"], overrides)
    ep = math.gcd(world_size, config.moe.num_experts) if config.moe.num_experts else 1
    alone = (f"parallel.{axis}=1" for axis in ("tp", "pp", "cp", "etp"))
    layout = (*alone, f"parallel.ep={ep}", "moe.dispatcher=auto", "moe.chunks=auto")
    return Checkpoint(folder, manifest, load_config([folder / "config.json"], [*overrides, *layout]))


def load_model(checkpoint: Checkpoint, runtime: Runtime) -> tuple[Decoder, Tokenizer]:
    """Verify the files and build the model in evaluation mode: fp32, token choice only, dropless. Collective.

    Raises:
        CheckpointError: a file is damaged or does not fit the configuration.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    collectives.together(lambda: folders.verify(folder, manifest, runtime.rank, runtime.world_size))
    model = Decoder(checkpoint.config, manifest.architecture["model.vocab_size"], placement(runtime, checkpoint.config))
    collectives.together(lambda: load_weights(folder, model))
    return model.to(runtime.device).eval().requires_grad_(False), Tokenizer(folder / "tokenizer.model")


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective."""
    if collectives.world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    return bool(collectives.all_reduce_max(value) > 0)
