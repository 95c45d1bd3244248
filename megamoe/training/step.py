"""One optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.training.engine import Engine
from megamoe.training.metrics import Accumulator, StepMetrics
from megamoe.training.setup import Runtime


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
    engine: Engine, batches: Sequence[Batch], lr_factor: float, interrupted: bool = False
) -> tuple[StepMetrics, float]:
    """Forward and backward passes, optimizer, running statistics. Collective.

    Args:
        batches: this rank's micro-batches, as many on every rank.
        lr_factor: share of the peak learning rate.
        interrupted: whether this rank was asked to stop, for all to know.

    Returns:
        What all ranks saw together, and the global gradient norm.
    """
    accumulator = Accumulator()
    grad_norm = engine.train(batches, lr_factor, accumulator.add)
    result = accumulator.reduce(engine.groups, interrupted)
    update_statistics(engine, result)
    return result, grad_norm


def update_statistics(engine: Engine, result: StepMetrics) -> None:
    """Move every router's running statistics by one optimizer step, equally on all ranks."""
    for index, router in engine.routers().items():
        if index in result.observations:
            router.update(result.observations[index])
