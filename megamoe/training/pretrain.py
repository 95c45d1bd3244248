"""The pretraining job of one rank."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megamoe.config import derive
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.data.loader import BatchLoader
from megamoe.data.manifest import TOKENIZER, Manifest, check_prepared
from megamoe.model.initialise import initialise
from megamoe.parallel import collectives
from megamoe.training import random_state
from megamoe.training.interrupt import leave_at_once
from megamoe.training.job import Job, carry_out, own_folder
from megamoe.training.loop import RunEnd
from megamoe.training.setup import distributed
from megamoe.training.validation import mean_loss


def pretrain(config: RunConfig, world_size: int) -> RunEnd:
    """Train, resuming from the newest complete checkpoint where the configuration says so.

    Everything that can be wrong about configuration, data and checkpoint is found before the model is built.
    """
    check_world_size(config, world_size)
    manifest = check_prepared(config.data)
    with leave_at_once(), distributed(config.parallel, config.training.timeout_minutes) as runtime:
        random_state.seed_all(config.training.seed, runtime.rank)
        with own_folder(config, runtime):
            train_data, validation_data = collectives.together(lambda: _open_data(config, manifest))
            job = Job(
                data=train_data,
                validate=partial(mean_loss, data=validation_data, config=config, runtime=runtime),
                tokenizer=Path(config.data.prepared_dir) / TOKENIZER,
                digest=manifest.tokenizer_digest,
                vocab_size=derive.vocab_size(config, manifest.vocab_size),
                fill=partial(initialise, config=config.model, seed=config.training.seed),
            )
            return carry_out(job, config, runtime)


def _open_data(config: RunConfig, manifest: Manifest) -> tuple[BatchLoader, BatchLoader]:
    seed = config.training.seed
    return BatchLoader(config.data, manifest, "train", seed), BatchLoader(config.data, manifest, "validation", seed)
