"""Layouts with tensor, context and expert tensor parallelism against one process, on the same micro-batches.

The ladder of whole topologies is `python -m megamoe parity`, whose last report is committed; here is what a small model
shows quickly, in fp64 where rounding could hide a small wrong term. Pipelines: `test_pipeline.py`.
"""

from __future__ import annotations

import functools

import pytest
import torch

from megamoe.config.run import RunConfig
from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.testing import parity
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import run_ranks

STEPS = 4
THOROUGH = pytest.mark.thorough
FP64 = ("training.precision=fp64",)
BF16 = ("training.precision=bf16",)
MIXED = (
    "model.num_layers=3",
    "model.ffn_size=48",
    "model.tie_embeddings=false",
    "moe.first_k_dense=1",
    "moe.num_shared_experts=1",
)
RESONANCE = ("moe.router.type=resonance",)
STATIC = (*RESONANCE, "moe.capacity.mode=static", "moe.router.threshold=0.9")
FOLLOWING = (*RESONANCE, "moe.capacity={mode: etr_success, momentum: 0.5, tile: 4}")
COSINE = (
    "moe.router={type: resonance, affinity: cosine, orthogonality_loss: 0.01}",
    "moe.capacity={mode: static, drop: random}",
)
SIGMOID = ("moe.router={type: topk, score: sigmoid, bias_update_rate: 0.001, z_loss: 0.001}",)
ROUTERS = {
    "sigmoid": SIGMOID,
    "expert_choice": ("moe.router.type=expert_choice", "moe.capacity={mode: static, factor: 1.0}"),
    "sinkhorn": ("moe.router.type=sinkhorn",),
    "hash": ("moe.router.type=hash",),
    "balanced": ("moe.router.type=balanced", "moe.capacity.mode=static"),
    "cosine": COSINE,
    "following": FOLLOWING,
}


def train(overrides: tuple[str, ...]) -> parity.ParityRun:
    return parity.train_steps(tiny_config(*overrides), STEPS)


@functools.cache
def reference(*settings: str) -> parity.ParityRun:
    return run_ranks(train, 1, ("parallel.zero_stage=0", *settings))[0]


def run(layout: str, *more: str) -> parity.ParityRun:
    """`layout` as in `4 tp2 ep4 zero_stage1`: ranks, then fields of `parallel` with their values."""
    ranks, *fields = layout.split()
    overrides = (f"parallel.{field[:-1]}={field[-1]}" for field in fields)
    return run_ranks(train, int(ranks), (*overrides, *more))[0]


@pytest.mark.parametrize(
    "layout",
    [
        "2 tp2 zero_stage0",
        pytest.param("2 tp2 ep2 zero_stage0", marks=THOROUGH),
        "4 tp4 ep2 zero_stage0",  # two key/value heads, four ranks
        "4 tp2 ep4 zero_stage0",  # experts over tp and dp
        "4 tp2 ep2 etp2 zero_stage0",
        pytest.param("2 etp2 zero_stage0", marks=THOROUGH),
        "2 cp2 ep2 zero_stage0",
        "4 cp2 tp2 ep4 zero_stage0",
        # Fewer heads to exchange than ranks: keys and values are repeated.
        pytest.param("4 cp4 zero_stage0", marks=THOROUGH),
    ],
)
def test_layouts_leave_only_rounding(layout: str) -> None:
    """Dense and MoE blocks, shared experts, an untied head, affinity routing with a capacity; in fp64."""
    parity.compare(run(layout, *MIXED, *STATIC, *FP64), reference(*MIXED, *STATIC, *FP64), parity.EXACT)


@pytest.mark.parametrize(
    "layout",
    [
        "2 tp2 ep2 zero_stage1",
        "4 tp2 ep2 etp2 zero_stage3",
        *(
            pytest.param(layout, marks=THOROUGH)
            for layout in (
                "2 tp2 ep2 zero_stage2",
                "2 tp2 ep2 zero_stage3",
                "4 tp2 ep4 zero_stage1",
                "4 etp2 ep2 zero_stage2",
                "4 cp2 tp2 ep2 zero_stage1",
                "2 cp2 ep2 zero_stage3",
            )
        ),
    ],
)
def test_zero_stages_equal_one_process(layout: str) -> None:
    """Clipping is active, so norms are right as well."""
    parity.compare(run(layout, *MIXED), reference(*MIXED))


@pytest.mark.parametrize("layout", ["2 tp2 ep2 zero_stage0", pytest.param("2 cp2 ep2 zero_stage0", marks=THOROUGH)])
@pytest.mark.parametrize("router", ROUTERS)
def test_routers_decide_on_the_whole_micro_batch(router: str, layout: str) -> None:
    parity.compare(run(layout, *ROUTERS[router], *FP64), reference(*ROUTERS[router], *FP64), parity.EXACT)


def packed(config: RunConfig, step: int, micro_batch: int) -> Batch:
    """Two documents and padding per sequence, of other lengths in every micro-batch; the first one is not learnt."""
    tokens_BS, labels_BS = parity.random_tokens(config, step, micro_batch)[:2]
    documents_BS = torch.full_like(tokens_BS, PADDING)
    documents_BS[:, : 7 + 3 * micro_batch], documents_BS[:, 7 + 3 * micro_batch : 14 + 5 * micro_batch] = 0, 1
    labels_BS = labels_BS.masked_fill(documents_BS < 1, IGNORED)
    return Batch(tokens_BS, labels_BS, documents_BS, targets=25.0)


def train_packed(overrides: tuple[str, ...]) -> parity.ParityRun:
    return parity.train_steps(tiny_config(*overrides), STEPS, packed)


@pytest.mark.parametrize("layout", ["2 ep2 zero_stage0", "2 tp2 ep2 zero_stage0"])
@pytest.mark.parametrize("router", ["hash", "balanced", "following"])
def test_padding_differs_between_micro_batches(router: str, layout: str) -> None:
    """A capacity is a share of the micro-batch with its padding, else ranks would not agree on sizes of an exchange."""
    settings = (*ROUTERS[router], "moe.capacity.mode=static", *FP64)
    one = run_ranks(train_packed, 1, ("parallel.zero_stage=0", *settings))[0]
    ranks, *fields = layout.split()
    overrides = (f"parallel.{field[:-1]}={field[-1]}" for field in fields)
    parity.compare(run_ranks(train_packed, int(ranks), (*overrides, *settings))[0], one, parity.EXACT)


@pytest.mark.parametrize("recompute", [pytest.param("full", marks=THOROUGH), "attention", "moe"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    again = (*FP64, f"training.recompute={recompute}")
    parity.compare(run("2 tp2 ep2 zero_stage0", *FOLLOWING, *again), reference(*FOLLOWING, *FP64), parity.EXACT)


@pytest.mark.parametrize(
    "layout, offload",
    [
        pytest.param("2 ep2 zero_stage1", ("parallel.offload_optimizer=true",), marks=THOROUGH),
        ("2 tp2 ep2 zero_stage2", ("parallel.offload_optimizer=true",)),
        ("2 ep2 zero_stage3", ("parallel.offload_optimizer=true", "parallel.offload_parameters=true")),
    ],
)
def test_offloading_changes_nothing(layout: str, offload: tuple[str, ...]) -> None:
    parity.compare(run(layout, *offload), reference())


@pytest.mark.parametrize(
    "layout",
    [
        "2 tp2 ep2 zero_stage1",
        *(pytest.param(name, marks=THOROUGH) for name in ("4 tp2 ep2 etp2 zero_stage2", "2 cp2 ep2 zero_stage3")),
    ],
)
def test_bf16_follows_fp32(layout: str) -> None:
    bf16, fp32 = run(layout, *BF16), reference()
    assert abs(bf16.losses[0] - fp32.losses[0]) < 5e-3
    assert bf16.norms[0] == pytest.approx(fp32.norms[0], rel=0.02)
    assert max(abs(a - b) for a, b in zip(bf16.losses, fp32.losses, strict=True)) < 3e-2
