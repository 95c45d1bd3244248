"""Bytes sent per step: by hand where the sum is short, and the parts that mirror code which needs torch against it.

tests/dist/test_traffic.py holds the whole against what ranks send.
"""

from __future__ import annotations

import pytest
import torch

from megamoe.config import derive
from megamoe.config.describe import describe
from megamoe.config.traffic import capacity, largest, sent_by_stage, totals
from megamoe.config.weights import rank_weights, trained
from megamoe.model.decoder import Decoder
from megamoe.moe.bounds import build_bound
from megamoe.moe.placement import ExpertParallel, Placement
from megamoe.parallel.axis import Axis
from megamoe.parallel.shards import shards_of
from megamoe.testing.configs import tiny_config

# 2 MoE blocks, D 32, S 32, E 8, K 2, V 320, micro-batches of 2 sequences, 8 sequences per step, fp32.


def test_one_rank_sends_nothing() -> None:
    assert sent_by_stage(tiny_config(), 1) == ({},)


def test_tensor_parallelism_by_hand() -> None:
    (sent,) = sent_by_stage(tiny_config("parallel.tp=2"), 2)
    rows_bytes = 32 * 32 * 4  # a rank's half of the 64 positions of a micro-batch
    assert sent["tp"] == {
        # 4 micro-batches; 2 attentions with 2 meetings per pass, embedding and head with 1 each
        "sequences": 4 * rows_bytes * (2 * 4 + 2 * 2),
        "cross entropy": 4 * 3 * 64 * 4,
        # 5 norms and 2 routers; a sum over 2 ranks sends every element once
        "gradients of whole weights": 4 * (5 * 32 + 2 * 8 * 32) * 4,
    }
    assert sent["micro_batch"] == {"router scores": 4 * 2 * 32 * 8 * 4}


def test_expert_parallelism_by_hand() -> None:
    (sent,) = sent_by_stage(tiny_config("parallel.ep=4", "training.micro_batch_size=1"), 4)
    away = 32 * 2 * 3 / 4  # of 64 assignments of a micro-batch those of experts elsewhere
    passes = 2 * 2 * 2  # micro-batches, blocks, directions
    assert sent["ep"] == {
        "rows to experts": passes * away * (32 * 4 + 4),
        "rows back": passes * away * 32 * 4,
        "numbers of rows": 2 * 2 * 3 * 2 * 8,
    }
    assert "edp" not in sent


def test_stages_differ_and_the_largest_is_shown() -> None:
    first, last = sent_by_stage(tiny_config("parallel.pp=2", "model.tie_embeddings=false"), 2)
    hidden = 4 * 2 * 32 * 32 * 4
    assert first["pp"] == {"hidden states": hidden}
    assert last["pp"] == {"their gradients": hidden}
    assert totals(largest([{"pp": {"a": 1.0}}, {"pp": {"b": 2.0}, "tp": {"c": 3.0}}])) == {"pp": 2.0, "tp": 3.0}


def test_frozen_weights_have_no_gradients_to_send() -> None:
    everything, experts = tiny_config(), tiny_config('training.trainable=["*.experts.*"]')
    (sent,) = sent_by_stage(experts, 2)
    sizes = [w.size for w in rank_weights(experts, 0, 2) if w.kind == "experts"]
    assert sent["dp"] == {"gradients": 4 * sum(sizes), "weights": 2 * sum(sizes)}
    assert sent["dp"]["gradients"] < sent_by_stage(everything, 2)[0]["dp"]["gradients"]
    assert {w.kind for w in trained(experts, rank_weights(experts, 0, 2))} == {"experts"}


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("moe.num_shared_experts=2", "moe.first_k_dense=1", "model.tie_embeddings=false"),
        ("moe.router.type=resonance",),
        ("moe.router.type=resonance", "moe.router.affinity=cosine", "moe.router.learn_scale=false"),
        ("moe.router.type=resonance", "moe.router.affinity=grap"),
        ("moe.router.type=hash", "model.num_kv_heads=1"),
        ("moe.num_experts=0",),
    ],
)
@pytest.mark.parametrize("tp, ep", [(1, 1), (2, 1), (2, 2)])
def test_weights_are_the_model_s(settings: tuple[str, ...], tp: int, ep: int) -> None:
    ep = ep if "moe.num_experts=0" not in settings else 1
    config = tiny_config(*settings, f"parallel.tp={tp}", f"parallel.ep={ep}")
    with torch.device("meta"):
        model = Decoder(config, derive.vocab_size(config), Placement(ExpertParallel(ep), Axis(tp)))
    weights = rank_weights(config, 0, config.model.num_layers)
    assert {w.name: w.shape for w in weights} == {name: tuple(p.shape) for name, p in model.named_parameters()}
    if tp > 1:
        whole = {name for name, parameter in model.named_parameters() if not shards_of(parameter)}
        assert {w.name for w in weights if w.kind == "whole"} == whole


@pytest.mark.parametrize("factor, tile, top_k", [(1.1, 16, 2), (1.0, 4, 1), (2.5, 16, 4), (0.3, 1, 2)])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000, 4096])
def test_capacity_is_the_static_bound_s(factor: float, tile: int, top_k: int, rows: int) -> None:
    config = tiny_config(
        "moe.router.type=resonance",
        f"moe.capacity={{mode: static, factor: {factor}, tile: {tile}}}",
        f"moe.top_k={top_k}",
    )
    bound = build_bound(config.moe.capacity, 8, top_k, 32)
    assert bound is not None
    limits = bound.limits(rows, torch.device("cpu"))
    assert capacity(config, rows) == (int(limits.per_expert_E[0]), limits.slots)


def test_the_table_has_the_axes_with_more_than_one_rank() -> None:
    config = tiny_config("parallel.tp=2", "parallel.ep=2", "parallel.pp=2")
    section = describe(config, 4, "").partition("Bytes sent per step and rank (estimate)\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in section.splitlines()[2:6]] == ["tp", "cp", "ep", "pp"]
    assert "if every expert gets as many" in section
    assert "the stage that sends most" in section
    assert "Bytes sent" not in describe(tiny_config(), 1, "")
