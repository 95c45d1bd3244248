"""Entropy of the routers against formulas written here, and which text the measures read."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamoe.common.errors import ConfigError
from megamoe.data.batch import Batch
from megamoe.data.loader import BatchLoader
from megamoe.data.manifest import check_prepared
from megamoe.eval.routing import Routed, describe, held_out, measure_entropy, on_routers, routed_layers
from megamoe.model.decoder import Decoder
from megamoe.testing.configs import tiny_config
from megamoe.testing.runs import prepared_run
from megamoe.training.setup import Runtime

Build = Callable[..., Decoder]


def test_the_numbers_of_a_block_by_hand() -> None:
    """20 tokens at 0.025, 0.075 ... 0.975 in some order: one of them is 5 %."""
    entropy_N = (torch.arange(20) * 7 % 20 * 0.05 + 0.025).float()
    found = describe(3, entropy_N, 0.95)
    assert (found.block, found.tokens, found.threshold_from) == (3, 20, "quantile")
    assert found.mean == pytest.approx(0.5)
    assert found.threshold == found.quantile == pytest.approx(0.975)
    assert found.uncertain_share == 0.05
    assert found.share_at == {"0.769": 0.25, "0.866": 0.15}, "0.775 ... 0.975, and 0.875 ... 0.975"
    values = [int(value * 32) for value in entropy_N.tolist()]
    assert found.histogram == tuple(values.count(place) for place in range(32))
    assert describe(3, entropy_N, 0.5).threshold == pytest.approx(0.525), "ten have at least this much"
    own = describe(3, entropy_N, 0.95, own=0.9)
    assert (own.threshold, own.threshold_from, own.uncertain_share) == (0.9, "broadcast", 0.1)
    assert own.quantile == found.quantile
    for values_N, quantile in ((entropy_N[:0], 0.95), (entropy_N, 0.0), (entropy_N, 1.0)):
        with pytest.raises(ValueError, match="no quantile"):
            describe(0, values_N, quantile)
    assert sum(describe(0, torch.tensor([0.0, 1.0]), 0.5).histogram) == 2, "the ends are inside"


def distribution(router: torch.nn.Module, row_D: Tensor, kind: str) -> list[float]:
    logits = [float(torch.dot(row_D.double(), vector.double())) for vector in router.weight]
    scores = [1 / (1 + math.exp(-v)) if kind == "sigmoid" else math.exp(v) for v in logits]
    return [score / sum(scores) for score in scores]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_every_token_but_padding(build: Build, batches: list[Batch], runtime: Runtime, kind: str) -> None:
    model = build(f"moe.router.score={kind}")
    rows: dict[int, list[Tensor]] = {0: [], 1: []}

    def keep(routed: Routed) -> None:
        real_T = [place for place in range(30) if place < 26]  # the last row is padded from its place 6 on
        rows[routed.block] += [routed.rows_TD[t] for t in real_T]

    with on_routers(model, keep):
        for batch in batches:
            model(*batch, each=True)
    report = measure_entropy(model, batches, runtime, quantile=0.9)
    assert [block.block for block in report.blocks] == [0, 1]
    for block in report.blocks:
        router = routed_layers(model)[block.block].router
        expected = []
        for row_D in rows[block.block]:
            shares = distribution(router, row_D, kind)
            expected.append(-sum(p * math.log(p) for p in shares) / math.log(8))
        assert block.tokens == len(expected) == 3 * 26
        assert block.mean == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        assert block.threshold == pytest.approx(sorted(expected)[-8], rel=1e-5), "ceil(0.1 * 78) = 8 tokens"
        assert block.uncertain_share == pytest.approx(8 / 78)
        assert block.share_at["0.769"] == pytest.approx(sum(value >= 0.769 for value in expected) / 78)
        assert sum(block.histogram) == 78
    assert report.thresholds == {block.block: block.threshold for block in report.blocks}
    assert report.as_dict()["blocks"][1]["mean"] == report.blocks[1].mean


def test_a_threshold_of_the_router_comes_first(build: Build, batches: list[Batch], runtime: Runtime) -> None:
    model = build("moe.broadcast={threshold: fixed, entropy: 0.5}")
    routed_layers(model)[0].router.broadcast.threshold.fill_(math.nan)  # as before a calibration
    first, second = measure_entropy(model, batches, runtime).blocks
    assert (first.threshold_from, second.threshold_from, second.threshold) == ("quantile", "broadcast", 0.5)


def test_what_has_no_routing_to_measure(build: Build, batches: list[Batch], runtime: Runtime) -> None:
    for model in (build("moe.num_experts=0"), build("moe.router.type=hash")):
        with pytest.raises(ConfigError, match="no routing to measure"):
            measure_entropy(model, batches, runtime)
    with pytest.raises(ValueError, match="evaluation mode"):
        measure_entropy(build().train(), batches, runtime)


def test_nothing_stays_on_the_model(build: Build, batches: list[Batch]) -> None:
    model = build()

    def fail(_: Routed) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), on_routers(model, fail):
        model(*batches[0], each=True)
    assert not any(layer.router._forward_hooks for layer in routed_layers(model).values())


def test_held_out_text_is_the_same_on_any_number_of_ranks(tmp_path: Path, runtime: Runtime) -> None:
    config = tiny_config(*prepared_run(tmp_path))
    loader = BatchLoader(config.data, check_prepared(config.data), "validation", 0)
    (available,) = loader.num_samples.values()

    def read(ranks: int, tokens: int) -> list[Batch]:
        """All ranks' batches in turn."""
        places = [dataclasses.replace(runtime, rank=rank, world_size=ranks) for rank in range(ranks)]
        dealt = [held_out(loader, tokens, 2, 32, place) for place in places]
        return [batch for batches in zip(*dealt, strict=True) for batch in batches]

    assert available > 5, "of 32 tokens"
    alone = read(1, 5 * 32)
    assert [len(batch.tokens_BS) for batch in alone] == [2, 2, 1]
    samples = loader.batch(0, 5)
    assert torch.equal(torch.cat([batch.tokens_BS for batch in alone]), samples[:, :-1])
    assert torch.equal(torch.cat([batch.labels_BS for batch in alone]), samples[:, 1:])
    together = read(2, 5 * 32)
    assert all(torch.equal(a.tokens_BS, b.tokens_BS) for a, b in zip(alone, together[:3], strict=True))
    assert (together[3].labels_BS < 0).all()
    assert (together[3].documents_BS < 0).all(), "a rank that is left without samples reads padding"
    assert sum(len(batch.tokens_BS) for batch in read(1, 10**6)) == available, "none twice"
    assert sum(len(batch.tokens_BS) for batch in read(1, 1)) == 1
