"""Bytes of exchanges: against every choice of experts there is, and by hand. tests/dist/test_fewer_bytes.py counts."""

from __future__ import annotations

from itertools import combinations

import pytest

from megamoe.config.exchange_bytes import (
    ByLink,
    Exchange,
    Spread,
    backward_bytes,
    forward_bytes,
    reached,
    rows_per_token,
)

SMALL = Spread(num_experts=8, top_k=3, ranks=4, per_node=2, together=2)


def parts(choice: tuple[int, ...], size: int) -> int:
    """In how many parts of so many experts a choice lies."""
    return len({expert // size for expert in choice})


def test_reached_parts_are_those_of_all_choices() -> None:
    choices = list(combinations(range(8), 3))
    for size in (1, 2, 4, 8):
        mean = sum(parts(choice, size) for choice in choices) / len(choices)
        assert 8 / size * reached(size, 8, 3) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("top_k, cut", [(1, 0.0), (2, 0.0556), (4, 0.1561), (8, 0.3209), (64, 0.875)])
def test_what_deduplication_saves_of_64_experts_on_8_ranks(top_k: int, cut: float) -> None:
    spread = Spread(64, top_k, ranks=8, per_node=8)
    plain, once = (rows_per_token(name, spread).sent for name in ("all_to_all", "deduplicated"))
    assert 1 - once / plain == pytest.approx(cut, abs=5e-4)


def test_rows_go_to_their_kind_of_link() -> None:
    """4 ranks on 2 nodes, 2 experts on each, 3 of 8: a rank is reached with 1 - 20/56, a node with 1 - 4/56."""
    rank, node = 36 / 56, 52 / 56
    assert rows_per_token("all_to_all", SMALL) == pytest.approx(ByLink(3 / 2, 3 / 4, 3 / 4))
    assert rows_per_token("deduplicated", SMALL) == pytest.approx(ByLink(2 * rank, rank, rank))
    # Once to the other node; then there and here to 2 ranks, of tokens of both nodes.
    assert rows_per_token("hierarchical", SMALL) == pytest.approx(ByLink(node, 2 * rank, node + 2 * rank))


def test_groups_smaller_than_a_node_cross_inside_of_it() -> None:
    spread = Spread(num_experts=16, top_k=2, ranks=8, per_node=4, together=2)
    group, rank = reached(4, 16, 2), reached(2, 16, 2)
    assert rows_per_token("groupwise", spread) == pytest.approx(ByLink(2 * group, group + 4 * rank, group + 4 * rank))


def test_bytes_by_hand() -> None:
    """10 tokens of 32 bytes, weights of 4; numbers of rows of 8."""
    plain = forward_bytes("all_to_all", SMALL, 10, 32)
    assert plain.inside == pytest.approx(10 * 0.75 * (2 * 32 + 4) + 2 * 8)
    once = forward_bytes("deduplicated", SMALL, 10, 32)
    assert once.inside == pytest.approx(10 * (36 / 56 * 2 * 32 + 0.75 * 6) + 3 * 8)
    nodes = forward_bytes("hierarchical", SMALL, 10, 32)
    assert nodes.between == pytest.approx(10 * (52 / 56 * 2 * 32 + 1.5 * 6) + 3 * 8)
    assert nodes.inside == pytest.approx(10 * (2 * 36 / 56 * 2 * 32 + 1.5 * 6) + 4 * 8)
    assert backward_bytes("deduplicated", SMALL, 10, 32).inside == pytest.approx(10 * (36 / 56 * 2 * 32 + 0.75 * 4))


@pytest.mark.parametrize("name", ["deduplicated", "hierarchical"])
def test_broadcast_tokens_cost_rows_for_ranks_and_not_for_experts(name: Exchange) -> None:
    rows = {rows_per_token(name, Spread(e, e, ranks=8, per_node=4, together=4)) for e in (8, 64, 256)}
    assert rows == {ByLink(4, 3, 1) if name == "deduplicated" else ByLink(1, 6, 3)}


@pytest.mark.parametrize("uneven", [{"num_experts": 6}, {"per_node": 3}, {"together": 3}])
def test_uneven_spreads_are_refused(uneven: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        Spread(**{"num_experts": 8, "top_k": 2, "ranks": 4, "per_node": 2} | uneven)
