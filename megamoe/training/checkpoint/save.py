"""Writing a checkpoint: all ranks into one hidden folder, then the manifest, then the name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.common.errors import CheckpointError, MegamoeError
from megamoe.config import derive
from megamoe.config.load import dump_config
from megamoe.config.memory import FP32, WIDTH
from megamoe.config.run import RunConfig
from megamoe.parallel import collectives
from megamoe.parallel.shards import shards_of, whole
from megamoe.training import random_state
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.weights import save_weights
from megamoe.training.engine import Engine
from megamoe.training.run_folder import write_json
from megamoe.training.state import TrainState
from megamoe.training.trainable import frozen_patterns

ENGINE_TAG = "state"


def save_checkpoint(
    engine: Engine,
    state: TrainState,
    config: RunConfig,
    architecture: dict[str, Any],
    tokenizer: Path,
    digest: str,
) -> Path:
    """Save the run after `state.step` steps and return the checkpoint's folder. Collective.

    Raises:
        CheckpointError: it could not be written (no space, no permission); earlier checkpoints are untouched.
    """
    target = folders.incomplete_path(config.training.output_dir, state.step)
    try:
        collectives.together(lambda: _prepare(target, config, architecture["model.vocab_size"]))
        manifest = folders.Manifest(
            **asdict(state),
            architecture=architecture,
            topology=topology_of(config),
            tokenizer_digest=digest,
            files=_write(engine, target, config, tokenizer),
        )
        return collectives.together(lambda: _publish(target, manifest, config))
    except MegamoeError:  # agreed on, so no rank is writing any more
        if collectives.rank() == 0:
            folders.clear_incomplete(config.training.output_dir)
        raise


def topology_of(config: RunConfig) -> dict[str, Any]:
    """What has to be equal for DeepSpeed's own files to be loaded."""
    parallel, training = config.parallel.model_dump(), config.training
    patterns = {"trainable": list(training.trainable), "frozen": list(frozen_patterns(config))}
    offload = {name: parallel.pop(name) for name in ("offload_optimizer", "offload_parameters")}
    return {
        "world_size": collectives.world_size(),
        **parallel,
        "precision": training.precision,
        "optimizer": training.optimizer.type,
        # Checkpoints from before there was a choice name none: everything is trained there, nothing offloaded.
        **{name: value for name, value in patterns.items() if value not in (["*"], [])},
        **{name: value for name, value in offload.items() if value},
    }


def _prepare(target: Path, config: RunConfig, vocab_size: int) -> None:
    """Rank 0 makes room and checks that there is enough of it, before anything is written."""
    if collectives.rank() != 0:
        return
    try:
        folders.clear_incomplete(config.training.output_dir)
        target.mkdir(parents=True)
        free = shutil.disk_usage(target).free
    except OSError as error:
        raise _cannot_write(target, str(error)) from error
    needed = _estimate_bytes(config, vocab_size)
    if free < needed:
        raise _cannot_write(target, f"{free / 1e6:,.1f} MB free, about {needed / 1e6:,.1f} MB needed")


def _estimate_bytes(config: RunConfig, vocab_size: int) -> int:
    """Our fp32 weights, the engine's weights, its fp32 masters and two moments. Once, but the states of ZeRO 0, which
    every rank writes."""
    counts, ranks = derive.parameter_counts(config, vocab_size), collectives.world_size()
    experts, total = counts["experts"].total, counts["total"].total
    width = WIDTH[config.training.precision]
    states = 12 if width <= FP32 else 2 * width  # fp64 has no masters besides its weights
    copies = (1, 1)
    if config.parallel.zero_stage == 0:
        dense = derive.data_parallel_size(config, ranks) * config.parallel.cp
        copies = (dense, derive.expert_data_parallel_size(config, ranks))
    return total * (FP32 + width) + states * ((total - experts) * copies[0] + experts * copies[1])


def _write(engine: Engine, target: Path, config: RunConfig, tokenizer: Path) -> dict[str, folders.FileEntry]:
    """Write everything but the manifest; what was written, on every rank."""
    # One agreement per part: a rank that cannot write has passed the part's collectives when it says so.
    for part in (_write_weights, _write_engine, _write_rest):
        collectives.together(partial(_attempt, part, engine, target, config, tokenizer))
    shares = collectives.gather_objects(collectives.together(lambda: _digests(target)))
    return {name: entry for share in shares for name, entry in share.items()}


_Part = Callable[[Engine, Path, RunConfig, Path], None]


def _attempt(part: _Part, engine: Engine, target: Path, config: RunConfig, tokenizer: Path) -> None:
    try:
        part(engine, target, config, tokenizer)
    except OSError as error:
        raise _cannot_write(target, str(error)) from error
    except RuntimeError as error:  # torch's writer gives no other type, and no reason
        free = shutil.disk_usage(target).free
        raise _cannot_write(target, f"{free / 1e6:,.1f} MB free; torch says: {str(error).splitlines()[0]}") from error


def _write_weights(engine: Engine, target: Path, config: RunConfig, tokenizer: Path) -> None:
    groups = engine.groups
    stage = f"_stage{groups.pp.place}" if groups.pp.size > 1 else ""
    save_weights(
        target,
        _whole_weights(engine),
        engine.model,
        dense=groups.stage.place == 0,
        experts=groups.edp.place == 0 and groups.etp.place == 0,
        stage=stage,
    )


def _whole_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of this rank put together of the parts that other ranks hold; of experts whole ones."""
    for name, tensor in engine.full_weights():
        inner = tuple(shard for shard in shards_of(engine.parameter(name)) if shard.axis != "ep")
        yield name, whole(tensor, inner, engine.groups)


def _write_engine(engine: Engine, target: Path, config: RunConfig, tokenizer: Path) -> None:
    engine.save(target / "engine", ENGINE_TAG)


def _write_rest(engine: Engine, target: Path, config: RunConfig, tokenizer: Path) -> None:
    rank, ranks = engine.groups.rank, target / "ranks"
    ranks.mkdir(exist_ok=True)
    torch.save(random_state.get_states(), ranks / f"rank_{rank:05d}.pt")
    if rank == 0:
        write_json(target / "config.json", dump_config(config))
        shutil.copyfile(tokenizer, target / "tokenizer.model")


def _digests(target: Path) -> dict[str, folders.FileEntry]:
    """This rank's share of the files; every rank has finished writing when it is called."""
    try:
        return folders.digests(target, collectives.rank(), collectives.world_size())
    except OSError as error:
        raise _cannot_write(target, str(error)) from error


def _publish(target: Path, manifest: folders.Manifest, config: RunConfig) -> Path:
    if collectives.rank() == 0:
        checkpoint = config.training.checkpoint
        try:
            folders.publish(target, manifest)
            folders.retain(config.training.output_dir, checkpoint.keep, checkpoint.keep_every)
        except OSError as error:
            raise _cannot_write(target, str(error)) from error
    return target.with_name(folders.final_name(manifest.step))


def _cannot_write(target: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {target.name.removeprefix('.incomplete-')} could not be written",
        got=reason,
        expected=f"room and permission to write {target.parent}",
        todo="free some space and start again: the run resumes from its newest complete checkpoint",
    )
