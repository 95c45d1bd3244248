"""Compute ops. One op per file: the plain torch reference first (it is the specification), then faster variants.

Tensor-name suffixes, one legend for the project:
B batch, S sequence, T token rows on this rank, D model width, V vocabulary, N query heads, G key/value heads,
H head size, F feed-forward width, E experts in all, L experts on this rank, K choices per token,
A assignments (ragged), R rows received, C capacity, P ranks of a group.
"""
