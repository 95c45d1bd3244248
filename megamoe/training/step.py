"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.parallel.exchanges import NO_SECONDS, RECORD, Moment
from megamoe.training.engine import Engine
from megamoe.training.metrics import NO_FLAGS, Accumulator, StepMetrics
from megamoe.training.setup import Runtime

SKIPPED, _DONE = "skipped", "done"


class Loader(Protocol):
    """Where batches come from: pure functions of the number of samples consumed, as in `data/loader.py`."""

    def rank_batch(
        self, consumed: int, micro_step: int, dp_rank: int, dp_size: int, micro_batch_size: int, micro_steps: int
    ) -> Batch:
        """What one data-parallel rank reads in one micro-step."""
        ...


def rank_batches(data: Loader, config: RunConfig, runtime: Runtime, consumed: int) -> list[Batch]:
    """This rank's micro-batches of the optimizer step that begins after `consumed` samples."""
    dp, size = runtime.groups.dp, config.training.micro_batch_size
    steps = derive.accumulation_steps(config, runtime.world_size)
    batches = (data.rank_batch(consumed, step, dp.place, dp.size, size, steps) for step in range(steps))
    return [batch.to(runtime.device) for batch in batches]


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    lr_factor: float,
    flags: Callable[[], Mapping[str, bool]] = lambda: NO_FLAGS,
    busy: Callable[[], float] = lambda: 0.0,
    accept: Callable[[float], bool] = math.isfinite,
) -> tuple[StepMetrics, float]:
    """Forward and backward passes, optimizer, running statistics. Collective.

    Args:
        batches: this rank's micro-batches, as many on every rank.
        lr_factor: share of the peak learning rate.
        flags: what this rank has to tell all others by then; asked once the optimizer's step is done.

        busy: seconds that this rank worked, asked then as well.
        accept: whether a step of this gradient norm counts; the same answer on every rank.

    Returns:
        What all ranks saw together, with the flag SKIPPED where the step changed nothing; and the global gradient norm.
    """
    accumulator = Accumulator()
    RECORD.begin_step(batches[0].tokens_BS.is_cuda)
    complete: list[Moment] = []
    grad_norm = engine.train(batches, lr_factor, accumulator.add, lambda: complete.append(RECORD.moment()), accept)
    for begin in complete:
        RECORD.add_span("optimizer", None, "", begin)
    waited = RECORD.end_step()
    if engine.groups.experts.size > 1 and waited is not None:
        accumulator.exchanges = {index: waited.get(index, NO_SECONDS) for index in engine.routers()}
    verdict = {SKIPPED: engine.rejected, _DONE: not engine.rejected}
    result = accumulator.reduce(engine.groups, {**flags(), **verdict}, busy())
    if result.flags[SKIPPED] and result.flags.pop(_DONE):
        raise RuntimeError(f"some ranks did a step and others skipped it; here its gradient norm is {grad_norm!r}")
    if not result.flags[SKIPPED]:
        update_statistics(engine, result)
    return result, grad_norm


def update_statistics(engine: Engine, result: StepMetrics) -> None:
    """Move every router's running statistics by one optimizer step, equally on all ranks."""
    for index, router in engine.routers().items():
        if index in result.observations:
            router.update(result.observations[index])
