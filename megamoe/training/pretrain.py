"""The pretraining job of one rank, from configuration to the last checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megamoe.common.log import get_logger, setup_logging
from megamoe.config import derive
from megamoe.config.architecture import architecture
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.data.loader import BatchLoader
from megamoe.data.manifest import Manifest, check_prepared
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.moe.layer import MoELayer
from megamoe.ops.expert_ffn import EXPERT_FFN
from megamoe.parallel import collectives
from megamoe.training import random_state
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.load import check, find, load_checkpoint
from megamoe.training.checkpoint.save import save_checkpoint, topology_of
from megamoe.training.engine import Engine
from megamoe.training.interrupt import catch_signals, leave_at_once
from megamoe.training.loop import Loop
from megamoe.training.monitors import monitors
from megamoe.training.run_folder import MetricsFile, open_run_folder, write_config
from megamoe.training.setup import Runtime, distributed, expert_parallel
from megamoe.training.state import TrainState

UNUSED = {
    "dropless": {"factor", "drop", "minimum", "momentum", "warmup_steps", "tile"},
    "static": {"momentum", "warmup_steps"},
    "locmoe": {"momentum", "warmup_steps"},
}
"""Per capacity mode the settings that it does not look at."""

log = get_logger("megamoe.pretrain")


def pretrain(config: RunConfig, world_size: int) -> TrainState:
    """Train, resuming from the newest complete checkpoint where the configuration says so.

    Everything that can be wrong about configuration, data and checkpoint is found before the model is built.
    """
    check_world_size(config, world_size)
    manifest = check_prepared(config.data)
    with (
        ExitStack() as stack,
        leave_at_once(),
        distributed(config.parallel, config.training.timeout_minutes) as runtime,
    ):
        random_state.seed_all(config.training.seed, runtime.rank)
        folder = _open(config, runtime)
        vocab_size = derive.vocab_size(config, manifest.vocab_size)
        train_data, validation_data = collectives.together(lambda: _open_data(config, manifest))
        shape = architecture(config, vocab_size)
        resume = _find_checkpoint(config, manifest, shape)
        collectives.together(lambda: write_config(config) if runtime.rank == 0 else None)
        stack.enter_context(monitors(config.training.monitor, folder / "logs"))
        engine = build_engine(config, runtime, vocab_size)
        state = TrainState() if resume is None else load_checkpoint(engine, *resume)
        if resume is not None:
            log.info("resumed from %s", resume[0])
        metrics = MetricsFile(folder, state.step) if runtime.rank == 0 else None
        if metrics is not None:
            stack.callback(metrics.close)
        tokenizer = Path(config.data.prepared_dir) / "tokenizer.model"

        def save(state: TrainState) -> Path:
            return save_checkpoint(engine, state, config, shape, tokenizer, manifest.tokenizer_digest)

        interrupt = stack.enter_context(catch_signals())
        loop = Loop(config, runtime, engine, train_data, validation_data, save, interrupt, metrics, state)
        state = loop.run()
        engine.close()
    return state


def build_engine(config: RunConfig, runtime: Runtime, vocab_size: int) -> Engine:
    """The initialised model of this rank inside the engine."""
    groups = runtime.groups
    model = Decoder(config, vocab_size, expert_parallel(groups))
    initialise(model, config.model, config.training.seed)
    engine = Engine(config, model.to(runtime.device), groups)
    parameter = next(engine.model.parameters())
    log.info("%s", EXPERT_FFN.choose(config.ops.expert_ffn, parameter.device, parameter.dtype))
    for remark in _remarks(config, engine.model):
        log.info("%s", remark)
    return engine


def _remarks(config: RunConfig, model: Decoder) -> list[str]:
    """What a user should know about the settings of routing."""
    capacity = config.moe.capacity
    unused = sorted(capacity.model_fields_set & UNUSED.get(capacity.mode, set()))
    lines = [f"moe.capacity.{name}: has no effect with mode {capacity.mode}" for name in unused]
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    return lines + (layers[0].router.remarks() if layers else [])


def _open(config: RunConfig, runtime: Runtime) -> Path:
    """Rank 0 makes the run folder; then every rank logs into it."""
    collectives.together(lambda: open_run_folder(config) if runtime.rank == 0 else None)
    folder = Path(config.training.output_dir)
    setup_logging(runtime.rank, folder / "logs")
    return folder


def _open_data(config: RunConfig, manifest: Manifest) -> tuple[BatchLoader, BatchLoader]:
    seed = config.training.seed
    return BatchLoader(config.data, manifest, "train", seed), BatchLoader(config.data, manifest, "validation", seed)


def _find_checkpoint(config: RunConfig, data: Manifest, shape: dict[str, Any]) -> tuple[Path, folders.Manifest] | None:
    """The checkpoint to resume from, checked against this run. Rank 0 looks, so that all take the same one."""
    found = collectives.together(lambda: find(config.training) if collectives.rank() == 0 else None)
    folder = collectives.gather_objects(found)[0]
    if folder is None:
        return None

    def checked() -> folders.Manifest:
        manifest = folders.read_manifest(folder)
        check(folder, manifest, shape, topology_of(config), data.tokenizer_digest)
        folders.verify(folder, manifest, collectives.rank(), collectives.world_size())
        return manifest

    return folder, collectives.together(checked)
