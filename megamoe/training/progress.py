"""The progress line of rank 0."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressLine:
    """A live bar on a terminal; one plain line per logged step elsewhere (a log file, a batch job)."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._shown, self._total = shown, total
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if shown and self._console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn())
            self._progress = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._progress.add_task("train", total=total, completed=done, text="")

    def __enter__(self) -> ProgressLine:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, step: int, text: str, eta_seconds: float) -> None:
        """Show a step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        elif self._shown:
            self._console.out(f"step {step}/{self._total}  {text}  ETA {_clock(eta_seconds)}", highlight=False)

    def note(self, text: str) -> None:
        """A line of its own: a validation, a checkpoint."""
        if self._shown:
            (self._progress.console if self._progress is not None else self._console).out(text, highlight=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
