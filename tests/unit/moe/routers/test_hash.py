"""Hash routing: the table, and the plan that follows from it."""

import pytest
import torch

from megamoe.config.moe import CapacityConfig
from megamoe.config.routers import HashRouterConfig
from megamoe.moe.routers.base import RouterSize, Rows
from megamoe.moe.routers.hash import HashRouter, hash_table

VOCABULARY, WIDTH = 103, 8


def build(experts: int = 6, top_k: int = 2, vocabulary: int = VOCABULARY, seed: int = 0) -> HashRouter:
    size = RouterSize(WIDTH, experts, top_k, vocabulary)
    return HashRouter(HashRouterConfig(seed=seed), size, CapacityConfig())


@pytest.mark.parametrize("experts, top_k", [(6, 1), (6, 2), (6, 6), (1, 1), (64, 8), (128, 3)])
def test_every_entry_has_different_experts_and_every_expert_as_many_entries(experts: int, top_k: int) -> None:
    table = hash_table(0, VOCABULARY, experts, top_k).tolist()
    assert len(table) == VOCABULARY
    assert all(len(set(row)) == top_k for row in table)
    counts = [sum(expert in row for row in table) for expert in range(experts)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == VOCABULARY * top_k


def test_consecutive_entries_use_every_expert_equally() -> None:
    for block in hash_table(0, 60, 6, 2).split(6):
        assert torch.bincount(block.flatten(), minlength=6).tolist() == [2] * 6


def test_the_table_follows_from_the_seed() -> None:
    assert torch.equal(hash_table(3, 50, 8, 2), hash_table(3, 50, 8, 2))
    assert not torch.equal(hash_table(3, 50, 8, 2), hash_table(4, 50, 8, 2))


def test_which_experts_meet_is_by_chance() -> None:
    met = {tuple(sorted(row)) for row in hash_table(0, 400, 6, 2).tolist()}
    assert len(met) == 15, "each two of six"


@pytest.mark.parametrize("training", [True, False])
def test_a_token_goes_where_its_entry_says_with_equal_weights(training: bool) -> None:
    router = build().train(training)
    tokens_T = torch.tensor([5, 102, 5, 0, 77])
    plan = router(torch.zeros(5, WIDTH), Rows(tokens_T))
    table = hash_table(0, VOCABULARY, 6, 2).tolist()
    expected = sorted((expert, t) for t, token in enumerate(tokens_T.tolist()) for expert in table[token])
    assert list(zip(plan.expert_ids_A.tolist(), plan.token_ids_A.tolist(), strict=True)) == expected
    assert plan.weights_A.tolist() == [0.5] * 10
    assert not bool(plan.logits_TE.any())
    assert plan.losses == plan.observations == {}


def test_nothing_is_learned_or_stored() -> None:
    router = build()
    assert list(router.parameters()) == []
    assert router.state_dict() == {}


def test_without_a_vocabulary_or_tokens_there_is_no_plan() -> None:
    with pytest.raises(ValueError, match="size of the vocabulary"):
        build(vocabulary=0)
    with pytest.raises(ValueError, match="vocabulary entries"):
        build()(torch.zeros(3, WIDTH))
