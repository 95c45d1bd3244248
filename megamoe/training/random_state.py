"""The global random generators of this rank: seeded at the start, saved and restored with a checkpoint.

megamoe draws from named streams (common/determinism) and never from these; a library or a user's module may.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from megamoe.common.determinism import stream_seed


def seed_all(seed: int, rank: int) -> None:
    """Seed every generator, differently on every rank."""
    value = stream_seed(seed, "global", rank)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def get_states() -> dict[str, Any]:
    """The state of every generator, of plain types and tensors."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy = np.random.get_state(legacy=False)
    states["numpy"] = {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_states(states: dict[str, Any]) -> None:
    """Restore what `get_states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**states["numpy"], "state": {**states["numpy"]["state"], "key": key}})
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
