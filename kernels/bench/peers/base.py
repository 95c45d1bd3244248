"""What every peer is asked to do, and on which data."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.bench import draw, plain
from kernels.bench.model import Shape

TASKS: Mapping[str, str] = {
    "plan": "plan",
    "permute": "permute",
    "permute_bwd": "permute_bwd",
    "unpermute": "unpermute",
    "unpermute_weighted": "unpermute_weighted",
    "unpermute_bwd": "unpermute_bwd",
}
"""Task to the key of `model.COSTS` that is its floor. unpermute_bwd: gradients of the rows and of the weights."""


@dataclass(frozen=True)
class Work:
    """One input set.

    Attributes:
        x_TD, dout_TD: rows of tokens. y_RD, dy_RD: rows in the order of experts.
        experts_TK, weights_TK: choices. map_TE: the same as booleans. probs_TE: the weights there, 0 elsewhere.
        plan: as plain torch makes it; peers make their own.
    """

    shape: Shape
    x_TD: Tensor
    dout_TD: Tensor
    y_RD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    map_TE: Tensor
    probs_TE: Tensor
    plan: plain.Plan


def make_work(shape: Shape, device: torch.device, number: int, routing: str) -> Work:
    """Input set `number`, the same in every process."""
    stream = draw.generator(device, number)
    experts, weights = draw.choices(shape, stream, routing), draw.weights(shape, stream)
    empty = torch.zeros(shape.tokens, shape.experts, device=device)
    return Work(
        shape,
        draw.rows(shape.tokens, shape.hidden, stream),
        draw.rows(shape.tokens, shape.hidden, stream),
        draw.rows(shape.rows, shape.hidden, stream),
        experts,
        weights,
        empty.scatter(1, experts, 1.0).bool(),
        empty.scatter(1, experts, weights),
        plain.plan(experts, shape.experts),
    )


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        about: version, and what is measured of it.
        tasks: makes the calls on one input set; each returns its result. Left out: what it has no separate step for.
        notes: for a task left out, or not quite the same, why.
    """

    name: str
    about: str
    tasks: Callable[[Work], dict[str, Callable[[], Any]]]
    notes: Mapping[str, str]


def expected(work: Work) -> dict[str, Tensor]:
    """What the tasks have to return, in fp32 where rows are added up."""
    s, found = work.shape, work.plan
    weights_R = work.weights_TK.flatten()[found.source.long()]
    y32_RD = work.y_RD.float()
    return {
        "permute": plain.permute(work.x_TD, found.tokens),
        "permute_bwd": plain.unpermute(y32_RD, found.tokens, s.tokens),
        "unpermute": plain.unpermute(y32_RD, found.tokens, s.tokens),
        "unpermute_weighted": plain.unpermute_weighted(y32_RD, found.tokens, weights_R, s.tokens),
        "unpermute_bwd": plain.permute(work.dout_TD.float(), found.tokens) * weights_R[:, None],
    }


def unpacked(name: str) -> Path:
    """Folder of a wheel that the suite has unpacked for this process.

    Raises:
        ModuleNotFoundError: it was not carried along.
    """
    for entry in sys.path:
        if (Path(entry) / name).is_dir():
            return Path(entry)
    raise ModuleNotFoundError(f"{name} is neither installed nor among the wheels carried along")


def stand_in(package: str, root: Path) -> None:
    """Put empty packages in the place of a package and its parents, so that single files below them can be imported.

    Their own `__init__` would load native libraries that are not here.
    """
    parts = package.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__path__ = [str(root.joinpath(*parts[:end]))]
            sys.modules[name] = module


def distribution_version(root: Path, name: str) -> str:
    """Version of an unpacked wheel, from the name of its metadata folder."""
    folders = [path.name for path in root.glob(f"{name}-*.dist-info")]
    return folders[0].removeprefix(f"{name}-").removesuffix(".dist-info") if folders else "unknown version"
