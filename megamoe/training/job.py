"""One rank's training job, from what it learns to the last checkpoint: the same for every kind of training."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megamoe.common.errors import CheckpointError
from megamoe.common.log import get_logger, setup_logging
from megamoe.config.architecture import architecture
from megamoe.config.changes import changes
from megamoe.config.load import dump_config
from megamoe.config.run import RunConfig
from megamoe.model.attention import Attention
from megamoe.model.decoder import Decoder, replicated
from megamoe.model.pipeline import DecoderStage
from megamoe.moe.layer import MoELayer
from megamoe.ops.expert_ffn import EXPERT_FFN
from megamoe.ops.movement import PERMUTE_ROWS, UNPERMUTE_ROWS
from megamoe.ops.plan import PLAN
from megamoe.parallel import collectives
from megamoe.parallel.axis import axis_of
from megamoe.parallel.regions import sum_replicated_gradients
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.load import check, choose, find, load_checkpoint, remember
from megamoe.training.checkpoint.saver import Saver, topology_of
from megamoe.training.engine import Engine
from megamoe.training.interrupt import catch_signals, ignore_signals
from megamoe.training.loop import Loop, RunEnd
from megamoe.training.monitors import monitors
from megamoe.training.one_run import claimed
from megamoe.training.pipeline_engine import PipelineEngine
from megamoe.training.run_folder import MetricsFile, open_run_folder, write_config, writing
from megamoe.training.setup import Runtime, placement
from megamoe.training.slowest import Slowest, Stopwatch
from megamoe.training.state import TrainState
from megamoe.training.step import Loader
from megamoe.training.supervision import supervised
from megamoe.training.trainable import Selection, nothing_left, select_trainable

UNUSED = {
    "dropless": {"factor", "drop", "minimum", "momentum", "warmup_steps", "tile"},
    "static": {"momentum", "warmup_steps"},
    "locmoe": {"momentum", "warmup_steps"},
}
"""Per capacity mode the settings that it does not look at."""

log = get_logger("megamoe.job")


@dataclass(frozen=True)
class Job:
    """What one kind of training has of its own.

    Attributes:
        data: what is learnt.
        validate: measures on what is held out; collective.
        tokenizer: the model's, which goes into the checkpoints.
        digest: sha256 of it.
        vocab_size: rows V of the embedding.
        fill: gives a new model its weights.
        begin: called once before the first step of a run that does not resume; collective.
    """

    data: Loader
    validate: Callable[[Engine], dict[str, float]]
    tokenizer: Path
    digest: str
    vocab_size: int
    fill: Callable[[nn.Module], None]
    begin: Callable[[Engine], None] = lambda engine: None


@contextlib.contextmanager
def own_folder(config: RunConfig, runtime: Runtime) -> Iterator[Path]:
    """Rank 0 makes the run folder and owns it for the duration; every rank logs into it.

    Raises:
        FolderInUseError: another run is at work there, of which nothing is touched.
    """
    folder = Path(config.training.output_dir)

    def log_into() -> None:
        with writing(folder):
            setup_logging(runtime.rank, folder / "logs")

    with ExitStack() as stack:
        if runtime.rank == 0:
            collectives.together(lambda: stack.enter_context(claimed(open_run_folder(config))))
        else:
            collectives.together(lambda: None)
        collectives.together(log_into)
        yield folder


def carry_out(job: Job, config: RunConfig, runtime: Runtime) -> RunEnd:
    """Train, resuming from the newest complete checkpoint where the configuration says so.

    Everything that can be wrong about the checkpoint is found before the model is built.
    """
    folder, shape = Path(config.training.output_dir), architecture(config, job.vocab_size)
    with ExitStack() as stack:
        run = stack.enter_context(supervised(config.training, runtime.rank, runtime.world_size))
        resume = _find_checkpoint(config, job.digest, shape, run.pulse.tick)
        collectives.together(lambda: remember(config.training) if runtime.rank == 0 else None)
        collectives.together(lambda: write_config(config) if runtime.rank == 0 else None)
        stack.enter_context(monitors(config.training.monitor, folder / "logs"))
        run.pulse.enter("model")
        engine = build_engine(config, runtime, job.vocab_size, job.fill)
        # Each micro-batch is a sign of life, in training as in validation.
        engine.model.register_forward_pre_hook(lambda module, args: run.pulse.tick())
        run.pulse.enter("load")
        if resume is None:
            state = TrainState()
            job.begin(engine)
        else:
            state = load_checkpoint(engine, *resume, run.pulse.tick)
            log.info("resumed from %s", resume[0])
            _tell_changes(resume[0], config)
        metrics = collectives.together(lambda: MetricsFile(folder, state.step) if runtime.rank == 0 else None)
        if metrics is not None:
            stack.callback(metrics.close)

        saver = Saver(engine, config, shape, job.tokenizer, job.digest, run.pulse.tick)
        interrupt = stack.enter_context(catch_signals())
        attention = next(module for module in engine.model.modules() if isinstance(module, Attention))
        slowest = Slowest(collectives.gather_objects(socket.gethostname()), Stopwatch(attention, runtime.device))
        parts = (engine, job.data, job.validate, saver, interrupt, metrics, run.pulse, slowest)
        end = Loop(config, runtime, *parts, state).run()
        run.why = end.why
        if end.why != "finished":
            ignore_signals()
        engine.close()
    return end


def build_engine(config: RunConfig, runtime: Runtime, vocab_size: int, fill: Callable[[nn.Module], None]) -> Engine:
    """The model of this rank inside the engine, with the weights that `fill` gives it. Collective."""
    groups, place = runtime.groups, placement(runtime, config)
    if groups.pp.size > 1:
        stage = DecoderStage(config, vocab_size, place, groups.pp.place)
        _prepare(stage, config, runtime, fill)
        engine: Engine = PipelineEngine(config, stage, groups)
    else:
        model = Decoder(config, vocab_size, place)
        _prepare(model, config, runtime, fill)
        engine = Engine(config, model, groups)
    parameter = next(engine.model.parameters())
    for op in (PLAN, PERMUTE_ROWS, UNPERMUTE_ROWS, EXPERT_FFN):
        log.info("%s", op.choose(getattr(config.ops, op.key), parameter.device, parameter.dtype))
    for remark in _remarks(config, engine.model):
        log.info("%s", remark)
    return engine


def _prepare(model: nn.Module, config: RunConfig, runtime: Runtime, fill: Callable[[nn.Module], None]) -> None:
    """Weights, what of them is trained, and what tensor parallelism asks of gradients."""
    fill(model)
    own, pp = [name for name, _ in model.named_parameters()], runtime.groups.pp
    stages = collectives.gather_objects(own, pp.handle) if pp.size > 1 else [own]
    names = [name for stage in stages for name in stage]
    # Together: what is left to train can differ between stages.
    selection = collectives.together(lambda: select_trainable(model, config, names))
    if pp.size > 1:
        parts = collectives.gather_objects(selection, pp.handle)
        selection = Selection(sum(part.trained for part in parts), sum(part.total for part in parts))
        if not selection.trained:
            raise nothing_left(config)
    if selection.trained < selection.total:
        log.info("%s", selection)
    sum_replicated_gradients(replicated(model), axis_of(runtime.groups.tp))
    model.to(runtime.device)


def _remarks(config: RunConfig, model: nn.Module) -> list[str]:
    """What a user should know about the settings of routing."""
    capacity = config.moe.capacity
    unused = sorted(capacity.model_fields_set & UNUSED.get(capacity.mode, set()))
    lines = [f"moe.capacity.{name}: has no effect with mode {capacity.mode}" for name in unused]
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    return lines + (layers[0].router.remarks() if layers else [])


def check_kind(folder: Path, config: RunConfig) -> None:
    """Whether the checkpoint is of this kind of training, and of the same start: all else could be equal.

    Raises:
        CheckpointError: it is not.
    """
    finetune = _settings(folder).get("finetune")
    before = Path(finetune["checkpoint"]).resolve() if finetune else None
    now = Path(config.finetune.checkpoint).resolve() if config.finetune is not None else None
    if before != now:
        kinds = (f"fine-tuning from {path}" if path is not None else "pretraining" for path in (before, now))
        raise CheckpointError(
            f"checkpoint {folder} is of another run",
            got=f"one of {next(kinds)}",
            expected=f"one of {next(kinds)}",
            todo="choose another training.output_dir",
        )


def _tell_changes(checkpoint: Path, config: RunConfig) -> None:
    """Rank 0 says what of the configuration is not as it was."""

    def compare() -> list[str]:
        return changes(_settings(checkpoint), dump_config(config)) if collectives.rank() == 0 else []

    if changed := collectives.together(compare):
        log.warning("goes on with other settings than those of the checkpoint: %s", "; ".join(changed))


def _settings(checkpoint: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was written with."""
    try:
        settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise folders.damaged(checkpoint, f"config.json cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise folders.damaged(checkpoint, "config.json holds no configuration")
    return settings


def _find_checkpoint(
    config: RunConfig, digest: str, shape: dict[str, Any], tick: Callable[[], None]
) -> tuple[Path, folders.Manifest] | None:
    """The checkpoint to resume from, checked against this run. Rank 0 looks, so that all take the same one."""

    def fits(folder: Path, manifest: folders.Manifest) -> None:
        check_kind(folder, config)
        check(folder, manifest, shape, topology_of(config), digest)

    found = collectives.together(lambda: find(config.training) if collectives.rank() == 0 else [])
    return choose(found, fits, tick)
