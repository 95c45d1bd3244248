"""Expert choice against a loop that says what is meant, and the bound itself."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megamoe.moe.capacity import Drop, keep_within


class Case(NamedTuple):
    affinity_A: Tensor
    expert_ids_A: Tensor
    num_experts: int
    capacity: list[int] | None
    threshold: float
    drop: Drop


def random_case(seed: int) -> Case:
    """Of any kind: none to many candidates, empty experts, ties, negative affinities, all kinds of bounds."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    num_experts, size = pick(1, 2, 3, 8), pick(0, 1, 2, 7, 20, 64)
    used = pick(num_experts, max(1, num_experts // 2))
    # Few multiples of 1/16: many ties, and sums that are exact in any order.
    affinity_A = torch.randint(-6, 10, (size,), generator=generator) / 16
    affinity_A = pick(affinity_A, affinity_A, -affinity_A.abs() - 1 / 16, torch.rand(size, generator=generator))
    return Case(
        affinity_A,
        torch.randint(used, (size,), generator=generator),
        num_experts,
        capacity=pick(
            None, *([size] * num_experts for size in (0, 1, 3, 8, 100)), [0, 1, 2, 3, 4, 5, 9, 70][:num_experts]
        ),
        threshold=pick(1.0, 1.0, 0.25, 0.5, 0.75),
        drop="affinity",
    )._replace(**pick({}, {"drop": "position", "threshold": 1.0}))


def literal(case: Case) -> list[bool]:
    """The definition, expert by expert and candidate by candidate."""
    affinity, experts = case.affinity_A.tolist(), case.expert_ids_A.tolist()
    kept = [False] * len(affinity)
    for expert in range(case.num_experts):
        candidates = [a for a in range(len(affinity)) if experts[a] == expert]
        if case.drop == "affinity":
            candidates.sort(key=lambda a: (-affinity[a], a))
        goal = case.threshold * sum(max(0.0, affinity[a]) for a in candidates)
        reached, number = 0.0, 0
        for a in candidates:
            enough = case.threshold < 1.0 and goal > 0.0 and reached >= goal
            full = case.capacity is not None and number >= case.capacity[expert]
            if enough or full:
                break
            kept[a], number, reached = True, number + 1, reached + max(0.0, affinity[a])
    return kept


def keep(case: Case) -> Tensor:
    return keep_within(
        case.affinity_A,
        case.expert_ids_A,
        case.num_experts,
        capacity_E=None if case.capacity is None else torch.tensor(case.capacity),
        threshold=case.threshold,
        drop=case.drop,
    )


CASES = [random_case(seed) for seed in range(400)]


def test_many_random_cases_against_the_loop() -> None:
    for seed, case in enumerate(CASES):
        kept_A = keep(case)
        assert kept_A.dtype == torch.bool
        assert kept_A.tolist() == literal(case), f"seed {seed}: {case}"


def test_the_cases_reach_every_branch() -> None:
    dropped = [case for case in CASES if not all(literal(case))]
    assert any(case.capacity is None for case in dropped), "a threshold that drops"
    assert any(case.threshold == 1.0 for case in dropped), "a capacity that drops"
    assert any(case.drop == "position" for case in dropped)
    assert any(len(case.affinity_A) and bool((case.affinity_A < 0).all()) for case in dropped)
    assert any(len(case.affinity_A.unique()) < len(case.affinity_A) for case in dropped), "ties"
    assert any(len(case.expert_ids_A.unique()) < case.num_experts for case in dropped), "an empty expert"
    assert any(not len(case.affinity_A) for case in CASES)


def test_bound_and_order_hold_for_every_expert() -> None:
    for case in CASES:
        kept_A = keep(case)
        for expert in range(case.num_experts):
            mine_A = case.expert_ids_A == expert
            kept, dropped = case.affinity_A[kept_A & mine_A], case.affinity_A[~kept_A & mine_A]
            assert case.capacity is None or len(kept) <= case.capacity[expert]
            if case.drop == "affinity" and len(kept) and len(dropped):
                assert kept.min() >= dropped.max()


def test_negative_affinities_still_fill_the_capacity() -> None:
    affinity_A = -torch.arange(1.0, 13.0)
    kept_A = keep(Case(affinity_A, torch.zeros(12, dtype=torch.int64), 2, [5, 5], 0.5, "affinity"))
    assert kept_A.tolist() == [True] * 5 + [False] * 7


def test_ties_go_to_the_earlier_token() -> None:
    kept_A = keep(Case(torch.full((6,), 0.5), torch.tensor([1, 0, 1, 0, 1, 0]), 2, [2, 2], 1.0, "affinity"))
    assert kept_A.tolist() == [True, True, True, True, False, False]


def test_position_drops_the_latest_whatever_its_affinity() -> None:
    kept_A = keep(Case(torch.tensor([0.1, 0.9, 0.2, 0.8]), torch.zeros(4, dtype=torch.int64), 1, [2], 1.0, "position"))
    assert kept_A.tolist() == [True, True, False, False]


def test_one_large_expert_does_not_blur_the_threshold_of_another() -> None:
    """The sum of expert 0 is so large that fp32 could not tell apart the candidates of expert 1 behind it."""
    affinity_A = torch.cat([torch.full((1000,), 3e5), torch.tensor([0.5, 0.25, 0.125, 0.125])])
    expert_ids_A = torch.cat([torch.zeros(1000, dtype=torch.int64), torch.ones(4, dtype=torch.int64)])
    kept_A = keep(Case(affinity_A, expert_ids_A, 2, None, 0.7, "affinity"))
    assert kept_A[1000:].tolist() == [True, True, False, False]
    assert int(kept_A[:1000].sum()) == 700


@pytest.mark.parametrize("top_k, share", [(1, 0.587), (2, 0.54)])
def test_share_that_three_quarters_of_the_affinity_keeps(top_k: int, share: float) -> None:
    """Isotropic tokens, 8 experts: the routing page's "40 % fewer"."""
    num_tokens, num_experts = 16384, 8
    affinity_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
    affinity_TK, expert_ids_TK = affinity_TE.topk(top_k, dim=-1)
    case = Case(affinity_TK.reshape(-1), expert_ids_TK.reshape(-1), num_experts, None, 0.75, "affinity")
    assert keep(case).float().mean().item() == pytest.approx(share, abs=0.006)


def test_random_drops_fill_the_capacity_and_depend_on_the_seed_only() -> None:
    affinity_A, experts_A = torch.linspace(0, 1, 4000), torch.arange(4000) % 2

    def kept(seed: int) -> Tensor:
        limits_E = torch.tensor([500, 1500])
        return keep_within(affinity_A, experts_A, 2, capacity_E=limits_E, drop="random", seed=seed)

    assert torch.equal(kept(3), kept(3))
    assert not torch.equal(kept(3), kept(4))
    for seed in range(5):
        kept_A = kept(seed)
        assert [int(kept_A[experts_A == e].sum()) for e in (0, 1)] == [500, 1500]
        # A quarter and three quarters of the candidates, wherever they stand and whatever their affinity.
        for part_A in kept_A.view(4, 1000):
            assert float(part_A.float().mean()) == pytest.approx(0.5, abs=0.06)


def test_the_threshold_goes_by_affinity_only() -> None:
    with pytest.raises(AssertionError, match="affinity"):
        keep_within(
            torch.ones(2), torch.zeros(2, dtype=torch.int64), 1, capacity_E=None, threshold=0.5, drop="position"
        )
