"""Who exchanges with whom in which round, and whom slow links are blamed on."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from megamoe.testing.links import Rates, Request, partners, rates, slow_hosts, tournament


@pytest.mark.parametrize("players", range(1, 10))
def test_in_a_tournament_everyone_meets_everyone_once(players: int) -> None:
    rounds = tournament(players)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(players), 2))
    for pairs in rounds:
        busy = [player for pair in pairs for player in pair]
        assert len(busy) == len(set(busy))
    assert len(rounds) <= players, "no round is wasted"


def test_ranks_meet_across_nodes_and_then_within() -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    rounds = partners(hosts)
    met = [(rank, other) for pairs in rounds for rank, other in pairs.items()]
    assert len(met) == len(set(met)) == 2 * (6 + 3), "three pairs of nodes, two ranks each; a pair within each of three"
    assert all((other, rank) in met for rank, other in met)
    assert all(hosts[rank] != hosts[other] for pairs in rounds[:3] for rank, other in pairs.items())
    assert rounds[3:] == [{0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4}], "all nodes at once"


def test_nodes_of_unequal_size_exchange_as_far_as_both_have_ranks() -> None:
    assert partners(["a", "a", "a", "b"]) == [{0: 3, 3: 0}, {1: 2, 2: 1}, {0: 2, 2: 0}, {0: 1, 1: 0}]


def test_one_rank_has_nobody_to_meet() -> None:
    assert partners(["a"]) == []


def test_the_slowest_of_ranks_that_exchange_at_once_counts() -> None:
    """Two ranks per host, 100 MB each: together 200 MB in the time of the last one."""
    request = Request(("a", "a", "b", "b"), 100.0, limit=1.0)
    seconds = {0: {"2": 0.1, "1": 0.01}, 1: {"3": 0.4, "0": 0.02}, 2: {"0": 0.1, "3": 0.01}, 3: {"1": 0.1, "2": 0.01}}
    found = rates(request, seconds)
    assert found.between == {("a", "b"): pytest.approx(0.5)}
    assert found.within == {"a": pytest.approx(5.0), "b": pytest.approx(10.0)}


@pytest.mark.parametrize("seconds", [{}, {0: {"1": math.inf}, 1: {"0": 0.1}}, {0: {"1": 0.1}}])
def test_what_did_not_arrive_has_no_speed(seconds: dict[int, dict[str, float]]) -> None:
    assert rates(Request(("a", "b"), 1.0, limit=1.0), seconds).between == {("a", "b"): 0.0}


def between(hosts: str, slow: dict[str, float], usual: float = 20.0) -> Rates:
    """All pairs of hosts of one letter; those with a slow one at its rate."""
    pairs = list(combinations(hosts, 2))
    return Rates({pair: min(slow.get(name, usual) for name in ("".join(pair), *pair)) for pair in pairs}, {})


@pytest.mark.parametrize(
    "hosts, slow, refused",
    [
        ("abcd", {}, ""),
        ("abcd", {"b": 12.0}, ""),  # more than half
        ("abc", {"c": 3.0}, "c"),  # in two of three pairs, so the median of all pairs is slow
        ("abcdef", {"b": 3.0, "e": 0.0}, "be"),
        ("abcdefgh", {"bf": 3.0}, "bf"),  # one link: either of them
        ("ab", {"ab": 3.0}, ""),  # nothing to compare with
    ],
)
def test_the_host_in_most_slow_pairs_is_to_blame(hosts: str, slow: dict[str, float], refused: str) -> None:
    assert sorted(slow_hosts(between(hosts, slow), minimum=0.0)) == list(refused)


def test_below_the_wanted_bandwidth_is_slow_whatever_the_others_reach() -> None:
    found = slow_hosts(between("ab", {"ab": 3.0}), minimum=5.0)
    assert found == {
        "a": "3 GB/s with b, and it may as well be that one; at least 5 expected",
        "b": "3 GB/s with a, and it may as well be that one; at least 5 expected",
    }
    assert slow_hosts(between("ab", {"ab": 3.0}), minimum=2.0) == {}


def test_slow_exchange_within_a_host() -> None:
    found = slow_hosts(Rates({}, {"a": 300.0, "b": 290.0, "c": 20.0}), minimum=25.0)
    assert found == {"c": "20 GB/s between two of its ranks; at least 145 expected, half of the median"}
