"""Small checkpoints whose tensors are cut in any way, without an engine that writes them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint.boxes import Box
from megamoe.training.checkpoint.files import SUFFIX, write_file
from megamoe.training.checkpoint.index import INDEX, STATE, Index
from megamoe.training.checkpoint.pieces import Piece
from megamoe.training.state import TrainState


def example_tensors(seed: int = 0) -> dict[str, Tensor]:
    """One of every dtype and number of dims that a checkpoint may hold, with an unusual bit pattern here and there."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randn(4, 6, 5, generator=generator)
    expert[1, 2, 3], expert[2, 0, 0] = -0.0, 1e-42  # a subnormal number
    return {
        "weight/embedding.weight": torch.randn(17, 6, generator=generator),
        "weight/blocks.0.moe.experts.w1": expert,
        "exp_avg/blocks.0.moe.experts.w1": expert.double() / 3,
        "exp_avg_sq/blocks.0.moe.experts.w1": expert.square().bfloat16(),
        "step/blocks.0.moe.experts.w1": torch.tensor(7.0),
        "statistic/blocks.0.moe.router.seen": torch.arange(2**40, 2**40 + 9),
        "statistic/blocks.0.moe.router.on": torch.tensor([True, False, True]),
        "statistic/blocks.0.moe.router.none": torch.zeros(0, 4),
    }


def tile(shape: Sequence[int], num_cuts: int, draw: random.Random) -> list[Box]:
    """Boxes that tile a tensor: it is cut, and then one of its parts, and so on; fewer where none can be cut."""
    boxes = [Box.of(shape)]
    for _ in range(num_cuts):
        box = boxes.pop(draw.randrange(len(boxes)))
        boxes += _cut(box, draw)
    return boxes


def _cut(box: Box, draw: random.Random) -> list[Box]:
    dims = [dim for dim, size in enumerate(box.shape) if size > 1]
    if not dims:
        return [box]
    dim = draw.choice(dims)
    first = draw.randrange(1, box.shape[dim])
    lower = Box(box.offsets, (*box.shape[:dim], first, *box.shape[dim + 1 :]))
    further = tuple(first if other == dim else 0 for other in range(len(box.shape)))
    upper = Box(box.shifted(further).offsets, (*box.shape[:dim], box.shape[dim] - first, *box.shape[dim + 1 :]))
    return [lower, upper]


def pieces_of(tensor: str, value: Tensor, boxes: Sequence[Box]) -> Iterator[Piece]:
    """The pieces of a tensor."""
    for box in boxes:
        yield Piece(tensor, tuple(value.shape), box, value[box.slices()])


def write_state(folder: Path, tensors: Mapping[str, Tensor], num_files: int, seed: int = 0) -> dict[str, Tensor]:
    """Cut the tensors at random and deal their pieces to files in `folder`; returns the tensors."""
    draw = random.Random(seed)
    hands: list[list[Piece]] = [[] for _ in range(num_files)]
    for name, value in tensors.items():
        for piece in pieces_of(name, value, tile(value.shape, draw.randrange(8), draw)):
            draw.choice(hands).append(piece)
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    for number, hand in enumerate(hands):
        write_file(folder / STATE / f"rank_{number:05d}{SUFFIX}", hand)
    return dict(tensors)


def write_checkpoint(run: Path, step: int, tensors: Mapping[str, Tensor], num_files: int = 3, seed: int = 0) -> Path:
    """A complete checkpoint of a run that never was; returns its folder."""
    target = folders.incomplete_path(run, step)
    write_state(target, tensors, num_files, seed)
    Index.scan(target).write()
    (target / "ranks").mkdir()
    (target / "ranks" / "rank_00000.json").write_text("{}")
    (target / "config.json").write_text("{}")
    return publish(target, step)


def publish(target: Path, step: int) -> Path:
    """Give what is in an incomplete folder a manifest with its digests, right or wrong."""
    assert (target / INDEX).exists()
    manifest = folders.Manifest(
        state=TrainState(step, step * 8, step * 64),
        architecture={"model.hidden_size": 6},
        topology={"world_size": 2, "ep": 2},
        tokenizer_digest="digest",
        files=folders.digests(target),
    )
    return folders.publish(target, manifest)
