"""Supervised fine-tuning of one rank: conversations, from the weights of a trained model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megamoe.common.errors import CheckpointError
from megamoe.common.log import get_logger
from megamoe.config.architecture import architecture, differences, network
from megamoe.config.load import changed
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.data.sft import SFTData, SFTSummary
from megamoe.data.sft_loader import SFTLoader
from megamoe.data.sft_store import open_sft, prepare_sft
from megamoe.data.tokenizer import Tokenizer
from megamoe.model.decoder import Decoder
from megamoe.parallel import collectives
from megamoe.training import random_state
from megamoe.training.calibrate import calibrate
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.weights import load_weights
from megamoe.training.engine import Engine
from megamoe.training.interrupt import leave_at_once
from megamoe.training.job import Job, carry_out, check_kind, own_folder
from megamoe.training.loop import RunEnd
from megamoe.training.run_folder import write_bytes
from megamoe.training.setup import Runtime, distributed
from megamoe.training.validation import answer_scores

log = get_logger("megamoe.finetune")


def finetune(config: RunConfig, world_size: int) -> RunEnd:
    """Fine-tune, resuming from the newest complete checkpoint of `training.output_dir` if there is one.

    Everything that can be wrong about configuration, conversations and both checkpoints is found before the model is
    built.
    """
    settings = config.finetune
    assert settings is not None, "a configuration without conversations is refused"
    start = folders.locate(settings.checkpoint)
    manifest = folders.read_manifest(start)
    with leave_at_once(), distributed(config.parallel, config.training.timeout_minutes) as runtime:
        random_state.seed_all(config.training.seed, runtime.rank)
        # Rank 0's, as the run to start from may be going on.
        start = collectives.gather_objects(start)[0]
        manifest = collectives.together(lambda: folders.read_manifest(start))
        collectives.together(lambda: _check_start(config, start, manifest, runtime))
        collectives.together(lambda: _check_folder(config) if runtime.rank == 0 else None)
        with own_folder(config, runtime) as folder:
            tokenizer = _own_tokenizer(folder, start, runtime)
            data = _open_data(config, tokenizer, folder / "data", runtime)
            config = with_steps(config, data.rows_per_epoch)
            check_world_size(config, world_size)
            train_data = SFTLoader(data, "train", config.training.seed)
            validate = partial(answer_scores, sources=_held_out(data), config=config, runtime=runtime)

            def begin(engine: Engine) -> None:
                calibrate(engine, train_data, config, runtime, data.summary.train)

            job = Job(
                data=train_data,
                validate=validate,
                tokenizer=tokenizer,
                digest=manifest.tokenizer_digest,
                vocab_size=manifest.architecture["model.vocab_size"],
                fill=partial(_fill, start),
                begin=begin,
            )
            return carry_out(job, config, runtime)


def with_steps(config: RunConfig, rows_per_epoch: int) -> RunConfig:
    """The configuration with the number of steps that `finetune.epochs` makes of the data, the last one filled up.

    Raises:
        ConfigError: a rule does not hold with it, for instance a warm-up that is as long.
    """
    settings = config.finetune
    if settings is None or settings.epochs is None:
        return config
    # Without epochs, so that the rules about the length are judged.
    known = config.model_copy(update={"finetune": settings.model_copy(update={"epochs": None})})
    known = changed(known, steps=-(-settings.epochs * rows_per_epoch // config.training.global_batch_size))
    return known.model_copy(update={"finetune": settings})


def _check_start(config: RunConfig, start: Path, manifest: folders.Manifest, runtime: Runtime) -> None:
    """Whether the checkpoint's weights fit this run."""
    wanted = network(architecture(config, manifest.architecture["model.vocab_size"]))
    if changes := differences(network(manifest.architecture), wanted):
        raise CheckpointError(
            f"checkpoint {start} is of another architecture",
            got="; ".join(f"{part} (checkpoint -> this run)" for part in changes),
            expected="the same network",
            todo="leave these settings out: they are taken from the checkpoint",
        )
    folders.verify(start, manifest, runtime.rank, runtime.world_size)


def _check_folder(config: RunConfig) -> None:
    """Whether the folder is this run's, before anything is written into it."""
    for checkpoint in folders.complete(config.training.output_dir)[-1:]:
        check_kind(checkpoint, config)


def _own_tokenizer(folder: Path, start: Path, runtime: Runtime) -> Path:
    """A copy in the run's folder, for every checkpoint to come: the start may be gone by then."""
    path = folder / "tokenizer.model"

    def copy() -> None:
        if runtime.rank == 0:
            write_bytes(path, (start / "tokenizer.model").read_bytes())

    collectives.together(copy)
    return path


def _open_data(config: RunConfig, tokenizer: Path, folder: Path, runtime: Runtime) -> SFTData:
    """Rank 0 prepares the conversations; then every rank reads them."""
    settings, training = config.finetune, config.training
    assert settings is not None

    def prepare() -> None:
        if runtime.rank == 0:
            words = (settings, Tokenizer(tokenizer), config.data.seq_length, training.seed, folder)
            under_way = bool(folders.complete(training.output_dir))
            _report(prepare_sft(*words, progress=True, under_way=under_way))

    collectives.together(prepare)
    return collectives.together(lambda: open_sft(folder))


def _report(summary: SFTSummary) -> None:
    """Say what became of every source: nothing is left out silently."""
    for source in summary.sources:
        log.info(
            "%s: %s conversations to learn with %s answer tokens, %s held out",
            source.name,
            f"{source.train.conversations:,}",
            f"{source.train.answer_tokens:,}",
            f"{source.validation.conversations:,}",
        )
        for what, listing in (
            ("bad lines left out", source.bad_lines),
            ("too long, left out", source.dropped),
            ("too long, cut", source.truncated),
        ):
            if listing.count:
                log.warning("%s: %s %s: %s", source.name, listing.count, what, "; ".join(listing.examples))
    rows = summary.train
    share = (f"{rows.rows:,}", 100 * rows.fill, 100 * rows.answer_share)
    log.info("%s rows per epoch, %.0f %% filled, %.0f %% learnt", *share)


def _held_out(data: SFTData) -> dict[str, SFTLoader]:
    """A loader for each source that has something held out."""
    names = [source.name for source in data.summary.sources if source.validation.conversations]
    return {name: SFTLoader(data, "validation", 0, name) for name in names}


def _fill(start: Path, model: Decoder) -> None:
    collectives.together(lambda: load_weights(start, model))
