"""The initial weights: their spread, their independence of the layout, and which tensors exist at all."""

import math

import pytest
import torch

from megamoe.config import derive
from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.moe.placement import ExpertParallel, Placement
from megamoe.testing import assert_equal_bits

SHAPE = [
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_size=96",
    "model.vocab_size=512",
    "data.tokenizer.vocab_size=512",
    "moe.num_experts=4",
    "moe.expert_ffn_size=48",
    "moe.num_shared_experts=1",
    "moe.first_k_dense=1",
]


def settings(*overrides: str) -> RunConfig:
    return load_config([], [*SHAPE, *overrides])


def build(config: RunConfig, seed: int = 7, ep_size: int = 1, ep_rank: int = 0) -> Decoder:
    model = Decoder(config, 512, Placement(ExpertParallel(ep_size, ep_rank)))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # what initialise forgets shows
    initialise(model, config.model, seed)
    return model


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("router", ["topk", "resonance"])
def test_spread_of_every_tensor(router: str, tied: str) -> None:
    config = settings(f"moe.router.type={router}", "model.init_std=0.03", f"model.tie_embeddings={tied}")
    for name, parameter in build(config).named_parameters():
        if name.endswith("log_scale"):
            assert parameter.item() == pytest.approx(math.log(2 * math.sqrt(64)))
        elif parameter.dim() == 1:
            assert parameter.unique().tolist() == [1.0], name
        else:
            last = name.endswith(("wo.weight", "w2", "w2.weight"))  # what writes into the residual stream
            std = 0.03 / math.sqrt(2 * 3) if last else 0.03
            few = 4 / math.sqrt(2 * parameter.numel())  # four standard errors
            assert parameter.std().item() == pytest.approx(std, rel=few), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    config = settings()
    first, again, other = build(config), build(config), build(config, seed=8)
    for name, parameter in first.named_parameters():
        assert_equal_bits(again.get_parameter(name), parameter, name=name)
        if parameter.dim() > 1:
            assert not torch.equal(other.get_parameter(name), parameter), name


def test_no_two_tensors_are_alike() -> None:
    model = build(settings())
    slices = [p.flatten()[:16] for p in model.parameters() if p.dim() == 2]
    slices += [expert.flatten()[:16] for p in model.parameters() if p.dim() == 3 for expert in p]
    ranked = torch.stack([s / s.norm() for s in slices])
    gram = ranked @ ranked.t() - torch.eye(len(slices))
    assert gram.abs().max().item() < 0.99


@pytest.mark.parametrize("router", ["topk", "resonance"])
def test_weights_do_not_depend_on_the_expert_parallel_degree(router: str) -> None:
    config = settings(f"moe.router.type={router}")
    whole = dict(build(config).named_parameters())
    for size in (2, 4):
        for rank in range(size):
            local = 4 // size
            for name, parameter in build(config, ep_size=size, ep_rank=rank).named_parameters():
                mine = slice(rank * local, (rank + 1) * local) if ".experts." in name else slice(None)
                assert_equal_bits(parameter, whole[name][mine], name=f"{name} on rank {rank} of {size}")


def test_dtype_only_rounds() -> None:
    config = settings()
    model, exact = Decoder(config, 512).bfloat16(), build(config)
    initialise(model, config.model, 7)
    for name, parameter in model.named_parameters():
        drawn = exact.get_parameter(name)
        if parameter.dim() == 1:
            assert_equal_bits(parameter, drawn.bfloat16(), name=name)
        else:
            assert (parameter.float() - drawn).abs().max() <= drawn.abs().max() * 2**-7, name


def test_a_tied_embedding_is_one_tensor() -> None:
    tied, untied = build(settings()), build(settings("model.tie_embeddings=false"))
    assert tied.head.weight is tied.embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())
    assert_equal_bits(tied.embedding.weight, untied.embedding.weight)
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_embeddings=false"],
        ["moe.router.type=resonance"],
        ["moe.router.type=resonance", "moe.router.affinity=grap", "moe.router.learn_scale=false"],
        ["moe.router.type=resonance", "moe.router.affinity=cosine"],
        ["moe.router.score=sigmoid", "moe.router.bias_update_rate=0.01", "moe.num_shared_experts=0"],
        ["moe.every_n_layers=2", "moe.first_k_dense=0", "model.head_size=20"],
        ["moe.num_experts=0", "moe.first_k_dense=0", "model.num_kv_heads=4"],
    ],
    ids=" ".join,
)
def test_the_model_has_the_parameters_that_are_counted(overrides: list[str]) -> None:
    config = settings(*overrides)
    counts = derive.parameter_counts(config)
    places = {
        "embedding": "embedding.",
        "head": "head.",
        "attention": ".attention.",
        "norms": "norm.",
        "experts": ".experts.",
        "shared_experts": ".shared_experts.",
        "router": ".router.",
        "dense_mlp": ".ffn.w",
    }
    found = dict.fromkeys(places, 0)
    for name, parameter in Decoder(config, 512).named_parameters():
        (component,) = (c for c, part in places.items() if part in f".{name}" and owns(c, name))
        found[component] += parameter.numel()
    assert found == {name: counts[name].total for name in places}
    assert sum(found.values()) == counts["total"].total


def owns(component: str, name: str) -> bool:
    """`norm.` and `head.` are also ends of other names."""
    first = name.split(".")[0]
    return component not in ("embedding", "head") or first == component
