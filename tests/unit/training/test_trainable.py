"""Which parameters are trained, and what the patterns are refused for."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megamoe.common.errors import CheckpointError, ConfigError
from megamoe.config.run import RunConfig
from megamoe.model.decoder import Decoder
from megamoe.moe.placement import ExpertParallel, Placement
from megamoe.moe.routers.base import Router
from megamoe.testing.configs import tiny_config
from megamoe.training.checkpoint.folder import Manifest
from megamoe.training.checkpoint.load import check
from megamoe.training.checkpoint.saver import topology_of
from megamoe.training.optimizer import parameter_groups
from megamoe.training.state import TrainState
from megamoe.training.trainable import select_trainable

MIXED = ("model.num_layers=2", "moe.first_k_dense=1", "moe.num_shared_experts=1")
ROUTER = ('training.trainable=["*.router.*"]',)
EXPERTS = ('training.trainable=["*.experts.*"]',)
BROADCAST = "moe.broadcast={threshold: fixed}"


def build(*overrides: str) -> tuple[Decoder, RunConfig]:
    config = tiny_config(*MIXED, *overrides)
    return Decoder(config, 320), config


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def select(*overrides: str) -> set[str]:
    model, config = build(*overrides)
    select_trainable(model, config)
    return trained(model)


def test_all_by_default() -> None:
    model, config = build()
    selection = select_trainable(model, config)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert selection.trained == selection.total == sum(p.numel() for p in model.parameters())
    assert selection.trained == selection.total


def test_experts_only() -> None:
    """Routed ones: shared experts and dense feed-forwards have other names."""
    names = select(*EXPERTS)
    assert names == {f"blocks.1.ffn.experts.w{i}" for i in (1, 2, 3)}


def test_router_only() -> None:
    assert select(*ROUTER) == {"blocks.1.ffn.router.weight"}


def test_frozen_beats_trainable() -> None:
    names = select('training.trainable=["blocks.1.*", "embedding.weight"]', 'training.frozen=["*.ffn.*"]')
    attention = {f"blocks.1.attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")}
    assert names == {"embedding.weight", "blocks.1.attention_norm.weight", "blocks.1.ffn_norm.weight"} | attention


def test_selecting_again_forgets_the_first_selection() -> None:
    model, config = build(*ROUTER)
    select_trainable(model, config)
    select_trainable(model, tiny_config(*MIXED))
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert not any(module.frozen for module in model.modules() if isinstance(module, Router))


def test_experts_of_all_ranks_are_counted() -> None:
    config = tiny_config(*MIXED, "parallel.ep=2", *EXPERTS)
    selection = select_trainable(Decoder(config, 320, Placement(ExpertParallel(2, 1, None, (0, 1)))), config)
    whole, alone = build(*EXPERTS)
    assert selection == select_trainable(whole, alone)
    assert selection.trained == 3 * 8 * 24 * 32
    assert str(selection) == f"training 18,432 of {selection.total:,} parameters ({18432 / selection.total:.1%})"


@pytest.mark.parametrize(
    "overrides, frozen",
    [
        pytest.param((), False, id="trained"),
        pytest.param(('training.frozen=["*.router.*"]',), True, id="frozen"),
        pytest.param(EXPERTS, True, id="not trainable"),
        pytest.param(("moe.router.type=hash", *EXPERTS), False, id="has none"),
        pytest.param(
            ("moe.router={type: resonance, learn_scale: true}", 'training.frozen=["*.router.log_scale"]'),
            False,
            id="one of several",
        ),
        pytest.param((BROADCAST,), True, id="broadcast"),
        pytest.param(("moe.broadcast={threshold: fixed, freeze_router: false}",), False, id="broadcast, trained"),
    ],
)
def test_router_without_trained_parameters_is_frozen(overrides: tuple[str, ...], frozen: bool) -> None:
    model, config = build(*overrides)
    select_trainable(model, config)
    assert [module.frozen for module in model.modules() if isinstance(module, Router)] == [frozen]


def test_broadcasting_freezes_routers_only() -> None:
    assert select() - select(BROADCAST) == {"blocks.1.ffn.router.weight"}


@pytest.mark.parametrize("field", ["trainable", "frozen"])
def test_a_pattern_without_a_match_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{field}") as caught:
        select(f'training.{field}=["norm.weight", "*.expert.*"]')
    assert caught.value.got == "*.expert.*"
    assert "blocks.*.ffn.experts.w1" in caught.value.expected


def test_a_tied_head_is_the_embedding() -> None:
    with pytest.raises(ConfigError, match=r"tied output head is embedding\.weight"):
        select('training.frozen=["head.weight"]')
    assert "head.weight" not in select("model.tie_embeddings=false", 'training.frozen=["head.weight"]')


@pytest.mark.parametrize("more", ['training.frozen=["*"]', 'training.frozen=["*.ffn.*"]', BROADCAST])
def test_nothing_left_to_train_is_refused(more: str) -> None:
    with pytest.raises(ConfigError, match="No parameter is left to train"):
        select(*ROUTER, more)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimizer_gets_what_is_trained(kind: str) -> None:
    model, config = build(f"training.optimizer.type={kind}", "training.gradient_clipping=0.0", *EXPERTS)
    select_trainable(model, config)
    groups = parameter_groups(model, config.training.optimizer)
    assert [group["name"] for group in groups] == ["ep_size_1"]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def manifest(topology: dict[str, Any]) -> Manifest:
    return Manifest(TrainState(1, 8, 256), architecture={}, topology=topology, tokenizer_digest="", files={})


@pytest.mark.parametrize("saved, now", [(ROUTER, EXPERTS), (ROUTER, ()), ((), ROUTER), ((), (BROADCAST,))])
def test_a_checkpoint_of_another_selection_is_refused(saved: tuple[str, ...], now: tuple[str, ...]) -> None:
    """Its optimizer state is of other parameters."""
    written, wanted = topology_of(tiny_config(*saved)), topology_of(tiny_config(*now))
    check(Path("x"), manifest(written), {}, written, "")
    with pytest.raises(CheckpointError, match="trained parameters"):
        check(Path("x"), manifest(written), {}, wanted, "")


@pytest.mark.parametrize("now", ["parallel.zero_stage=2", "parallel.ep=2", "parallel.offload_optimizer=true"])
def test_a_checkpoint_of_another_layout_is_not(now: str) -> None:
    check(Path("x"), manifest(topology_of(tiny_config())), {}, topology_of(tiny_config(now)), "")


def test_of_a_part_only_the_whole_can_tell_that_nothing_is_left() -> None:
    config = tiny_config('training.trainable=["head.*"]', "model.tie_embeddings=false")
    model = Decoder(config, 320)
    names = [name for name, _ in model.named_parameters()]
    del model.head
    assert select_trainable(model, config, names).trained == 0
