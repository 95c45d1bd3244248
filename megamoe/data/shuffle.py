"""Shuffling without a table: a keyed permutation of 0..count-1 whose every value can be computed by itself.

A Feistel network over the next power of two; values outside the range are sent through it again until they
fall inside (Black and Rogaway, Ciphers with arbitrary finite domains, 2002). Integer arithmetic alone, so the
order is the same with every version of numpy and on every machine, which random generators do not promise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
Words = npt.NDArray[np.uint64]


def permute(values: npt.ArrayLike, count: int, key: int) -> npt.NDArray[np.int64]:
    """Where the permutation `key` of range(count) sends each of `values` [N], int64 [N]."""
    words = np.atleast_1d(np.asarray(values, dtype=np.uint64))
    bits = max(1, (count - 1).bit_length())
    words = _feistel(words, bits, key)
    outside = np.flatnonzero(words >= count)
    while outside.size:
        words[outside] = _feistel(words[outside], bits, key)
        outside = outside[words[outside] >= count]
    return words.astype(np.int64)


def _feistel(words: Words, bits: int, key: int) -> Words:
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << bits // 2) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = words >> low_bits, words & low_mask
    keys = _mix(np.arange(_ROUNDS, dtype=np.uint64) + np.uint64(key))
    for first, second in keys.reshape(-1, 2):
        high = high ^ (_mix(low ^ first) & high_mask)
        low = low ^ (_mix(high ^ second) & low_mask)
    return (high << low_bits) | low


def _mix(words: Words) -> Words:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014), modulo 2**64 as unsigned arrays wrap."""
    words = (words + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
