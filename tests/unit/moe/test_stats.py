"""What a layer reports, by hand."""

import math

import pytest
import torch

from megamoe.moe import stats
from megamoe.testing import assert_close


def reported(pairs: list[tuple[int, int]], tokens: int, on_node: list[bool] | None = None) -> dict[str, list[float]]:
    """Of (expert, token) pairs, with K = 2 of 4 experts."""
    experts = torch.tensor([e for e, _ in pairs], dtype=torch.int64)
    on_node_E = None if on_node is None else torch.tensor(on_node)
    served_T = torch.bincount(torch.tensor([t for _, t in pairs], dtype=torch.int64), minlength=tokens)
    metrics = stats.dispatch_metrics(torch.bincount(experts, minlength=4), served_T, 2, on_node_E)
    return {name: value.reshape(-1).tolist() for name, (value, _) in metrics.items()}


def test_dropped_and_unserved_tokens() -> None:
    """Token 0 has both experts, token 1 one of two, token 2 none."""
    found = reported([(0, 0), (0, 1), (3, 0)], 3)
    assert found["drop_share"] == pytest.approx([3 / 6])
    assert found["unserved_share"] == pytest.approx([1 / 3])
    assert found["load"] == pytest.approx([4 / 3, 0.0, 0.0, 2 / 3])
    assert found["max_load"] == pytest.approx([4 / 3])
    assert "node_share" not in found


def test_experts_beyond_k_do_not_hide_what_others_lack() -> None:
    """As many rows as choices, but token 0 has all four experts and token 1 none."""
    found = reported([(0, 0), (1, 0), (2, 0), (3, 0)], 2)
    assert found["drop_share"] == found["unserved_share"] == [0.5]


def test_share_of_the_rows_that_stay_on_the_node() -> None:
    on_node = [True, False, False, True]
    assert reported([(0, 0), (1, 0), (1, 1), (3, 1)], 2, on_node)["node_share"] == [0.5]
    assert reported([], 0, on_node)["node_share"] == [0.0]


def test_affinities_fall_into_bins_of_their_deviation() -> None:
    width = 16  # times 4: a bin of the histogram is 1/8 of an affinity wide
    affinity_TK = torch.tensor([[0.0, 0.13], [-1.99, 5.0]])
    shares = stats.affinity_histogram(affinity_TK, width).tolist()
    assert {place: share for place, share in enumerate(shares) if share} == {0: 0.25, 16: 0.25, 17: 0.25, 31: 0.25}
    assert not any(stats.affinity_histogram(torch.empty(0, 2), width).tolist())


def test_similarity_of_experts() -> None:
    assert stats.expert_similarity(torch.eye(3)).item() == 0.0
    assert stats.expert_similarity(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).item() == pytest.approx(1.0)
    third = math.cos(math.pi / 3)
    vectors_ED = torch.tensor([[1.0, 0.0], [third, math.sin(math.pi / 3)], [0.0, 1.0]])
    assert_close(stats.expert_similarity(vectors_ED), torch.tensor((third + 0.0 + math.cos(math.pi / 6)) / 3), rel=1e-5)
    assert stats.expert_similarity(torch.ones(1, 5)).item() == 0.0
