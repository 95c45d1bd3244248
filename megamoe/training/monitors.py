"""Weights & Biases and TensorBoard, as far as DeepSpeed's monitors leave them to us: in the run folder, and closed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamoe.common import env
from megamoe.common.errors import ConfigError
from megamoe.config.training import MonitorConfig
from megamoe.parallel import collectives


@contextmanager
def monitors(config: MonitorConfig, logs: Path) -> Iterator[None]:
    """Make sure that the engine can start the monitors that are asked for. Collective.

    Raises:
        ConfigError: a package or the login to Weights & Biases is missing.
    """
    collectives.together(lambda: _check_installed(config))
    on_rank_0 = config.wandb.enabled and collectives.rank() == 0
    collectives.together(lambda: _prepare_wandb(logs) if on_rank_0 else None)
    yield
    if on_rank_0:
        import wandb

        wandb.finish()


def _check_installed(config: MonitorConfig) -> None:
    for name, package, enabled in (
        ("tensorboard", "tensorboard", config.tensorboard),
        ("wandb.enabled", "wandb", config.wandb.enabled),
    ):
        if enabled and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"training.monitor.{name} needs the package {package}.",
                got=f"{package} is not installed",
                expected=f"an environment with {package}",
                todo=f"pip install {package}, or training.monitor.{name}=false",
            )


def _prepare_wandb(logs: Path) -> None:
    """Log in where that is needed, and have the files below the run folder instead of the working folder."""
    import wandb

    env.set_default("WANDB_DIR", str(logs.absolute()))
    try:
        if env.get("WANDB_MODE", "online") == "online":
            wandb.login()
    except wandb.errors.Error as error:
        raise ConfigError(
            "Weights & Biases cannot be used.",
            got=str(error).splitlines()[0],
            expected="a login, or WANDB_MODE=offline",
            todo="call `wandb login`, set WANDB_MODE=offline, or training.monitor.wandb.enabled=false",
        ) from error
