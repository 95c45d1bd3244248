from collections import Counter

import numpy as np
import pytest

from megamoe.data.packing import OPEN_ROWS, Rows, arrange, first_fit

SEQ_LENGTH = 100


def _lengths(count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(3.0, 1.0, count)
    return np.clip(drawn.astype(np.int64), 1, SEQ_LENGTH)


def _arrange(lengths: np.ndarray, seed: int = 3, *, packing: bool = True) -> Rows:
    return arrange(np.arange(len(lengths)), lengths, SEQ_LENGTH, seed, packing=packing)


def _in_words(lengths: list[int], capacity: int, open_rows: int) -> list[list[int]]:
    """The rule of `first_fit`, word by word, with the items of each row."""
    rows: list[list[int]] = []
    places: list[list[int]] = []

    def room(row: list[int]) -> int:
        return capacity - sum(lengths[item] for item in row)

    for item, length in enumerate(lengths):
        fitting = [row for row in places if room(row) >= length]
        if not fitting:
            fitting = [[]]
            rows.append(fitting[0])
            if len(places) < open_rows:
                places.append(fitting[0])
            else:
                places[[room(row) for row in places].index(min(map(room, places)))] = fitting[0]
        fitting[0].append(item)
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("open_rows", [1, 3, OPEN_ROWS])
def test_first_fit_is_its_rule(open_rows: int, seed: int):
    lengths = _lengths(400, seed)
    row_of = first_fit(lengths, SEQ_LENGTH, open_rows)
    expected = _in_words(lengths.tolist(), SEQ_LENGTH, open_rows)
    assert [np.flatnonzero(row_of == row).tolist() for row in range(row_of.max() + 1)] == expected


@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_every_item_is_in_one_row_and_no_row_is_too_long(count: int):
    lengths = _lengths(count, 1)
    rows = _arrange(lengths)
    assert sorted(rows.members.tolist()) == list(range(count))
    every = [rows.of(row).tolist() for row in range(len(rows.ends))]
    assert [item for row in every for item in row] == rows.members.tolist()
    assert [row[0] for row in every] == rows.members[rows.firsts].tolist()
    assert all(0 < lengths[row].sum() <= SEQ_LENGTH for row in every)


def test_rows_are_well_filled():
    lengths = _lengths(5000, 2)
    assert lengths.sum() / (len(_arrange(lengths).ends) * SEQ_LENGTH) > 0.98


def test_an_item_can_occur_several_times():
    items, lengths = np.array([4, 4, 4, 9, 2, 2]), np.array([60, 60, 60, 10, 30, 30])
    rows = arrange(items, lengths, SEQ_LENGTH, 0, packing=True)
    assert Counter(rows.members.tolist()) == Counter(items.tolist())


def test_without_packing_each_has_its_own_row():
    lengths = _lengths(50, 1)
    rows = _arrange(lengths, packing=False)
    assert rows.ends.tolist() == list(range(1, 51))
    assert sorted(rows.members.tolist()) == list(range(50))
    assert rows.members.tolist() != list(range(50))


def test_the_seed_decides():
    lengths = _lengths(500, 1)
    one, same, other = (_arrange(lengths, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.members, same.members)
    assert np.array_equal(one.ends, same.ends)
    assert not np.array_equal(one.members, other.members)


@pytest.mark.parametrize("length", [0, SEQ_LENGTH + 1])
def test_what_fits_into_no_row_is_refused(length: int):
    with pytest.raises(ValueError, match="in rows of 100"):
        _arrange(np.array([5, length]))


def test_the_order_is_fixed_for_ever():
    # Runs are resumed with later versions; other rows would repeat some conversations and leave out others.
    rows = _arrange(np.array([30, 50, 70, 20, 90, 10, 40, 60, 80, 5]), seed=7)
    assert [rows.of(row).tolist() for row in range(len(rows.ends))] == [[7, 6], [8, 9, 5], [1, 3, 0], [2], [4]]
