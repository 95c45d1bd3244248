"""Bytes by class of links: the same as `config/exchange_bytes.py` predicts, and less and less shared in chunks."""

import pytest

from megamoe.config.exchange_bytes import Exchange, Spread, backward_bytes, forward_bytes
from megamoe.config.traffic import COUNT
from megamoe.plan.exchange import Place, Rows, entry_bytes
from megamoe.plan.rates import BETWEEN, INSIDE

TOKENS, ROW = 1000, 4096


def sent(way: str, ranks: int, on_node: int, chunks: int, phases: tuple[str, ...]) -> dict[str, float]:
    place, found = Place(ranks, on_node), {INSIDE: 0.0, BETWEEN: 0.0}
    rows = Rows(TOKENS, TOKENS * 8, 64, 8, 64 // ranks // chunks)
    for phase in phases:
        home = phase in ("combine", "dispatch backward")
        for step in rows.moves(way, place, ROW, entry_bytes(way, phase, 2), home=home):
            for link, size in step.items():
                found[link] += size * chunks
    return found


FORWARD, BACKWARD = ("dispatch", "combine"), ("combine backward", "dispatch backward")


@pytest.mark.parametrize("way", ["all_to_all", "deduplicated", "hierarchical"])
@pytest.mark.parametrize("ranks, on_node", [(8, 8), (16, 8), (8, 2)])
def test_whole_it_is_what_the_configuration_predicts(way: Exchange, ranks: int, on_node: int) -> None:
    if way == "hierarchical" and ranks == on_node:
        return
    spread = Spread(64, 8, ranks, on_node, together=on_node if way == "hierarchical" else 1)
    mine = sent(way, ranks, on_node, 1, FORWARD)
    theirs = forward_bytes(way, spread, TOKENS, ROW)
    numbers = 16 * ranks * COUNT  # of rows, which the plan counts as an exchange of their own
    assert mine[INSIDE] == pytest.approx(theirs.inside, abs=64 * numbers)
    assert mine[BETWEEN] == pytest.approx(theirs.between, abs=64 * numbers)
    mine, theirs = sent(way, ranks, on_node, 1, BACKWARD), backward_bytes(way, spread, TOKENS, ROW)
    assert mine == pytest.approx({INSIDE: theirs.inside, BETWEEN: theirs.between})


def test_deduplication_saves_a_third_at_eight_of_64_experts_over_8_ranks() -> None:
    plain, once = (sent(way, 8, 8, 1, ("combine",))[INSIDE] for way in ("all_to_all", "deduplicated"))
    assert 1 - once / plain == pytest.approx(0.32, abs=0.005)


def test_in_chunks_of_one_expert_nothing_is_shared() -> None:
    plain = sent("all_to_all", 8, 8, 8, ("combine",))
    shared = [sent("deduplicated", 8, 8, chunks, ("combine",))[INSIDE] for chunks in (1, 2, 4, 8)]
    assert shared == sorted(shared)
    assert shared[-1] == pytest.approx(plain[INSIDE])


def test_between_nodes_hierarchical_sends_least() -> None:
    plain, once, steps = (
        sent(way, 32, 8, 1, ("dispatch",))[BETWEEN] for way in ("all_to_all", "deduplicated", "hierarchical")
    )
    assert steps < once < plain
