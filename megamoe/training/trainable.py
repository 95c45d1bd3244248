"""Which parameters are trained, by patterns over their global names."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from megamoe.common.errors import ConfigError
from megamoe.config.run import RunConfig
from megamoe.moe.routers.base import Router
from megamoe.parallel.shards import shards_of

ROUTERS = "*.ffn.router.*"
"""The parameters of all routers."""


@dataclass(frozen=True)
class Selection:
    """How many scalars are trained, of how many; parts on all ranks counted."""

    trained: int
    total: int

    def __str__(self) -> str:
        return f"training {self.trained:,} of {self.total:,} parameters ({self.trained / self.total:.1%})"


def select_trainable(model: nn.Module, config: RunConfig, names: list[str] | None = None) -> Selection:
    """Set `requires_grad` of every parameter, and `frozen` of routers that lose all theirs.

    A parameter is trained if it matches one of `training.trainable` and none of `training.frozen`. Call it before the
    optimizer is built. Names are those of `named_parameters`, so a tied head is the embedding.

    Args:
        names: of all parameters, where the model is a part of the whole; None: it is the whole.

    Raises:
        ConfigError: a pattern matches no parameter, or no parameter is left to train.
    """
    training, names = config.training, names or [name for name, _ in model.named_parameters()]
    _check_patterns("training.trainable", training.trainable, names)
    _check_patterns("training.frozen", training.frozen, names)
    frozen = frozen_patterns(config)
    trained = total = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_matches(name, training.trainable) and not _matches(name, frozen))
        degrees = (getattr(config.parallel, shard.axis) for shard in shards_of(parameter))
        size = math.prod(degrees, start=parameter.numel())
        total, trained = total + size, trained + size * parameter.requires_grad
    whole = {name for name, _ in model.named_parameters()}.issuperset(names)
    if not trained and whole:  # of a part of a model, only the whole can tell
        raise nothing_left(config)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        own = list(router.parameters())
        # One without parameters is frozen where that is asked for by name; no pattern can.
        asked = config.moe.broadcast is not None and config.moe.broadcast.freeze_router
        router.frozen = asked or (bool(own) and not any(parameter.requires_grad for parameter in own))
    return Selection(trained, total)


def nothing_left(config: RunConfig) -> ConfigError:
    """The error where no parameter of the whole model is trained."""
    return ConfigError(
        "No parameter is left to train.",
        got=f"training.trainable={list(config.training.trainable)}, frozen: {list(frozen_patterns(config))}",
        expected="at least one parameter that matches the first and none of the second",
        todo="take a pattern out of training.frozen, or choose others in training.trainable",
    )


def frozen_patterns(config: RunConfig) -> tuple[str, ...]:
    """`training.frozen`, and all routers where broadcasting freezes them."""
    broadcast = config.moe.broadcast
    implied = (ROUTERS,) if broadcast is not None and broadcast.freeze_router else ()
    return (*config.training.frozen, *implied)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(field: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"A pattern of {field} matches no parameter.",
                got=pattern,
                expected=f"a pattern of parameter names, such as {', '.join(_nearest(pattern, names))}",
                todo="correct it; * stands for any text, and a tied output head is embedding.weight",
            )


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """The names most like the pattern, each written once for all blocks."""
    kinds = list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))
    return difflib.get_close_matches(pattern, kinds, n=4, cutoff=0.0)
