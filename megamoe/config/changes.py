"""Which settings of a run that goes on from a checkpoint are not those that the checkpoint was written with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_HOW = (
    *("ops", "parallel", "moe.dispatcher", "moe.chunks", "data.prepared_dir", "data.num_workers", "data.tokenizer"),
    *("training.checkpoint", "training.monitor", "training.validation", "training.log_every", "training.output_dir"),
    *("training.recompute", "training.stop_after_step", "training.timeout_minutes", "training.trace_steps"),
    *(f"training.faults.{name}" for name in ("dump", "hang_minutes", "heartbeat_seconds", "max_skips")),
)
"""Sections and settings that decide how and where a run is carried out, and not what it learns. The tokenizer itself
must be the same in any case."""


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One readable part for each setting that decides what is learnt, has another value, and is there in both.

    Args:
        saved, now: as :func:`megamoe.config.load.dump_config` gives them.
    """
    before, after = dict(_flat(saved)), dict(_flat(now))
    return [
        f"{name}: {before[name]!r} -> {after[name]!r}"
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name] and not any(f"{name}.".startswith(f"{how}.") for how in _HOW)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
