import numpy as np
import pytest

from megamoe.data.shuffle import permute


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1023, 1024, 1025, 50_000])
def test_it_is_a_permutation(count: int):
    assert sorted(permute(np.arange(count), count, 5).tolist()) == list(range(count))


@pytest.mark.parametrize("count", [5, 1025])
def test_values_alone_are_the_same_as_together(count: int):
    together = permute(np.arange(count), count, 11)
    assert [int(permute(i, count, 11)[0]) for i in range(count)] == together.tolist()


def test_the_key_decides_and_all_64_bits_of_it():
    orders = {tuple(permute(np.arange(64), 64, key)) for key in (0, 1, 2, 2**63, 2**64 - 1)}
    assert len(orders) == 5


def test_every_value_comes_everywhere_equally_often():
    count, keys = 7, 7000
    places = np.stack([permute(np.arange(count), count, key) for key in range(keys)])
    hits = np.stack([np.bincount(places[:, i], minlength=count) for i in range(count)])
    # 1000 expected in each cell, standard deviation 29.3; six of them allowed.
    assert abs(hits - keys / count).max() < 176


def test_neighbours_do_not_stay_together():
    order = permute(np.arange(10_000), 10_000, 3)
    together = int((np.abs(np.diff(order)) == 1).sum())
    assert together < 15  # about 2 expected


def test_the_order_is_fixed_for_ever():
    # Runs are resumed with later versions; a changed order would repeat some samples and leave out others.
    assert permute(np.arange(10), 10, 123).tolist() == [4, 5, 0, 9, 7, 6, 1, 8, 3, 2]
