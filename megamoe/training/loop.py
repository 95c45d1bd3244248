"""The training loop: steps, metrics, validation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamoe.common.log import get_logger
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.training.engine import Engine
from megamoe.training.interrupt import Interrupt
from megamoe.training.metrics import StepMetrics
from megamoe.training.progress import ProgressLine
from megamoe.training.run_folder import MetricsFile
from megamoe.training.schedule import lr_factor
from megamoe.training.setup import Runtime
from megamoe.training.state import TrainState
from megamoe.training.step import Loader, rank_batches, train_step

log = get_logger("megamoe.loop")


@dataclass
class Loop:
    """Everything one run needs, and where it stands.

    Attributes:
        data: what is learnt.
        validate: measures on what is held out: `validation_loss` and whatever else; collective.
        save: writes a checkpoint of a state and returns its folder; collective.
        metrics: where rank 0 writes; None on the others.
    """

    config: RunConfig
    runtime: Runtime
    engine: Engine
    data: Loader
    validate: Callable[[Engine], dict[str, float]]
    save: Callable[[TrainState], Path]
    interrupt: Interrupt
    metrics: MetricsFile | None
    state: TrainState

    def run(self) -> TrainState:
        """Train from `state` to the last step, or to a request to stop; saves before it leaves."""
        training = self.config.training
        last = min(training.steps, training.stop_after_step or training.steps)
        saved_step, first = self.state.step, self.state.step
        started = time.perf_counter()
        with ProgressLine(training.steps, first, self.runtime.rank == 0) as progress:
            while self.state.step < last:
                result = self._step(progress, last, started, first)
                leaving = result.interrupted or self.state.step == last
                if self._due(training.validation.every, leaving and not result.interrupted):
                    self._validate(progress)
                if self._due(training.checkpoint.every, leaving):
                    progress.note(f"saved {self.save(self.state)}")
                    saved_step = self.state.step
                if result.interrupted:
                    progress.note(f"asked to stop: saved step {saved_step}, start again to go on")
                    break
        return self.state

    def _due(self, every: int, leaving: bool) -> bool:
        return leaving or (every > 0 and self.state.step % every == 0)

    def _step(self, progress: ProgressLine, last: int, started: float, first: int) -> StepMetrics:
        """One optimizer step and its report."""
        training, began = self.config.training, time.perf_counter()
        batches = self._batches()
        factor = lr_factor(training.schedule, self.state.step + 1, training.steps)
        result, grad_norm = train_step(self.engine, batches, factor, self.interrupt.requested)
        samples = training.global_batch_size
        self.state = self.state.advanced(samples, samples * self.config.data.seq_length)
        seconds = time.perf_counter() - began
        if self.state.step % training.log_every == 0 or self.state.step == last:
            remaining = (time.perf_counter() - started) / (self.state.step - first) * (last - self.state.step)
            self._report(progress, result, factor, grad_norm, seconds, remaining)
        return result

    def _batches(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        return rank_batches(self.data, self.config, self.runtime, self.state.consumed_samples)

    def _validate(self, progress: ProgressLine) -> None:
        """Measure on held-out data; the same every time."""
        if self.config.training.validation.batches == 0:
            return
        values = self.validate(self.engine)
        if not values:
            return
        self._write(dict(values))
        shown = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items() if "." not in name)
        progress.note(f"step {self.state.step}: {', '.join(shown)}")

    def _report(
        self,
        progress: ProgressLine,
        result: StepMetrics,
        factor: float,
        grad_norm: float,
        seconds: float,
        remaining: float,
    ) -> None:
        """One line of metrics.jsonl, one progress line, one event per scalar for the monitors."""
        values = result.scalars()
        tokens_per_second = self.config.training.global_batch_size * self.config.data.seq_length / seconds
        lr = factor * self.config.training.optimizer.lr
        drop_share = result.mean("drop_share")
        lists = {name: value.tolist() for name, value in result.values.items() if value.numel() > 1}
        self._write(
            {
                "learning_rate": lr,
                "gradient_norm": grad_norm,
                "tokens_per_second": tokens_per_second,
                "step_seconds": seconds,
                "drop_share": drop_share,
                **values,
                **lists,
            }
        )
        balance = values.get("balance_loss", 0.0)
        progress.step(
            self.state.step,
            f"loss {values['cross_entropy']:.4f}  balance {balance:.4f}  lr {lr:.2e}  grad {grad_norm:.3f}  "
            f"{tokens_per_second:,.0f} tokens/s  dropped {drop_share:.1%}",
            remaining,
        )

    def _write(self, values: dict[str, object]) -> None:
        where = {
            "step": self.state.step,
            "consumed_samples": self.state.consumed_samples,
            "consumed_tokens": self.state.consumed_tokens,
        }
        if self.metrics is not None:
            self.metrics.write(where | values)
        scalars = [(f"Train/{n}", v, self.state.step) for n, v in values.items() if isinstance(v, float)]
        self.engine.write_events(scalars)
