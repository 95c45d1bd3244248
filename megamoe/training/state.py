"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TrainState:
    """After `step` optimizer steps. Everything else that moves is a function of it, or in the checkpoint's files."""

    step: int = 0
    """Steps of the run, skipped ones included."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped: int = 0
    """Steps that changed nothing, because their gradients could not be used."""
    skipped_in_row: int = 0
    """How many of these were the last ones."""
    norms: tuple[float, ...] = ()
    """Gradient norms of the last steps that counted, oldest first; finite. None where nothing is judged by them."""

    @property
    def updates(self) -> int:
        """Steps that moved the weights."""
        return self.step - self.skipped

    def advanced(self, samples: int, tokens: int) -> TrainState:
        """One optimizer step later."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
        )
