"""Ten optimizer steps of every layout and ZeRO stage against one process, on the same micro-batches.

The reference is the same code on one rank without ZeRO; that the code on one rank is right is shown layer by layer in
tests/unit, and here once for the whole step against plain torch.
"""

from __future__ import annotations

import functools

import pytest
import torch

from megamoe.config import derive
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.moe.routers.base import Router
from megamoe.moe.routers.resonance import ResonanceRouter
from megamoe.ops import memory
from megamoe.testing import parity
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import run_ranks
from megamoe.training.schedule import lr_factor

STEPS = 10
FP64 = ("training.precision=fp64",)
ROUTERS = {
    "topk": (),
    "sigmoid_bias": (
        "moe.router.type=topk",
        "moe.router.score=sigmoid",
        "moe.router.bias_update_rate=0.001",
        "moe.router.z_loss=0.001",
    ),
    "resonance": ("moe.router.type=resonance",),
    "resonance_static": ("moe.router.type=resonance", "moe.capacity.mode=static", "moe.router.threshold=0.9"),
    # The bounds follow training from the second step on, and the exchange over ranks is padded to them.
    "etr_success": ("moe.router.type=resonance", "moe.capacity={mode: etr_success, momentum: 0.5, tile: 4}"),
    "etr_bound": ("moe.router.type=resonance", "moe.capacity={mode: etr_bound, momentum: 0.5, drop: random}"),
}
BASELINES = {
    "groups": (
        "moe.router.score=sigmoid",
        "moe.router.bias_update_rate=0.001",
        "moe.router.num_groups=4",
        "moe.router.top_groups=2",
    ),
    "expert_choice": ("moe.router.type=expert_choice", "moe.capacity.mode=static", "moe.capacity.factor=1.0"),
    "sinkhorn": ("moe.router.type=sinkhorn",),
    "hash": ("moe.router.type=hash",),
    "balanced": ("moe.router.type=balanced", "moe.capacity.mode=static"),
}
SETTINGS = ROUTERS | BASELINES


def train(overrides: tuple[str, ...]) -> parity.ParityRun:
    return parity.train_steps(tiny_config(*overrides), STEPS)


@functools.cache
def reference(router: str) -> parity.ParityRun:
    return run_ranks(train, 1, ("parallel.zero_stage=0", *SETTINGS[router]))[0]


@functools.cache
def exact_reference(router: str) -> parity.ParityRun:
    return run_ranks(train, 1, ("parallel.zero_stage=0", *SETTINGS[router], *FP64))[0]


def run(world_size: int, ep: int, stage: int, router: str, *more: str) -> parity.ParityRun:
    layout = (f"parallel.ep={ep}", f"parallel.zero_stage={stage}")
    return run_ranks(train, world_size, (*layout, *SETTINGS[router], *more))[0]


def plain_torch_step(overrides: tuple[str, ...]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and weights of one step by torch alone: no DeepSpeed, no accumulation, no ranks."""
    config = tiny_config(*overrides)
    model = Decoder(config, derive.vocab_size(config))
    initialise(model, config.model, config.training.seed)
    settings = config.training.optimizer
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": decay, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    lr = settings.lr * lr_factor(config.training.schedule, 1, config.training.steps)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps)
    outputs = [model(*parity.random_tokens(config, 0, m)) for m in range(4)]
    torch.stack([o.loss for o in outputs]).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
    assert norm > config.training.gradient_clipping, "clipping has to be active for this test to mean something"
    optimizer.step()
    loss = torch.stack([o.cross_entropy for o in outputs]).mean()
    return float(loss), float(norm), {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("router", ["topk", "resonance"])
def test_one_process_equals_plain_torch(router: str) -> None:
    loss, norm, weights = run_ranks(plain_torch_step, 1, ROUTERS[router])[0]
    one_step = run_ranks(train_one_step, 1, ROUTERS[router])[0]
    assert abs(one_step.losses[0] - loss) < 1e-6
    assert abs(one_step.norms[0] - norm) < 1e-5 * norm
    assert parity.worst_tensor(one_step.weights, weights).value < 5e-5


def train_one_step(overrides: tuple[str, ...]) -> parity.ParityRun:
    return parity.train_steps(tiny_config(*overrides), 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size, ep", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_layouts_equal_one_process(world_size: int, ep: int, stage: int) -> None:
    parity.compare(run(world_size, ep, stage, "topk"), reference("topk"))


@pytest.mark.parametrize(
    "router, world_size, ep, stage",
    [
        *(("sigmoid_bias", *layout) for layout in [(2, 2, 1), (4, 2, 2), (2, 2, 3), (4, 4, 1)]),
        *(("resonance", *layout) for layout in [(2, 2, 1), (4, 2, 2), (2, 2, 3), (4, 4, 1)]),
        *(("resonance_static", *layout) for layout in [(4, 2, 2), (2, 2, 3), (4, 4, 1)]),
        *(("etr_success", *layout) for layout in [(2, 2, 1), (4, 2, 3), (4, 4, 2)]),
    ],
)
def test_routers_equal_one_process(router: str, world_size: int, ep: int, stage: int) -> None:
    parity.compare(run(world_size, ep, stage, router), reference(router))


@pytest.mark.parametrize(
    "router, stage, recompute",
    [
        ("groups", 1, "none"),
        ("expert_choice", 1, "full"),
        ("expert_choice", 3, "none"),
        ("sinkhorn", 3, "full"),
        ("hash", 1, "full"),
        ("balanced", 3, "none"),
    ],
)
def test_baselines_equal_one_process(router: str, stage: int, recompute: str) -> None:
    """Also the routers that have no parameters at all, and when the tokens pass a router twice."""
    parity.compare(run(2, 2, stage, router, f"training.recompute={recompute}"), reference(router))


@pytest.mark.parametrize("router", ["expert_choice", "sinkhorn"])
def test_baselines_in_fp64(router: str) -> None:
    parity.compare(run(2, 2, 0, router, *FP64), exact_reference(router), parity.EXACT)


@pytest.mark.parametrize("router, stage", [("resonance", 1), ("resonance", 3), ("etr_success", 1), ("etr_bound", 3)])
def test_recomputation_changes_nothing(router: str, stage: int) -> None:
    """Nor does it move a running statistic twice: the bounds of the next steps would differ."""
    parity.compare(run(2, 2, stage, router, "training.recompute=full"), reference(router))


def train_with_recycled_gradients(overrides: tuple[str, ...]) -> parity.ParityRun:
    """As `train`, with every weight gradient of the experts in recycled memory, as those of large models are."""
    memory.WORTHWHILE_BYTES = 0
    return train(overrides)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recycled_gradients_equal_fresh_ones(stage: int) -> None:
    """Nothing keeps a gradient that the next step's is written over."""
    layout = ("parallel.ep=2", f"parallel.zero_stage={stage}")
    parity.compare(run_ranks(train_with_recycled_gradients, 2, layout)[0], reference("topk"))


@pytest.mark.parametrize("stage", [1, 3])
def test_mixed_blocks_equal_one_process(stage: int) -> None:
    """Dense and MoE blocks, shared experts, an output head of its own."""
    mixed = (
        "model.num_layers=3",
        "model.tie_embeddings=false",
        "moe.first_k_dense=1",
        "moe.every_n_layers=2",
        "moe.num_shared_experts=1",
    )
    one = run_ranks(train, 1, ("parallel.zero_stage=0", *mixed))[0]
    assert {name.split(".")[1] for name in one.weights if ".experts." in name} == {"2"}
    parity.compare(run(2, 2, stage, "topk", *mixed), one)


def train_with_statistics(overrides: tuple[str, ...]) -> tuple[parity.ParityRun, set[torch.dtype]]:
    """As `train`, and the dtypes of the routers' running statistics once the engine has the model."""
    dtypes: set[torch.dtype] = set()
    update = Router.update

    def observe(self: ResonanceRouter, observations: dict[str, torch.Tensor]) -> None:
        dtypes.add(self.token_mean_D.dtype)
        update(self, observations)

    ResonanceRouter.update = observe  # type: ignore[method-assign]
    return train(overrides), dtypes


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(stage: int) -> None:
    """bf16 cannot be equal: choices flip at near ties. The first loss is close, the norm within bf16's resolution,
    and the routers' statistics stay in fp32."""
    overrides = ("parallel.ep=2", f"parallel.zero_stage={stage}", "training.precision=bf16", *ROUTERS["resonance"])
    bf16, dtypes = run_ranks(train_with_statistics, 2, overrides)[0]
    fp32 = reference("resonance")
    assert abs(bf16.losses[0] - fp32.losses[0]) < 5e-3
    assert abs(bf16.norms[0] - fp32.norms[0]) < 0.05 * fp32.norms[0]
    assert max(abs(a - b) for a, b in zip(bf16.losses, fp32.losses, strict=True)) < 3e-2
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    "router, world_size, ep",
    [*((router, 4, 2) for router in ROUTERS), ("topk", 2, 1), ("topk", 2, 2), ("resonance", 2, 2)],
)
def test_fp64_leaves_only_its_rounding(router: str, world_size: int, ep: int) -> None:
    """What is left between layouts in fp32 is rounding: with 29 more bits it shrinks as much, to 3e-15 where measured.

    No bound that fits fp32 could tell a small wrong term from rounding; these can.
    """
    parity.compare(run(world_size, ep, 0, router, *FP64), exact_reference(router), parity.EXACT)


def test_fp64_follows_fp32() -> None:
    parity.compare(exact_reference("topk"), reference("topk"))


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_balance_loss_counts_once_whatever_the_accumulation(micro_batch_size: int) -> None:
    """Its coefficient is raised until it dominates: counted per micro-batch instead of averaged it would show."""
    strong = ("moe.router.balance_loss=5.0", f"training.micro_batch_size={micro_batch_size}")
    one = run_ranks(train, 1, ("parallel.zero_stage=0", *strong))[0]
    parity.compare(run(2, 2, 1, "topk", *strong), one)
    assert one.auxiliary[0] > 0.5 * one.losses[0]


def test_experts_differ_between_ranks_after_training() -> None:
    """The silent failure of a missing marker: all experts of the ranks averaged into one."""
    weight = run(2, 2, 1, "topk").weights["blocks.0.ffn.experts.w1"]
    first, second = weight.chunk(2)
    assert not torch.equal(first, second)


def test_a_flip_is_named() -> None:
    one = reference("topk")
    place = next(iter(one.choices))
    flipped = parity.ParityRun(**{**vars(one), "choices": {**one.choices, place: one.choices[place].roll(1, dims=1)}})
    with pytest.raises(AssertionError, match=r"routing flips.*\n.*margin"):
        parity.compare(flipped, one)


def test_a_wrong_gradient_is_named() -> None:
    one = reference("topk")
    name = "blocks.1.ffn.experts.w2"
    wrong = parity.ParityRun(**{**vars(one), "gradients": {**one.gradients, name: one.gradients[name] * 1.01}})
    with pytest.raises(AssertionError, match=name):
        parity.compare(wrong, one)
