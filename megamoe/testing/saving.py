"""A checkpoint of an engine that a test built by itself, without a run around it."""

from __future__ import annotations

from pathlib import Path

from megamoe.config import derive
from megamoe.config.architecture import architecture
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.saver import Saver
from megamoe.training.engine import Engine
from megamoe.training.state import TrainState


def saver_of(engine: Engine, run: Path) -> Saver:
    """What saves the engine into the folder of a run. Collective."""
    training = engine.config.training.model_copy(update={"output_dir": str(run)})
    config = engine.config.model_copy(update={"training": training})
    tokenizer = run.with_name("tokenizer.model")
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_bytes(b"a tokenizer")
    return Saver(engine, config, architecture(config, derive.vocab_size(config)), tokenizer, "")


def save_now(engine: Engine, run: Path, state: TrainState) -> Path:
    """A complete checkpoint; its folder. Collective."""
    saver = saver_of(engine, run)
    saver.save(state)
    saver.finish()
    return folders.root(run) / folders.final_name(state.step)
