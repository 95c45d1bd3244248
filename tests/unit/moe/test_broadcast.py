"""Which tokens are broadcast and with which weights, against loops over tokens and sequences."""

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.config.moe import BroadcastConfig
from megamoe.moe.broadcast import ENTROPY_BINS, Broadcast, normalised_entropy
from megamoe.moe.layer import sequences
from megamoe.testing import assert_close, assert_equal_bits

EXPERTS = 6
DOCUMENTS = [
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 1, 1, 2, -1],
    [0, 1, 1, 1, 1, 1, 1, -1, -1, -1],
    [-1, -1, -1, -1, -1, -1, -1, -1, -1, -1],
    [0, 0, -1, 1, 1, 1, -1, -1, 2, 2],
]
TOKENS = 50


def distributions(seed: int = 0, number: int = TOKENS) -> Tensor:
    """fp64, from nearly one-hot to nearly uniform; every third is the one before again, so entropies tie."""
    generator = torch.Generator().manual_seed(seed)
    sharpness_T1 = 4 * torch.rand(number, 1, generator=generator, dtype=torch.float64)
    probs_TE = (sharpness_T1 * torch.randn(number, EXPERTS, generator=generator).double()).softmax(-1)
    probs_TE[2::3] = probs_TE[1::3][: len(probs_TE[2::3])]
    return probs_TE


def numbers() -> Tensor:
    """The sequence of each row, from documents that are numbered within their rows."""
    documents_BS = torch.tensor(DOCUMENTS)
    sequences_T = sequences(torch.empty(*documents_BS.shape, 3), documents_BS)
    assert sequences_T is not None
    return sequences_T


def broadcast(layer: int = 0, **settings: Any) -> Broadcast:
    given: dict[str, Any] = {"threshold": "fixed", "entropy": 0.7} | settings
    return Broadcast(BroadcastConfig(**given), EXPERTS, layer)


# Entropy


def test_entropy_of_one_hot_is_0_and_of_uniform_1() -> None:
    for dtype in (torch.float32, torch.float64):
        assert normalised_entropy(torch.eye(EXPERTS, dtype=dtype)).tolist() == [0.0] * EXPERTS
        uniform_TE = torch.full((2, EXPERTS), 1 / EXPERTS, dtype=dtype)
        assert_close(normalised_entropy(uniform_TE), torch.ones(2), abs=1e-6)
        assert float(normalised_entropy(uniform_TE).max()) <= 1.0


def test_entropy_is_as_defined_and_without_gradient() -> None:
    probs_TE = distributions().requires_grad_()
    found_T = normalised_entropy(probs_TE)
    assert not found_T.requires_grad
    for row_E, found in zip(probs_TE.tolist(), found_T.tolist(), strict=True):
        assert found == pytest.approx(-sum(p * math.log(p) for p in row_E) / math.log(EXPERTS), rel=1e-12)


# Sequences


def test_rows_of_a_document_share_a_number_that_no_other_document_has() -> None:
    found = numbers().tolist()
    labels = [(row, d) for row, documents in enumerate(DOCUMENTS) for d in documents]
    assert all((number < 0) == (d < 0) for number, (_, d) in zip(found, labels, strict=True))
    pairs = {(number, label) for number, label in zip(found, labels, strict=True) if number >= 0}
    assert len(pairs) == len({number for number, _ in pairs}) == len({label for _, label in pairs})
    assert max(found) < TOKENS


def test_without_documents_each_row_of_tokens_is_a_sequence() -> None:
    found_T = sequences(torch.empty(3, 4, 2), None)
    assert found_T is not None
    assert len(set(found_T.tolist())) == 3
    assert all(len(set(row)) == 1 for row in found_T.view(3, 4).tolist())
    assert sequences(torch.empty(4, 2), None) is None


# Slots


def literal_slots(entropy: list[float], sequence: list[int], of: Broadcast) -> set[int]:
    """Sequence by sequence, exact in the number of slots."""
    chosen: set[int] = set()
    for number in set(sequence) - {n for n in sequence if n < 0}:
        places = [t for t, n in enumerate(sequence) if n == number]
        uncertain = [t for t in places if entropy[t] >= float(of.threshold)]
        if of.config.slots == "highest_entropy":
            uncertain.sort(key=lambda t: (-entropy[t], t))
        chosen |= set(uncertain[: math.ceil(Fraction(str(of.config.max_share)) * len(places))])
    return chosen


@pytest.mark.parametrize("slots", ["first", "highest_entropy"])
@pytest.mark.parametrize("max_share", [0.05, 0.1, 0.2, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("entropy", [0.0, 0.5, 0.8])
def test_slots_against_a_loop(slots: str, max_share: float, entropy: float) -> None:
    sequences_T, capped = numbers(), 0
    for seed in range(5):
        probs_TE, of = distributions(seed), broadcast(slots=slots, max_share=max_share, entropy=entropy)
        decision = of.decide(probs_TE, sequences_T)
        entropy_T = normalised_entropy(probs_TE)
        expected = literal_slots(entropy_T.tolist(), sequences_T.tolist(), of)
        assert set(decision.chosen_T.nonzero().flatten().tolist()) == expected
        assert decision.uncertain_T.tolist() == ((entropy_T >= of.threshold) & (sequences_T >= 0)).tolist()
        assert decision.real_T.tolist() == [d >= 0 for row in DOCUMENTS for d in row]
        capped += int((decision.uncertain_T & ~decision.chosen_T).sum())
        assert len(expected) > 0
    assert (capped > 0) == (max_share < 1)


def test_a_slot_is_not_gained_by_rounding() -> None:
    """0.07 * 100 is a little more than 7 in floating point."""
    probs_TE = distributions(number=100)
    assert int(broadcast(max_share=0.07, entropy=0.0).decide(probs_TE, None).chosen_T.sum()) == 7
    assert int(broadcast(max_share=0.071, entropy=0.0).decide(probs_TE, None).chosen_T.sum()) == 8


def test_equal_entropies_go_to_the_earlier_token() -> None:
    probs_TE = torch.full((8, EXPERTS), 1 / EXPERTS)
    sequences_T = torch.tensor([0, 4, 0, 4, 0, 4, -1, 4])
    for of in (
        broadcast(max_share=0.5),
        broadcast(max_share=0.5, slots="first"),
        broadcast(max_share=0.5, choose="lowest_entropy"),
    ):
        decision = of.decide(probs_TE, sequences_T)
        assert decision.chosen_T.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_the_threshold_itself_is_uncertain_and_an_unknown_one_nobody() -> None:
    probs_TE, of = distributions().float(), broadcast(max_share=1.0)
    entropy_T = normalised_entropy(probs_TE)
    of.threshold.fill_(float(entropy_T[7]))
    assert bool(of.decide(probs_TE, None).chosen_T[7])
    unknown = Broadcast(BroadcastConfig(), EXPERTS)
    assert bool(unknown.threshold.isnan())
    assert not bool(unknown.decide(probs_TE, None).uncertain_T.any())
    assert "threshold" in unknown.state_dict()


def test_no_tokens_are_no_problem() -> None:
    for choose in ("uncertain", "random", "lowest_entropy"):
        of = broadcast(choose=choose, top_m=2)
        decision = of.decide(torch.empty(0, EXPERTS), torch.empty(0, dtype=torch.int64))
        assert of.rows(decision, torch.empty(0, EXPERTS), torch.empty(0, 2)).weights_UE.shape == (0, EXPERTS)
        metrics = of.metrics(decision, torch.zeros(len(decision.chosen_T), dtype=torch.int64), 2)
        assert all(not bool(value.any()) for value, _ in metrics.values())


# Other choices, for comparison


def per_sequence(chosen_T: Tensor) -> Counter[int]:
    return Counter(numbers()[chosen_T].tolist())


def chosen(probs_TE: Tensor, token_ids_T: Tensor, layer: int = 0, **settings: Any) -> Tensor:
    return broadcast(layer, max_share=0.3, **settings).decide(probs_TE, numbers(), token_ids_T).chosen_T


@pytest.mark.parametrize("choose", ["random", "lowest_entropy"])
def test_others_are_as_many_in_each_sequence(choose: str) -> None:
    tokens_T = torch.arange(TOKENS)
    for seed in range(8):
        probs_TE = distributions(seed)
        uncertain_T, other_T = chosen(probs_TE, tokens_T), chosen(probs_TE, tokens_T, choose=choose)
        assert per_sequence(other_T) == per_sequence(uncertain_T)
        assert len(set(per_sequence(uncertain_T).values())) > 1, "sequences differ in how many they have"
        assert other_T.tolist() != uncertain_T.tolist()


def test_the_lowest_entropies_are_chosen() -> None:
    probs_TE = distributions()
    entropy, sequence = normalised_entropy(probs_TE).tolist(), numbers().tolist()
    found_T = chosen(probs_TE, torch.arange(TOKENS), choose="lowest_entropy")
    for number, wanted in per_sequence(chosen(probs_TE, torch.arange(TOKENS))).items():
        places = sorted((t for t in range(TOKENS) if sequence[t] == number), key=lambda t: (entropy[t], t))
        assert {t for t in places if found_T[t]} == set(places[:wanted])


def test_random_tokens_are_the_same_again_and_others_elsewhere() -> None:
    probs_TE, tokens_T = distributions(), torch.arange(TOKENS)
    first_T = chosen(probs_TE, tokens_T, choose="random")
    assert chosen(probs_TE, tokens_T.clone(), choose="random").tolist() == first_T.tolist()
    assert chosen(probs_TE, tokens_T, layer=1, choose="random").tolist() != first_T.tolist()
    assert chosen(probs_TE, tokens_T + 1, choose="random").tolist() != first_T.tolist()


def test_random_tokens_are_any_but_padding() -> None:
    probs_TE = torch.full((TOKENS, EXPERTS), 1 / EXPERTS)
    draws = [chosen(probs_TE, torch.full((TOKENS,), batch), choose="random") for batch in range(300)]
    shares_T = torch.stack(draws).double().mean(0)
    sizes, real_T = Counter(numbers().tolist()), numbers() >= 0
    expected_T = torch.tensor([math.ceil(0.3 * sizes[n]) / sizes[n] for n in numbers().tolist()]).double() * real_T
    # Six standard deviations of a mean over 300.
    assert float((shares_T - expected_T).abs().max()) < 6 * 0.5 / math.sqrt(300)
    assert not bool(shares_T[~real_T].any())


# Weights


def test_weights_are_the_whole_distribution() -> None:
    probs_TE, of = distributions().requires_grad_(), broadcast(max_share=1.0)
    decision = of.decide(probs_TE, None)
    rows = of.rows(decision, probs_TE, torch.rand(TOKENS, 2))
    assert rows.token_ids_U.tolist() == [t for t in range(TOKENS) if decision.chosen_T[t]]
    assert_equal_bits(rows.weights_UE, probs_TE[decision.chosen_T])
    assert rows.weights_UE.requires_grad


@pytest.mark.parametrize("top_m", [2, 4, EXPERTS])
def test_top_m_leaves_the_best_and_their_proportions(top_m: int) -> None:
    probs_TE, of = distributions().requires_grad_(), broadcast(max_share=1.0, top_m=top_m)
    rows = of.rows(of.decide(probs_TE, None), probs_TE, torch.rand(TOKENS, 2))
    for token, weights_E in zip(rows.token_ids_U.tolist(), rows.weights_UE, strict=True):
        best = probs_TE[token].topk(top_m).indices
        assert set(weights_E.nonzero().flatten().tolist()) == set(best.tolist())
        assert_close(weights_E[best], probs_TE[token, best] / probs_TE[token, best].sum(), rel=1e-14)
    assert_close(rows.weights_UE.sum(1), torch.ones(len(rows.token_ids_U)), abs=1e-14)


@pytest.mark.parametrize("top_m", [None, 3])
def test_match_topk_gives_the_sum_of_the_usual_weights(top_m: int | None) -> None:
    probs_TE, weights_TK = distributions(), torch.rand(TOKENS, 2, dtype=torch.float64)
    rows = [
        of.rows(of.decide(probs_TE, None), probs_TE, weights_TK)
        for of in (broadcast(top_m=top_m, scale=scale) for scale in ("match_topk", "sum1"))
    ]
    assert_close(rows[0].weights_UE.sum(1), weights_TK[rows[0].token_ids_U].sum(1), rel=1e-14)
    assert_close(rows[0].weights_UE, rows[1].weights_UE * weights_TK[rows[0].token_ids_U].sum(1, True), rel=1e-14)


# Metrics


def test_metrics_count_tokens_and_no_padding() -> None:
    probs_TE, of = distributions(), broadcast(max_share=0.2)
    decision, real_T = of.decide(probs_TE, numbers()), numbers() >= 0
    # Token t keeps t mod 3 of its 2 choices at most; the broadcast ones have none and lack none.
    served = [0 if decision.chosen_T[t] else min(2, t % 3) for t in range(TOKENS)]
    metrics = of.metrics(decision, torch.tensor(served), 2)
    assert {how for _, how in metrics.values()} == {"mean"}
    values, real = {name: value for name, (value, _) in metrics.items()}, int(real_T.sum())
    entropy = normalised_entropy(probs_TE).tolist()
    assert values["uncertain_share"].item() == pytest.approx(
        sum(e >= 0.7 for e, is_real in zip(entropy, real_T.tolist(), strict=True) if is_real) / real
    )
    assert values["broadcast_share"].item() == pytest.approx(int(decision.chosen_T.sum()) / real)
    histogram = values["entropy_histogram"].tolist()
    assert sum(histogram) == pytest.approx(1.0)
    for place, share in enumerate(histogram):
        inside = [e for e, is_real in zip(entropy, real_T.tolist(), strict=True) if is_real]
        assert share == pytest.approx(sum(min(ENTROPY_BINS - 1, int(e * ENTROPY_BINS)) == place for e in inside) / real)
    lacking = {t: 2 - served[t] for t in range(TOKENS) if not decision.chosen_T[t]}
    uncertain = sum(n for t, n in lacking.items() if decision.uncertain_T[t])
    assert 0 < uncertain < sum(lacking.values())
    assert values["dropped_uncertain"].item() == pytest.approx(uncertain / sum(lacking.values()))
