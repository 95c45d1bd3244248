"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """After `step` optimizer steps. Everything else that moves is a function of it, or in the checkpoint's files."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def advanced(self, samples: int, tokens: int) -> TrainState:
        """One optimizer step later."""
        return TrainState(self.step + 1, self.consumed_samples + samples, self.consumed_tokens + tokens)
