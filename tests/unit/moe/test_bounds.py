"""Capacity bounds against the numbers of the papers, against simulations, and their life over optimizer steps."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import CapacityConfig
from megamoe.moe import bounds
from megamoe.moe.bounds import StaticBound, build_bound, exponent, locmoe_bound, misranked_pairs
from megamoe.moe.capacity import keep_within

CPU = torch.device("cpu")


def build(mode: str, experts: int = 8, top_k: int = 1, width: int = 128, **settings: object) -> StaticBound:
    bound = build_bound(CapacityConfig(mode=mode, **settings), experts, top_k, width)
    assert bound is not None
    return bound


def isotropic(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


# The static capacity and the clamps


@pytest.mark.parametrize(
    "num_tokens, num_experts, top_k, factor, capacity",
    [
        (4096, 8, 2, 1.0, 1024),
        (4096, 8, 2, 1.1, 1127),
        (200, 8, 2, 1.1, 55),  # exactly the product, although 1.1 * 50 > 55 in floating point
        (1000, 3, 1, 1.0, 334),
        (4096, 8, 2, 0.01, 256),  # a quarter of the balanced load
        (64, 8, 1, 0.5, 8),
        (5, 8, 1, 1.1, 5),  # never more than there are tokens
        (64, 2, 2, 1.5, 64),
        (0, 8, 2, 1.1, 0),
    ],
)
def test_static_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float, capacity: int) -> None:
    bound = build("static", num_experts, top_k, factor=factor)
    assert bound.capacities(num_tokens) == [capacity] * num_experts


def test_static_capacity_is_the_rounded_up_product() -> None:
    for num_tokens in range(64, 2048, 7):
        wanted = math.ceil(Fraction(11, 10) * 2 * num_tokens / 8)
        assert build("static", 8, 2, factor=1.1).capacities(num_tokens)[0] == max(8, wanted)


def test_dropless_has_no_bound() -> None:
    assert build_bound(CapacityConfig(mode="dropless"), 8, 2, 128) is None


@pytest.mark.parametrize("tile", [1, 16, 128])
def test_padded_exchanges_come_in_few_sizes_that_hold_the_capacity(tile: int) -> None:
    bound = build("etr_success", tile=tile)
    sizes = set()
    for share in range(1, 200):
        bound.move([share / 200 * bound.isotropic] * 8, 0.0)
        limits = bound.limits(4096, CPU)
        assert limits.slots is not None
        assert limits.slots >= int(limits.per_expert_E.max())
        assert limits.slots % tile == 0
        assert limits.slots < int(limits.per_expert_E.max()) + max(tile, 4096 // 8 * 2 // bounds.SIZES)
        sizes.add(limits.slots)
    assert len(sizes) <= bounds.SIZES + 1


def test_slots_are_never_more_than_tokens() -> None:
    assert build("static", tile=128).limits(40, CPU).slots == 40


# LocMoE's theorem


@pytest.mark.parametrize(
    "width, experts, affinity, capacity",
    [(5120, 16, 0.03, 1.97), (4096, 8, 0.03, 2.28), (4096, 8, 0.05, 92), (4096, 8, 0.0625, 2006)],
)
def test_the_bound_of_the_theorem(width: int, experts: int, affinity: float, capacity: float) -> None:
    x = exponent(affinity, width)
    assert locmoe_bound(x, experts) == pytest.approx(capacity, rel=0.005)
    assert locmoe_bound(x, experts) > math.exp(x) / experts, "the weaker form that is printed beside it"


def test_the_bound_is_infinite_where_erfc_is_zero_and_the_capacity_is_then_the_static_one() -> None:
    assert locmoe_bound(1e4, 8) == math.inf
    bound, static = build("locmoe", width=5120), build("static", width=5120)
    bound.update({"first_affinity": torch.tensor([90.0]), "first_count": torch.tensor([100.0])})
    assert bound.capacities(4096) == static.capacities(4096)


def test_before_the_first_step_every_bound_is_the_static_capacity() -> None:
    for mode in ("locmoe", "etr_bound", "etr_success"):
        assert build(mode, top_k=2).capacities(4096) == build("static", top_k=2).capacities(4096)


@pytest.mark.parametrize("mode, moves", [("locmoe", False), ("etr_bound", True)])
def test_locmoe_is_frozen_after_its_first_step_and_etr_follows(mode: str, moves: bool) -> None:
    bound = build(mode, width=4096, momentum=0.5)
    for affinity in (0.03, 0.05):
        bound.update({"first_affinity": torch.tensor([affinity * 10]), "first_count": torch.tensor([10.0])})
    first, second = exponent(0.03, 4096), exponent(0.05, 4096)
    expected = (first + second) / 2 if moves else first
    assert bound.state()[1][0] == pytest.approx(expected, rel=1e-5)
    assert bound.wanted(Fraction(512), 10**6) == [math.ceil(locmoe_bound(bound.state()[1][0], 8))] * 8


def test_the_observed_affinity_is_the_first_choice_s() -> None:
    affinity_TE = isotropic(100, 8) / 64
    seen = build("etr_bound").observe(affinity_TE)
    assert float(seen["first_affinity"] / seen["first_count"]) == pytest.approx(affinity_TE.amax(-1).mean().item())


# ETR's success bound


def exact_misranked(affinity_TE: Tensor) -> tuple[list[float], list[float]]:
    first_T = affinity_TE.argmax(-1)
    misranked, pairs = [], []
    for expert in range(affinity_TE.shape[1]):
        own, others = affinity_TE[first_T == expert, expert], affinity_TE[first_T != expert, expert]
        misranked.append(float((others[None] > own[:, None]).sum()))
        pairs.append(float(len(own) * len(others)))
    return misranked, pairs


@pytest.mark.parametrize("width", [128, 5120])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_misranked_pairs_against_all_pairs(width: int, shift: float) -> None:
    affinity_TE = isotropic(700, 4)
    affinity_TE[torch.arange(700), torch.arange(700) % 4] += shift
    affinity_TE /= math.sqrt(width)
    misranked_E, pairs_E = misranked_pairs(affinity_TE, width)
    misranked, pairs = exact_misranked(affinity_TE)
    assert pairs_E.tolist() == pairs
    share = [float(m) / p for m, p in zip(misranked_E, pairs, strict=True)]
    assert share == pytest.approx([m / p for m, p in zip(misranked, pairs, strict=True)], abs=0.003)


@pytest.mark.parametrize("experts", [2, 8, 64])
def test_isotropic_tokens_give_q_0(experts: int) -> None:
    affinity_TE = isotropic(20000, experts) / math.sqrt(128)
    misranked_E, pairs_E = misranked_pairs(affinity_TE, 128)
    assert float(misranked_E.sum() / pairs_E.sum()) == pytest.approx(1 / (2 * (experts + 1)), rel=0.05)


@pytest.mark.parametrize("bump, share", [(0.0, 1.0), (1.0, 0.90), (1.5, 0.74), (2.0, 0.54), (3.0, 0.18)])
def test_capacity_shrinks_as_experts_tell_their_tokens_apart(bump: float, share: float) -> None:
    """The planted bump of b / sqrt(D) on a token's own expert, E = 8, K = 1: the curve of the routing page."""
    tokens, width = 40000, 512
    affinity_TE = isotropic(tokens, 8)
    affinity_TE[torch.arange(tokens), torch.arange(tokens) % 8] += bump
    misranked_E, pairs_E = misranked_pairs(affinity_TE / math.sqrt(width), width)
    bound = build("etr_success", width=width, minimum=0.1)
    bound.update({"misranked": misranked_E, "pairs": pairs_E})
    static = build("static", width=width).capacities(4096)[0]
    capacity = sum(bound.capacities(4096)) / 8
    assert capacity / static == pytest.approx(share, abs=0.03)


def test_observation_looks_at_a_sample_of_a_large_batch() -> None:
    affinity_TE = isotropic(3 * bounds.LARGEST_SAMPLE // 4, 4) / 16
    assert bounds.sample(affinity_TE).numel() == bounds.LARGEST_SAMPLE
    seen = build("etr_success", 4).observe(affinity_TE.requires_grad_())
    assert not seen["pairs"].requires_grad
    assert float((seen["misranked"] / seen["pairs"]).mean()) == pytest.approx(0.1, abs=0.02)


def test_no_rows_observe_nothing() -> None:
    for mode in ("etr_bound", "etr_success"):
        bound = build(mode)
        seen = bound.observe(torch.empty(0, 8))
        assert all(not bool(value.any()) for value in seen.values())


def test_an_expert_without_pairs_keeps_its_estimate() -> None:
    bound = build("etr_success", 2, momentum=0.5)
    bound.update({"misranked": torch.tensor([1.0, 0.0]), "pairs": torch.tensor([10.0, 0.0])})
    assert bound.state()[1] == pytest.approx([0.1, 1 / 6])
    bound.update({"misranked": torch.tensor([0.0, 2.0]), "pairs": torch.tensor([0.0, 10.0])})
    assert bound.state()[1] == pytest.approx([0.1, 0.5 / 6 + 0.1])


def test_warm_up_keeps_the_static_capacity() -> None:
    bound = build("etr_success", warmup_steps=3, minimum=0.5)
    static = build("static").capacities(4096)
    for step in range(1, 6):
        bound.update({"misranked": torch.zeros(8), "pairs": torch.ones(8)})
        assert (bound.capacities(4096) == static) == (step < 3)
    assert bound.capacities(4096) == [256] * 8


def test_the_estimate_survives_a_checkpoint_and_both_go_on_alike() -> None:
    one, other = build("etr_success"), build("etr_success")
    seen = {"misranked": torch.linspace(0.01, 0.08, 8), "pairs": torch.full((8,), 1.5)}
    for _ in range(3):
        one.update(seen)
    other.limits(512, CPU)  # derived from the old state, and to be forgotten
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        assert torch.equal(other.limits(512, CPU).per_expert_E, one.limits(512, CPU).per_expert_E)
        assert other.state() == one.state()
        one.update(seen)
        other.update(seen)
    assert torch.equal(one.estimate, other.estimate)
    assert int(one.num_updates) == 6


# Theorem 5, by simulation: whether one relevant token among s reaches its expert

S, EXPERTS = 4096, 8


def success(
    p: float, q: float, capacity: int, *, token_choice: bool, by_affinity: bool = True, trials: int = 600
) -> float:
    """Share of trials in which the expert keeps the relevant token; each trial is an expert of its own.

    With token choice, the relevant token chooses the expert with probability p and each other one with 1/E; without,
    all are candidates. Another token outranks the relevant one with probability q.
    """
    generator = torch.Generator().manual_seed(0)

    def chance(probability: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < probability

    relevant = torch.randint(S, (trials,), generator=generator)
    affinity = torch.where(chance(q, trials, S), 1.0, -1.0)
    candidates = chance(1 / EXPERTS, trials, S) if token_choice else torch.ones(trials, S, dtype=torch.bool)
    own = torch.arange(trials), relevant
    affinity[own] = 0.0
    candidates[own] = chance(p, trials) if token_choice else True
    trial_A, token_A = candidates.nonzero(as_tuple=True)
    kept_A = keep_within(
        affinity[candidates],
        trial_A,
        trials,
        capacity_E=torch.full((trials,), capacity),
        drop="affinity" if by_affinity else "position",
    )
    return int(kept_A[token_A == relevant[trial_A]].sum()) / trials


@pytest.mark.parametrize("p, capacity, printed", [(0.6, 256, 0.316), (0.9, 256, 0.468), (0.99, 48, 0.086)])
def test_token_choice_alone_succeeds_as_often_as_there_is_room(p: float, capacity: int, printed: float) -> None:
    found = success(p, 0.5, capacity, token_choice=True, by_affinity=False)
    assert found == pytest.approx(p * min(1, EXPERTS * capacity / S), abs=0.05)
    assert found == pytest.approx(printed, abs=0.05)


@pytest.mark.parametrize("capacity, expected", [(256, 0.0), (563, 0.0), (1024, 1.0), (2048, 1.0)])
def test_expert_choice_alone_is_a_step_at_s_times_q(capacity: int, expected: float) -> None:
    assert success(1.0, 0.2, capacity, token_choice=False, trials=200) == expected


@pytest.mark.parametrize("p, q, capacity, printed", [(0.9, 0.05, 256, 0.902), (0.99, 0.005, 48, 0.989)])
def test_both_together_succeed_where_token_choice_alone_fails(
    p: float, q: float, capacity: int, printed: float
) -> None:
    assert success(p, q, capacity, token_choice=True) == pytest.approx(printed, abs=0.03)
    assert success(p, q, capacity, token_choice=True, by_affinity=False) < 0.5
