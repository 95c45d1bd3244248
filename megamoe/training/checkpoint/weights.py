"""Weights and running statistics of a checkpoint alone, for what does not go on training: evaluation, generation, the
start of a fine-tuning; on any layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from megamoe.common.errors import CheckpointError
from megamoe.model.pipeline import DecoderStage
from megamoe.moe.placement import WHOLE, Placement
from megamoe.parallel.shards import place_of
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.folder import damaged
from megamoe.training.checkpoint.pieces import STATISTIC, WEIGHT, split_name, tensor_name
from megamoe.training.checkpoint.reader import Reader


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong into a checkpoint, by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill a model, or the part of one that a rank of any layout holds, in its own precision.

    Raises:
        CheckpointError: a file or a tensor is missing, or a shape does not fit.
    """
    place: Placement = getattr(model, "place", WHOLE)
    reader, axes = Reader(folder), place.axes()
    targets: dict[str, Tensor] = {tensor_name(WEIGHT, name): p for name, p in model.named_parameters()}
    targets |= {tensor_name(STATISTIC, name): buffer for name, buffer in running_statistics(model).items()}
    _check_names(reader, targets, model)
    for tensor, target in targets.items():
        if not reader.has(tensor):
            continue
        whole, offsets = place_of(target, tuple(target.shape), axes)
        saved = reader.index.tensors[tensor].shape
        if saved != whole:
            raise _of_another_architecture(folder, tensor, saved, whole)
        target.copy_(reader.read(tensor, Box(offsets, tuple(target.shape))))


def _check_names(reader: Reader, targets: dict[str, Tensor], model: nn.Module) -> None:
    """Whether checkpoint and model have the same tensors; a stage of a pipeline has some of them."""
    for tensor in targets:
        if not reader.has(tensor) and not _optional(tensor):
            raise damaged(reader.folder, f"no {' '.join(split_name(tensor))} in it")
    if isinstance(model, DecoderStage):
        return
    for kind in (WEIGHT, STATISTIC):
        for name in reader.names(kind):
            tensor = tensor_name(kind, name)
            if tensor not in targets and not _optional(tensor):
                saved = reader.index.tensors[tensor].shape
                raise _of_another_architecture(reader.folder, tensor, saved, "nothing of that name")


def _optional(tensor: str) -> bool:
    """Whether it is something that only training knows: evaluation has no use for it, and fine-tuning may train
    another way than what it starts from."""
    return ".router.broadcast." in tensor or ".router.bound." in tensor


def _of_another_architecture(folder: Path, tensor: str, saved: tuple[int, ...], have: object) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} holds weights of another architecture",
        got=f"{split_name(tensor)[1]}: {saved}",
        expected=f"{have}",
    )
