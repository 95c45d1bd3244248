"""What a run goes on from, one file per rank, for layouts that DeepSpeed's own checkpoints do not hold completely.

With tensor or pipeline parallelism beside experts, DeepSpeed writes no weights for some ranks, and the parts of one
expert under one name. So here every rank writes what it alone has: its part of the optimizer's state with the master
weights, and, once for all ranks that hold the same, weights and running statistics. For the same layout only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.moe.marker import is_expert
from megamoe.parallel.groups import Groups
from megamoe.training.checkpoint.weights import running_statistics

LEFT_OUT = ("loss_scaler", "param_slice_mappings", "zero_stage")
"""Entries of DeepSpeed's optimizer states that are objects of its own, and the same in every optimizer of the run."""


def by_rank(groups: Groups) -> bool:
    """Whether the layout is such a one."""
    return groups.tp.size * groups.etp.size * groups.pp.size > 1


def save_states(folder: Path, engine: Any, model: nn.Module, groups: Groups, zero_stage: int) -> None:
    """Write this rank's file.

    Args:
        engine: DeepSpeed's.
        model: inside of it.

    Raises:
        OSError, RuntimeError: it could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value for key, value in engine.optimizer.state_dict().items() if key not in LEFT_OUT}
    held = {name: tensor.detach() for name, tensor in _held(model, groups, zero_stage).items()}
    torch.save({"optimizer": state, "model": held}, _file(folder, groups.rank))


@torch.no_grad()
def load_states(folder: Path, engine: Any, model: nn.Module, groups: Groups, zero_stage: int) -> None:
    """Read what `save_states` wrote: this rank's file, and those of the ranks that wrote its weights.

    Raises:
        OSError, RuntimeError, KeyError: a file or an entry is missing or does not fit.
    """
    own, dense = _read(folder, groups.rank), _read(folder, groups.replica.ranks[0])["model"]
    if zero_stage < 3:
        experts = _read(folder, groups.edp.ranks[0])["model"]
        for name, parameter in model.named_parameters():
            parameter.copy_((experts if is_expert(parameter) else dense)[name])
    else:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                parameter.ds_tensor.copy_(own["model"][name])  # type: ignore[attr-defined]
    for name, buffer in running_statistics(model).items():
        buffer.copy_(dense[name])
    optimizer, state = engine.optimizer, own["optimizer"]
    if zero_stage == 0:
        optimizer.load_state_dict(state)
        return
    state["loss_scaler"] = getattr(optimizer, "loss_scaler", None)
    # It picks its own entry by its place among the data-parallel ranks.
    optimizer.load_state_dict(_Everywhere(state), load_optimizer_states=True, load_from_fp32_weights=True)


class _Everywhere(list[Any]):
    """A list that has the same entry at every place."""

    def __init__(self, entry: Any) -> None:
        super().__init__([entry])

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(0)


def _held(model: nn.Module, groups: Groups, zero_stage: int) -> dict[str, Tensor]:
    """Weights that this rank writes for all that hold the same, and running statistics."""
    held = running_statistics(model) if groups.replica.place == 0 else {}
    for name, parameter in model.named_parameters():
        if zero_stage == 3:  # the rest follows from the master weights
            if not parameter.requires_grad:
                held[name] = parameter.ds_tensor  # type: ignore[attr-defined]
        elif (groups.edp if is_expert(parameter) else groups.replica).place == 0:
            held[name] = parameter
    return held


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.pt"


def _read(folder: Path, rank: int) -> dict[str, Any]:
    states: dict[str, Any] = torch.load(_file(folder, rank), weights_only=True, mmap=True, map_location="cpu")
    return states
