"""Parameter groups: every parameter once, in the group whose settings fit it."""

from typing import Any

import pytest
import torch

from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.model.decoder import Decoder
from megamoe.training.optimizer import PEAK, parameter_groups, set_lr

SHAPE = [
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.ffn_size=20",
    "model.vocab_size=320",
    "data.tokenizer.vocab_size=320",
    "moe.num_experts=4",
    "moe.expert_ffn_size=8",
    "moe.first_k_dense=1",
    "moe.num_shared_experts=1",
    "training.optimizer.lr=0.5",
    "training.optimizer.muon_lr=0.25",
    "training.optimizer.weight_decay=0.125",
    "training.gradient_clipping=0.0",  # muon wants no other
]
VARIANTS = [
    pytest.param([], id="topk"),
    pytest.param(["model.tie_embeddings=false", "moe.router.type=resonance"], id="untied resonance"),
    pytest.param(["moe.router.type=resonance", "moe.router.affinity=cosine"], id="cosine"),
    pytest.param(["moe.num_experts=0", "moe.first_k_dense=0"], id="dense"),
]


def build(kind: str, overrides: list[str]) -> tuple[RunConfig, Decoder, list[dict[str, Any]]]:
    config = load_config([], [*SHAPE, f"training.optimizer.type={kind}", *overrides])
    model = Decoder(config, 320)
    return config, model, parameter_groups(model, config.training.optimizer)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_every_parameter_is_in_one_group(overrides: list[str], kind: str) -> None:
    _, model, groups = build(kind, overrides)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_settings_of_every_parameter(overrides: list[str], kind: str) -> None:
    config, model, groups = build(kind, overrides)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            expert, vector = ".experts." in name, parameter.dim() == 1
            orthogonalised = kind == "muon" and not vector and (".attention." in name or ".ffn." in name)
            orthogonalised &= ".router." not in name
            assert group["weight_decay"] == (0.0 if vector else 0.125), name
            assert group["lr"] == group[PEAK] == (0.25 if orthogonalised else 0.5), name
            assert group["name"] == ("ep_size_1" if expert else "dense"), name
            assert group.get("moe", False) == expert, name
            assert group.get("use_muon", False) == orthogonalised, name
            assert (parameter.use_muon, parameter.is_expert_group) == (orthogonalised, expert), name
            assert ("momentum" in group) == orthogonalised, name
            assert ("betas" in group) != orthogonalised, name
            if not orthogonalised:
                assert group["betas"] == config.training.optimizer.betas


def test_what_is_left_to_adamw_beside_muon() -> None:
    _, model, groups = build("muon", ["model.tie_embeddings=false"])
    names = {id(p): name for name, p in model.named_parameters()}
    left = {names[id(p)] for group in groups if not group["use_muon"] for p in group["params"]}
    assert left == {
        "embedding.weight",
        "head.weight",
        "norm.weight",
        "blocks.1.ffn.router.weight",
        *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention_norm", "ffn_norm")),
    }


def test_the_schedule_scales_every_group_from_its_own_peak() -> None:
    _, _, groups = build("muon", [])
    optimizer = torch.optim.SGD(groups)
    for factor in (0.5, 0.1):
        set_lr(optimizer, factor)
        assert {group["lr"] / factor for group in optimizer.param_groups} == {0.5, 0.25}
