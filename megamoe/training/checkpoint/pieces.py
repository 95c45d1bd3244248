"""Pieces: what is stored of a checkpoint's tensors.

A tensor of a checkpoint is called `<kind>/<global name of the parameter or buffer>` and has the shape of the whole over
all ranks (of experts: all E of them in dim 0). Its pieces tile it; who wrote them, in which layout, does not matter.

    weight           the master weight where there is one, else the weight itself
    exp_avg, exp_avg_sq, momentum_buffer, ...   what the optimizer keeps of a weight, of the same shape
    statistic        buffers of the routers
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megamoe.training.checkpoint.boxes import Box

WEIGHT, STATISTIC = "weight", "statistic"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor with its values.

    Raises:
        ValueError: the values are not of the box, or the box is not of the tensor.
    """

    tensor: str
    whole: tuple[int, ...]
    """Shape of the tensor."""
    box: Box
    value: Tensor
    """Of the box's shape, on any device."""

    def __post_init__(self) -> None:
        if tuple(self.value.shape) != self.box.shape or not self.box.inside(Box.of(self.whole)):
            raise ValueError(f"{self.tensor} {self.whole}: {self.box} with values of {tuple(self.value.shape)}")


def tensor_name(kind: str, name: str) -> str:
    """The tensor of a kind that belongs to a parameter or buffer."""
    return f"{kind}/{name}"


def split_name(tensor: str) -> tuple[str, str]:
    """(kind, name of the parameter or buffer)."""
    kind, _, name = tensor.partition("/")
    return kind, name
