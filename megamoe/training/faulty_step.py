"""What is left of a skipped step, so that a person can see it again.

    <output_dir>/faults/step_00000012/
        step.json                   norms, samples, the checkpoint before it and the command that replays it (as long as
                                    that checkpoint is kept; on several machines with their launcher)
        config.json                 the run's configuration
        rank_00000.json             gradient norm of every parameter, and which are not finite
        rank_00000.safetensors      the micro-batches

The gradients are gone when the step is judged, so it is done a second time, rejected from the start. Its norm may then
be another one: a run on sound machines gives the same bits again.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.common.log import get_logger
from megamoe.config.load import dump_config
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.training import random_state
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.files import SUFFIX, write_file
from megamoe.training.checkpoint.pieces import Piece
from megamoe.training.engine import Engine
from megamoe.training.state import TrainState

CONFIG = "config.json"

log = get_logger("megamoe.faults")


def dump_step(
    engine: Engine, config: RunConfig, batches: Sequence[Batch], factor: float, norm: float, state: TrainState
) -> Path:
    """Write the folder of the step that was just skipped, and return it. Collective.

    A rank that cannot write says so and goes on: the run does not depend on it.

    Args:
        batches: this rank's micro-batches of the step.
        factor: share of the peak learning rate.
        norm: the gradient norm that it was skipped for.
        state: after the step.
    """
    folder = Path(config.training.output_dir) / "faults" / folders.final_name(state.step)
    gradients, again = _once_more(engine, batches, factor)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_rank(folder, engine.groups.rank, gradients, batches)
        if engine.groups.rank == 0:
            _write_json(folder / CONFIG, dump_config(config))
            norms = {"gradient_norm": _plain(norm), "gradient_norm_again": _plain(again), "norms_before": state.norms}
            _write_json(folder / "step.json", {**norms, **_circumstances(folder, config, state, engine)})
    except OSError as error:
        log.warning("the skipped step %s could not be written to %s: %s", state.step, folder, error)
    return folder


def _once_more(engine: Engine, batches: Sequence[Batch], factor: float) -> tuple[dict[str, Tensor], float]:
    """Norm and number of values that are not finite of every gradient, [2] fp64; and the global norm."""
    found: dict[str, Tensor] = {}

    def look() -> None:
        for name, gradient in engine.full_gradients():
            finite = gradient.isfinite()
            found[name] = torch.stack([torch.linalg.vector_norm(gradient.double()), (~finite).sum().double()]).cpu()

    streams = random_state.get_states()
    norm = engine.train(batches, factor, lambda output: None, look, lambda norm: False)
    random_state.set_states(streams)
    return found, norm


def _write_rank(folder: Path, rank: int, gradients: dict[str, Tensor], batches: Sequence[Batch]) -> None:
    norms = {name: _plain(float(values[0])) for name, values in gradients.items()}
    wrong = {name: int(values[1]) for name, values in gradients.items() if values[1] > 0}
    _write_json(folder / f"rank_{rank:05d}.json", {"not_finite": wrong, "gradient_norms": norms})
    tensors = (
        (f"micro_batch_{number}.{name}", value)
        for number, batch in enumerate(batches)
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor)
    )
    pieces = [Piece(name, tuple(value.shape), Box.of(tuple(value.shape)), value) for name, value in tensors]
    write_file(folder / f"rank_{rank:05d}{SUFFIX}", pieces)


def _circumstances(folder: Path, config: RunConfig, state: TrainState, engine: Engine) -> dict[str, Any]:
    training, ranks = config.training, engine.groups.topology.world_size
    before = [path for path in folders.complete(training.output_dir) if (folders.step_of(path) or 0) < state.step]
    resume = [f"training.checkpoint.resume={before[-1]}"] if before else []
    script = "pretrain" if config.finetune is None else "finetune"
    stop = [f"training.stop_after_step={state.step}", f"training.output_dir={folder / 'replay'}"]
    words = [f"launch/{script}.py", "--config", str(folder / CONFIG), *resume, *stop]
    return {
        "step": state.step,
        "samples": [state.consumed_samples - training.global_batch_size, state.consumed_samples],
        "skipped_in_row": state.skipped_in_row,
        "checkpoint_before": str(before[-1]) if before else None,
        "replay": shlex.join(["torchrun", "--nproc-per-node", str(ranks), *words]),
        "ranks": ranks,
    }


def _plain(value: float) -> float | str:
    """JSON has no words for infinity and NaN."""
    return value if math.isfinite(value) else str(value)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(f"{json.dumps(values, indent=1, allow_nan=False)}\n", encoding="utf-8")
