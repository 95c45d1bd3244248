"""The training loop: steps, metrics, validation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamoe.common.log import get_logger
from megamoe.common.main import REQUEUE as REQUEUE_CODE
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.training import guard
from megamoe.training.checkpoint.saver import Saver
from megamoe.training.engine import Engine
from megamoe.training.faulty_step import dump_step
from megamoe.training.heartbeat import Pulse
from megamoe.training.interrupt import INTERRUPTED, REQUEUE, Interrupt
from megamoe.training.metrics import StepMetrics
from megamoe.training.progress import ProgressLine
from megamoe.training.run_folder import MetricsFile
from megamoe.training.schedule import lr_factor
from megamoe.training.setup import Runtime
from megamoe.training.slowest import Slowest, of_step
from megamoe.training.state import TrainState
from megamoe.training.step import SKIPPED, Loader, rank_batches, train_step
from megamoe.training.trace import Tracer

log = get_logger("megamoe.loop")

WRITING = "writing"
Why = Literal["finished", "interrupted", "requeue"]
FINISHED: Why = "finished"


@dataclass(frozen=True)
class RunEnd:
    """Where a run stands when this job leaves it, everything saved, and why it leaves.

    Attributes:
        why: finished: the last step is done; interrupted: a person asked; requeue: a batch system asked.
    """

    state: TrainState
    why: Why

    @property
    def step(self) -> int:
        """Steps of the run."""
        return self.state.step

    @property
    def exit_code(self) -> int:
        """Of the process."""
        return REQUEUE_CODE if self.why == "requeue" else 0


@dataclass
class Loop:
    """Everything one run needs, and where it stands.

    Attributes:
        data: what is learnt.
        validate: measures on what is held out: `validation_loss` and whatever else; collective.
        saver: writes the checkpoints.
        interrupt: what this rank was asked for.
        metrics: where rank 0 writes; None on the others.
        pulse: where this rank is, for whoever waits for it.
        slowest: who was.
    """

    config: RunConfig
    runtime: Runtime
    engine: Engine
    data: Loader
    validate: Callable[[Engine], dict[str, float]]
    saver: Saver
    interrupt: Interrupt
    metrics: MetricsFile | None
    pulse: Pulse
    slowest: Slowest
    state: TrainState

    def __post_init__(self) -> None:
        training = self.config.training
        self.tracer = Tracer(training.trace_steps, Path(training.output_dir), self.engine.model, self.runtime.rank)

    def run(self) -> RunEnd:
        """Train from `state` to the last step, or to a request to stop; saves before it leaves.

        Raises:
            TrainingError: too many steps could not be used. On all ranks.
        """
        training = self.config.training
        last = min(training.steps, training.stop_after_step or training.steps)
        first, why = self.state.step, FINISHED
        started = time.perf_counter()
        with ProgressLine(training.steps, first, self.runtime.rank == 0) as progress:
            if first >= last:
                progress.note(f"nothing to do: step {first} of {last} is done; raise training.steps to go on")
            while self.state.step < last and why == FINISHED:
                result = self._step(progress, last, started, first)
                _note_saved(progress, self.saver.collect(result.flags[WRITING]))
                why = _why(result.flags) if self.state.step < last else FINISHED
                leaving = why != FINISHED or self.state.step == last
                if self._due(training.validation.every, self.state.step == last):
                    self._validate(progress)
                # Not among skipped steps: what spoilt them may be in the weights, and older ones would go for it.
                every = 0 if self.state.skipped_in_row else training.checkpoint.every
                if self._due(every, leaving):
                    self._save()
            self.pulse.enter("save")
            _note_saved(progress, self.saver.finish())
            if why != FINISHED:
                progress.note(f"asked to stop: saved step {self.state.step}, start again to go on")
            if summary := self.slowest.summary():
                progress.note(summary)
        return RunEnd(self.state, why)

    def _due(self, every: int, leaving: bool) -> bool:
        return leaving or (every > 0 and self.state.step % every == 0)

    def _step(self, progress: ProgressLine, last: int, started: float, first: int) -> StepMetrics:
        """One optimizer step and its report."""
        training, began = self.config.training, time.perf_counter()
        self.slowest.watch.begin()
        batches = self._batches()
        factor = lr_factor(training.schedule, self.state.step + 1, training.steps)
        self.pulse.enter("forward-backward")
        busy = self.slowest.watch.seconds
        with self.tracer.around(self.state.step + 1):
            result, norm = train_step(self.engine, batches, factor, self._flags, busy, self._accepts)
        samples = training.global_batch_size
        self.state = self.state.advanced(samples, samples * self.config.data.seq_length)
        self.state = guard.judged(self.state, norm, result.flags[SKIPPED], training.faults)
        self.slowest.add(result.busy_P)
        seconds = time.perf_counter() - began
        self.pulse.took(seconds)
        if self.state.step % training.log_every == 0 or self.state.step == last or result.flags[SKIPPED]:
            remaining = (time.perf_counter() - started) / (self.state.step - first) * (last - self.state.step)
            self._report(progress, result, factor, norm, seconds, remaining)
        if result.flags[SKIPPED]:
            self._after_skip(progress, batches, factor, norm)
        return result

    def _accepts(self, norm: float) -> bool:
        return guard.accepts(norm, self.state.norms, self.config.training.faults)

    def _after_skip(self, progress: ProgressLine, batches: list[Batch], factor: float, norm: float) -> None:
        """Leave what shows the skipped step again, and the run where there were too many."""
        faults = self.config.training.faults
        over, dump = guard.is_last_straw(self.state, norm, faults), None
        if faults.dump and (over or self.state.skipped_in_row == 1):
            self.pulse.enter("dump")
            dump = dump_step(self.engine, self.config, batches, factor, norm, self.state)
        where = f", see {dump}" if dump is not None else ""
        progress.note(f"step {self.state.step} skipped: gradient norm {norm:g}{where}")
        if over:
            _note_saved(progress, self.saver.finish())
            raise guard.too_many(self.state, norm, faults, dump)

    def _flags(self) -> dict[str, bool]:
        """What this rank has to tell the others after a step."""
        return {**self.interrupt.flags(), WRITING: self.saver.writing}

    def _batches(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        self.pulse.enter("data", self.state.step + 1)
        with self.slowest.watch.reading():
            return rank_batches(self.data, self.config, self.runtime, self.state.consumed_samples)

    def _save(self) -> None:
        self.pulse.enter("save")
        self.saver.save(self.state)

    def _validate(self, progress: ProgressLine) -> None:
        """Measure on held-out data; the same every time."""
        if self.config.training.validation.batches == 0:
            return
        self.pulse.enter("validate")
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
        exposed = result.exposed(seconds)
        lists = {name: value.tolist() for name, value in result.values.items() if value.numel() > 1}
        self._write(
            {
                "learning_rate": lr,
                "gradient_norm": grad_norm,
                "tokens_per_second": tokens_per_second,
                "step_seconds": seconds,
                "skipped_steps": self.state.skipped,
                **of_step(result.busy_P),
                **exposed,
                "drop_share": drop_share,
                **values,
                **lists,
            }
        )
        balance = values.get("balance_loss", 0.0)
        waiting = f"  waiting {exposed['exchange.exposed_share']:.0%}" if exposed else ""
        skipped = f"  skipped {self.state.skipped}" if self.state.skipped else ""
        progress.step(
            self.state.step,
            f"loss {values['cross_entropy']:.4f}  balance {balance:.4f}  lr {lr:.2e}  grad {grad_norm:.3f}  "
            f"{tokens_per_second:,.0f} tokens/s  dropped {drop_share:.1%}{waiting}{skipped}",
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


def _why(flags: Mapping[str, bool]) -> Why:
    """What a step's flags ask for. A person's word counts for more: launchers pass Ctrl-C on as SIGTERM as well."""
    if flags[INTERRUPTED]:
        return "interrupted"
    return "requeue" if flags[REQUEUE] else FINISHED


def _note_saved(progress: ProgressLine, folder: Path | None) -> None:
    if folder is not None:
        progress.note(f"saved {folder}")
