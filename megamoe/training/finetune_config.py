"""The configuration of a fine-tuning run, which rests on that of the checkpoint it starts from. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamoe.common.errors import ConfigError
from megamoe.config.load import given_value, load_config
from megamoe.config.run import RunConfig
from megamoe.training.checkpoint import folder as folders


def load_finetune_config(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), start: RunConfig | None = None
) -> RunConfig:
    """The configuration of a fine-tuning run: architecture, router and data settings of the checkpoint that it starts
    from, then files and overrides.

    Args:
        start: configuration of the run to start from, in place of that in the checkpoint, which may not exist yet.

    Raises:
        ConfigError: as :func:`load_config`; there is nothing to start from or to learn; or `training.steps` is given
            besides `finetune.epochs`.
        CheckpointError: the checkpoint is missing or cannot be read.
    """
    path = given_value(paths, overrides, "finetune.checkpoint")
    if start is None and isinstance(path, str) and path:
        start = _config_of(folders.locate(path))
    config = load_config(paths, overrides, inherited(start) if start is not None else {})
    if config.finetune is None:
        raise ConfigError(
            "There is nothing to fine-tune.",
            got="no section finetune",
            expected="finetune.checkpoint to start from, and finetune.sources to learn",
            todo="add them, as in configs/finetune/gw.yaml; or pretrain with launch/pretrain.py",
        )
    if config.finetune.epochs is not None and given_value(paths, overrides, "training.steps") is not None:
        raise ConfigError(
            "The length of the run is given twice.",
            got=f"training.steps={config.training.steps}, finetune.epochs={config.finetune.epochs}",
            expected="one of them",
            todo="leave training.steps out, or set finetune.epochs=null",
        )
    return config


def inherited(start: RunConfig) -> dict[str, Any]:
    """What a fine-tuning run takes over from the run it starts from; what has its default is left out."""
    base = start.model_dump(mode="json", include={"model", "moe", "data"}, exclude_defaults=True)
    moe = base.setdefault("moe", {})
    moe["router"] = {"type": start.moe.router.type, **moe.get("router", {})}
    # How the experts are spread is this run's affair, and what was broadcast in the last one is not this one's.
    for name in ("dispatcher", "broadcast"):
        moe.pop(name, None)
    return base


def _config_of(checkpoint: Path) -> RunConfig:
    folders.read_manifest(checkpoint)  # says so if there is none
    return load_config([checkpoint / "config.json"])
