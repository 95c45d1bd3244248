"""Ops that move rows: gather rows by index, and sum rows back by index. Each is the other's backward pass."""

from __future__ import annotations

from torch import Tensor


def gather_rows(rows_TD: Tensor, token_ids_A: Tensor) -> Tensor:
    """`out[a] = rows[token_ids[a]]`, [A, D]. An index may occur any number of times, or never."""
    return rows_TD.index_select(0, token_ids_A)


def sum_rows(rows_AD: Tensor, token_ids_A: Tensor, num_rows: int) -> Tensor:
    """`out[t] = sum of rows[a] over all a with token_ids[a] == t`, [T, D]; zero where there is none.

    Added in the order of `a` on a CPU (repeatable bit for bit); CUDA's index_add uses atomics.
    """
    return rows_AD.new_zeros(num_rows, rows_AD.shape[1]).index_add_(0, token_ids_A, rows_AD)
