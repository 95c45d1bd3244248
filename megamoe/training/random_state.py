"""The global random generators of this rank: seeded at the start, saved and restored with a checkpoint.

megamoe draws from named streams (common/determinism) and never from these; a library or a user's module may.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from megamoe.common.determinism import stream_seed


def seed_all(seed: int, rank: int, step: int = 0) -> None:
    """Seed every generator, differently on every rank, and anew for a run that goes on at `step` on other ranks."""
    value = stream_seed(seed, "global", rank, *([step] if step else []))
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def get_states() -> dict[str, Any]:
    """The state of every generator, as JSON can hold it."""
    numpy = np.random.get_state(legacy=False)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def set_states(states: dict[str, Any]) -> None:
    """Restore what `get_states` returned.

    Raises:
        KeyError, TypeError, ValueError: it is not that.
    """
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**states["numpy"], "state": {**states["numpy"]["state"], "key": key}})
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
