"""Boxes: the rectangles that the tensors of a checkpoint are cut into, as offsets and shapes. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle of a tensor, with one offset and one size for each dim; `Box((), ())` is a tensor without dims."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> Box:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """The first place behind it in each dim."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """What both have; None where that is nothing."""
        start = tuple(map(max, self.offsets, other.offsets))
        shape = tuple(end - first for first, end in zip(start, map(min, self.end, other.end), strict=True))
        return Box(start, shape) if all(size > 0 for size in shape) else None

    def inside(self, other: Box) -> bool:
        """Whether the other one holds all of it."""
        starts_inside = all(mine >= its for mine, its in zip(self.offsets, other.offsets, strict=True))
        return starts_inside and all(mine <= its for mine, its in zip(self.end, other.end, strict=True))

    def shifted(self, offsets: Sequence[int]) -> Box:
        """The same box, further by these offsets."""
        return Box(tuple(mine + more for mine, more in zip(self.offsets, offsets, strict=True)), self.shape)

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Its place in a tensor that begins at `origin` (default: where the whole does), as an index of that tensor."""
        first = (0,) * len(self.offsets) if origin is None else origin
        bounds = zip(self.offsets, self.end, first, strict=True)
        return tuple(slice(start - zero, end - zero) for start, end, zero in bounds)


def boxes_of_range(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[Box, int]]:
    """Cut a flat range of a tensor into boxes.

    Args:
        shape: of the tensor.
        start, end: the elements [start, end) in row-major order.

    Yields:
        At most 2 * dims - 1 boxes (dims >= 1) in the order of the range, each with its position in it: a box's elements
        are contiguous there, `range[position : position + box.volume]`. An empty range has none.
    """
    if not 0 <= start <= end <= prod(shape):
        raise ValueError(f"[{start}, {end}) is no range of a tensor of shape {tuple(shape)}")
    for box, flat in _boxes(tuple(shape), start, end):
        yield box, flat - start


def _boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[Box, int]]:
    """The boxes, each with the flat index of its first element."""
    if start == end:
        return
    if not shape:
        yield Box((), ()), 0
        return
    row = prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows [first, last)
    if first > last:  # a piece out of the middle of one row
        yield from _inside_row(shape, start, end)
        return
    yield from _inside_row(shape, start, first * row)
    if first < last:
        yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])), first * row
    yield from _inside_row(shape, last * row, end)


def _inside_row(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[Box, int]]:
    """Boxes of a range that lies in one row."""
    if start < end:
        row = prod(shape[1:])
        index, zero = start // row, start // row * row
        for box, flat in _boxes(shape[1:], start - zero, end - zero):
            yield Box((index, *box.offsets), (1, *box.shape)), zero + flat


def tiles(whole_shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Whether boxes cover a tensor exactly once: None, or what is wrong first.

    Ours: how often each element is covered is a function on the grid, and its mixed difference over all dims is +1 or
    -1 at the corners of each box and 0 elsewhere. That difference determines the function, so the boxes tile the whole
    if and only if their corners add up to those of the whole. Where they do not, the first such corner in row-major
    order is also the first element that is covered wrongly, because nothing before it adds to its count. Time and
    memory are linear in the number of boxes, in any arrangement.
    """
    whole = Box.of(whole_shape)
    signs = [prod(factors) for factors in product((1, -1), repeat=len(whole.shape))]
    excess: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        if len(box.offsets) != len(whole.shape) or len(box.shape) != len(whole.shape):
            return f"a piece {box} of a tensor with {len(whole.shape)} dims"
        for corner, sign in zip(_corners(box), signs, strict=True):
            excess[corner] += sign
    for corner, sign in zip(_corners(whole), signs, strict=True):
        excess[corner] -= sign
    wrong = [corner for corner, count in excess.items() if count]
    if not wrong:
        return None
    first = min(wrong)
    times = excess[first]
    if not Box(first, (1,) * len(first)).inside(whole):
        return f"a piece reaches to {list(first)}, outside of {list(whole.shape)}"
    return f"no piece holds {list(first)}" if times < 0 else f"{times + 1} pieces hold {list(first)}"


def _corners(box: Box) -> Iterator[tuple[int, ...]]:
    """The places where it begins or ends, in each combination over the dims; those of an empty box cancel out."""
    return product(*zip(box.offsets, box.end, strict=True))
