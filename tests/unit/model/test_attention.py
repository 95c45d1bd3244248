"""Attention against softmax over explicit pairs; rotary positions against complex numbers; the cache."""

import math

import pytest
import torch
from torch import Tensor

from megamoe.model.attention import Attention, KeyValueCache, rotate, rotation
from megamoe.testing import assert_close, assert_equal_bits

BATCH, SEQUENCE, WIDTH, HEADS, SIZE = 2, 9, 24, 4, 6


def build(kv_heads: int = 2) -> Attention:
    torch.manual_seed(0)
    return Attention(WIDTH, HEADS, kv_heads, SIZE, rope_theta=100.0)


def inputs(length: int = SEQUENCE) -> Tensor:
    return torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(1))


def turned(head_SH: Tensor, theta: float) -> Tensor:
    """Feature i and i + H/2 as one complex number, turned by position * theta^(-2i/H)."""
    half = SIZE // 2
    numbers = torch.complex(head_SH[:, :half].double(), head_SH[:, half:].double())
    angles = torch.arange(len(head_SH))[:, None] * theta ** (-2 * torch.arange(half).double() / SIZE)
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def literal(attention: Attention, x_BSD: Tensor) -> Tensor:
    """Head by head and position by position, in fp64."""
    share = attention.num_heads // attention.num_kv_heads
    out = torch.zeros(*x_BSD.shape[:2], attention.num_heads * SIZE, dtype=torch.float64)
    for b, x_SD in enumerate(x_BSD):
        queries, keys, values = (m(x_SD).split(SIZE, dim=-1) for m in (attention.wq, attention.wk, attention.wv))
        for head in range(attention.num_heads):
            q, k = (
                turned(queries[head], attention.rope_theta),
                turned(keys[head // share], attention.rope_theta),
            )
            for s in range(len(x_SD)):
                weights = (k[: s + 1] @ q[s] / math.sqrt(SIZE)).softmax(0)
                out[b, s, head * SIZE : (head + 1) * SIZE] = weights @ values[head // share][: s + 1].double()
    return out @ attention.wo.weight.double().t()


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
def test_against_explicit_pairs(kv_heads: int) -> None:
    attention = build(kv_heads)
    assert_close(attention(inputs()), literal(attention, inputs()), rel=1e-5)


def test_grouped_heads_equal_repeated_ones() -> None:
    grouped, full = build(2), build(HEADS)
    full.load_state_dict(grouped.state_dict() | {k: repeated(grouped, k) for k in ("wk.weight", "wv.weight")})
    assert_close(grouped(inputs()), full(inputs()), rel=1e-5)


def repeated(attention: Attention, name: str) -> Tensor:
    """The key or value matrix with every head as often as it has query heads."""
    heads = attention.state_dict()[name].unflatten(0, (attention.num_kv_heads, SIZE))
    return heads.repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=0).flatten(0, 1)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(1, SIZE, generator=generator), torch.randn(1, SIZE, generator=generator)

    def at(x: Tensor, position: int) -> Tensor:
        return rotate(x, *rotation(1, position, SIZE, 10000.0, torch.device("cpu")))

    assert_close(at(query, 77).norm(), query.norm(), rel=1e-6)
    assert_equal_bits(at(query, 0), query)
    products = [(at(query, start + 5) * at(key, start)).sum() for start in (0, 3, 40)]
    assert_close(torch.stack(products), products[0].expand(3), rel=1e-5)
    assert abs(float((at(query, 6) * at(key, 0)).sum() - products[0])) > 1e-3


def test_bf16_stays_bf16() -> None:
    attention = build().bfloat16()
    out = attention(inputs().bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), literal(attention.float(), inputs().bfloat16().float()), rel=0.03)


@pytest.mark.parametrize("splits", [[9], [1] * 9, [4, 5], [6, 1, 1, 1], [1, 3, 5]], ids=str)
def test_a_cache_continues_where_it_ended(splits: list[int]) -> None:
    attention, cache, x_BSD = build(), KeyValueCache(), inputs()
    parts = []
    for part_BSD in x_BSD.split(splits, dim=1):
        parts.append(attention(part_BSD, cache))
    assert cache.length == SEQUENCE
    assert_close(torch.cat(parts, dim=1), attention(x_BSD), rel=1e-5)
