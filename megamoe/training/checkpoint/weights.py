"""Weights and running statistics by global name, independent of the layout over ranks.

`dense.pt` holds everything that is equal on all ranks; `experts_<first>_<last>.pt` the stacked experts first ... last
of every MoE block. A pipeline writes such files for each of its stages. Any number of ranks can read them. Always fp32,
also of a run in bf16 or fp64, because they are for evaluation and generation; a run goes on from the engine's files,
which keep every bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from megamoe.common.errors import CheckpointError
from megamoe.model.pipeline import DecoderStage
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import WHOLE, Placement
from megamoe.parallel.shards import part, shards_of, whole_shape
from megamoe.training.checkpoint.folder import damaged

FOLDER = "weights"


def save_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    model: nn.Module,
    *,
    dense: bool,
    experts: bool,
    stage: str = "",
) -> None:
    """Write this rank's part.

    Args:
        weights: (name, tensor) of every parameter in full precision; a collective, so it is consumed on every rank.
        dense: whether this rank writes what is equal on all ranks.
        experts: whether this rank writes its experts (one rank of those that hold the same ones).
        stage: of the pipeline, as the end of the files' names; each has blocks of its own.
    """
    prefixes = _expert_prefixes(model)
    mine: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    for name, tensor in weights:
        is_expert = name.rpartition(".")[0] in prefixes
        if experts if is_expert else dense:
            mine[is_expert][name] = _portable(tensor)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    if dense:
        statistics = {name: _portable(buffer) for name, buffer in running_statistics(model).items()}
        torch.save(mine[False] | statistics, folder / FOLDER / f"dense{stage}.pt")
    if experts and mine[True]:
        layer = next(m for m in model.modules() if isinstance(m, MoELayer))
        first = layer.ep_rank * layer.num_local_experts
        last = first + layer.num_local_experts - 1
        torch.save(mine[True], folder / FOLDER / f"experts_{first:04d}_{last:04d}{stage}.pt")


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong into a checkpoint, by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill a model, or the part of one that a rank of any layout holds.

    Raises:
        CheckpointError: a file or a tensor is missing, or a shape does not fit.
    """
    place: Placement = getattr(model, "place", WHOLE)
    is_stage, own = isinstance(model, DecoderStage), model.state_dict().keys()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    target = {name: tensor for name, tensor in named.items() if name in own}
    wanted = {name for name in own if name in target and not _optional(name)}
    # At least the first one, so that its absence is what is reported.
    for file in sorted({path.name for path in (folder / FOLDER).glob("dense*.pt")}) or ["dense.pt"]:
        for name, tensor in _read(folder, file).items():
            if name in target or not (_optional(name) or is_stage):
                _copy(folder, name, target, tensor, wanted, place)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    filled: dict[str, int] = {}
    for path in sorted((folder / FOLDER).glob("experts_*.pt")) if layers else []:
        first = int(path.stem.split("_")[1])
        for name, tensor in _read(folder, path.name).items():
            layer = layers.get(name.rpartition(".experts.")[0])
            if layer is None and is_stage:
                continue
            filled[name] = filled.get(name, 0) + _copy_experts(folder, name, target, tensor, first, place)
            if filled[name] == len(target[name]):
                wanted.discard(name)
    tied = {n for n in wanted if any(target[n] is target[o] for o in target if o not in wanted)}
    if wanted - tied:
        raise damaged(folder, f"no weights for {', '.join(sorted(wanted - tied)[:3])}")


def _optional(name: str) -> bool:
    """Whether it is something that only training knows: evaluation has no use for it, and fine-tuning may train
    another way than what it starts from."""
    return ".router.broadcast." in name or ".router.bound." in name


def _copy(
    folder: Path, name: str, target: dict[str, Tensor], tensor: Tensor, wanted: set[str], place: Placement
) -> None:
    if name not in target or whole_shape(target[name], place.axes()) != tensor.shape:
        have = tuple(whole_shape(target[name], place.axes())) if name in target else "no such weight"
        raise _of_another_architecture(folder, name, tensor, have)
    target[name].copy_(part(tensor, shards_of(target[name]), place.axes()))
    wanted.discard(name)


def _copy_experts(
    folder: Path, name: str, target: dict[str, Tensor], saved: Tensor, first: int, place: Placement
) -> int:
    """Copy those of the saved experts `first` ... that this rank holds; returns how many these are."""
    parameter = target.get(name)
    if parameter is None or whole_shape(parameter, place.axes())[1:] != saved.shape[1:]:
        have = tuple(whole_shape(parameter, place.axes())) if parameter is not None else "no such weight"
        raise _of_another_architecture(folder, name, saved, have)
    mine = place.experts.rank * len(parameter)
    start, end = max(first, mine), min(first + len(saved), mine + len(parameter))
    if start < end:
        inner = tuple(shard for shard in shards_of(parameter) if shard.axis != "ep")
        parameter[start - mine : end - mine].copy_(part(saved[start - first : end - first], inner, place.axes()))
    return max(0, end - start)


def _of_another_architecture(folder: Path, name: str, saved: Tensor, have: object) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} holds weights of another architecture",
        got=f"{name}: {tuple(saved.shape)}",
        expected=f"{have}",
    )


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = torch.load(
            folder / FOLDER / name, mmap=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise damaged(folder, f"{FOLDER}/{name} cannot be read: {error}") from error
    return tensors


def _portable(tensor: Tensor) -> Tensor:
    """A copy on the CPU; fp32 where it is a floating-point number."""
    tensor = tensor.detach().cpu()
    return tensor.float().clone() if tensor.is_floating_point() else tensor.clone()


def _expert_prefixes(model: nn.Module) -> set[str]:
    return {f"{name}.experts" for name, module in model.named_modules() if isinstance(module, MoELayer)}
