"""Rectangles against the same things counted element by element."""

from __future__ import annotations

import random
from itertools import pairwise, product
from math import prod

import pytest
import torch

from megamoe.testing.checkpoints import tile
from megamoe.training.checkpoint.boxes import Box, boxes_of_range, tiles

SHAPES = [(), (1,), (7,), (3, 4), (1, 6), (5, 1), (2, 3, 4), (3, 1, 4), (2, 2, 2, 3)]


def places(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(start, end) for start, end in zip(box.offsets, box.end, strict=True))))


def random_box(shape: tuple[int, ...], draw: random.Random) -> Box:
    starts = tuple(draw.choice((0, draw.randint(0, size))) for size in shape)
    rest = tuple(size - start for size, start in zip(shape, starts, strict=True))
    return Box(starts, tuple(draw.choice((size, draw.randint(0, size))) for size in rest))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_intersection_containment_and_slices(shape: tuple[int, ...]) -> None:
    draw, met = random.Random(0), 0
    for _ in range(200):
        one, other = random_box(shape, draw), random_box(shape, draw)
        common = one.intersect(other)
        assert (places(common) if common else set()) == places(one) & places(other)
        assert common is None or (common.volume > 0 and common.inside(one) and common.inside(other))
        if places(one):
            assert one.inside(other) == (places(one) <= places(other))
        index = torch.arange(prod(shape)).reshape(shape)
        assert len(places(one)) == one.volume == index[one.slices()].numel()
        if common:
            met += 1
            assert torch.equal(index[one.slices()][common.slices(one.offsets)], index[common.slices()])
    assert met


def test_a_shifted_box() -> None:
    assert Box((1, 2), (3, 4)).shifted((10, 20)) == Box((11, 22), (3, 4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_flat_range_as_boxes(shape: tuple[int, ...]) -> None:
    total = prod(shape)
    index = torch.arange(total).reshape(shape)
    most = 0
    for start in range(total + 1):
        for end in range(start, total + 1):
            found = list(boxes_of_range(shape, start, end))
            most = max(most, len(found))
            assert [position for _, position in found] == sorted(position for _, position in found)
            flat = [index[box.slices()].flatten() for box, _ in found]
            assert torch.cat([*flat, torch.empty(0, dtype=torch.int64)]).tolist() == list(range(start, end))
            for box, position in found:
                assert index[box.slices()].flatten()[0] == start + position
    assert most <= max(1, 2 * len(shape) - 1)


def test_the_bound_on_the_number_of_boxes_is_reached() -> None:
    assert len(list(boxes_of_range((3, 3, 3), 1, 26))) == 5


def test_a_tensor_without_elements_has_the_empty_range_only() -> None:
    assert list(boxes_of_range((0, 4), 0, 0)) == []
    with pytest.raises(ValueError, match="no range"):
        list(boxes_of_range((0, 4), 0, 1))


@pytest.mark.parametrize("start, end", [(-1, 3), (4, 3), (0, 13)])
def test_what_is_no_range_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        list(boxes_of_range((3, 4), start, end))


def counts(shape: tuple[int, ...], boxes: list[Box]) -> torch.Tensor:
    held = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        held[box.slices()] += 1
    return held


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_cutting_tiles(shape: tuple[int, ...]) -> None:
    for seed in range(50):
        assert tiles(shape, tile(shape, seed % 12, random.Random(seed))) is None


@pytest.mark.parametrize("shape", [s for s in SHAPES if prod(s) > 1], ids=str)
def test_the_first_element_that_is_covered_wrongly_is_named(shape: tuple[int, ...]) -> None:
    """Boxes at random: taken away, doubled, moved."""
    draw, wrong = random.Random(0), 0
    for seed in range(300):
        boxes = tile(shape, seed % 9, draw)
        for _ in range(draw.randint(1, 3)):
            boxes.append(random_box(shape, draw))
            if draw.random() < 0.6:
                boxes.pop(draw.randrange(len(boxes)))
        held = counts(shape, boxes)
        bad = (held != 1).nonzero()
        if len(bad) == 0:
            assert tiles(shape, boxes) is None
            continue
        wrong += 1
        first, times = bad[0].tolist(), int(held[tuple(bad[0])])
        expected = f"no piece holds {first}" if times == 0 else f"{times} pieces hold {first}"
        assert tiles(shape, boxes) == expected
    assert wrong > 50


def test_a_hole_and_an_overlap_of_one_size_do_not_cancel() -> None:
    assert tiles((2, 4), [Box((0, 0), (2, 2)), Box((0, 1), (2, 2))]) == "2 pieces hold [0, 1]"


def test_a_box_that_leaves_the_tensor() -> None:
    assert "outside" in str(tiles((4,), [Box((0,), (5,))]))
    assert "dims" in str(tiles((4,), [Box((0, 0), (4, 1))]))


def test_without_dims_and_without_elements() -> None:
    assert tiles((), [Box((), ())]) is None
    assert tiles((), []) == "no piece holds []"
    assert tiles((), [Box((), ())] * 2) == "2 pieces hold []"
    assert tiles((0, 3), []) is None
    assert tiles((2, 3), [Box((0, 0), (2, 3)), Box((1, 0), (0, 3))]) is None


def test_thousands_of_pieces_take_linear_time() -> None:
    """The fragments of 2,048 ranks, and one of them twice."""
    shape, ranks = (64, 1024, 64), 2048
    draw = random.Random(0)
    cuts = [0, *sorted(draw.sample(range(1, prod(shape)), ranks - 1)), prod(shape)]
    boxes = [box for start, end in pairwise(cuts) for box, _ in boxes_of_range(shape, start, end)]
    assert len(boxes) > 2 * ranks
    assert tiles(shape, boxes) is None
    assert tiles(shape, [*boxes, boxes[3000]]) == f"2 pieces hold {list(boxes[3000].offsets)}"
    assert tiles(shape, boxes[:3000] + boxes[3001:]) == f"no piece holds {list(boxes[3000].offsets)}"
