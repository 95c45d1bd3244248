"""The split into pipeline stages against every possible one."""

from itertools import combinations, pairwise

import pytest

from megamoe.config import derive
from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.config.stages import (
    most_stages,
    stage_block_costs,
    stage_block_weights,
    stage_bounds,
    stage_costs,
    stage_parameters,
)

MODELS = [
    [],
    ["moe.num_experts=0"],
    ["moe.every_n_layers=2", "moe.num_shared_experts=1"],
    ["moe.first_k_dense=3", "model.ffn_size=4096"],
    ["moe.every_n_layers=3", "model.tie_embeddings=false"],
    ["model.vocab_size=65536"],
    ["model.vocab_size=4096", "data.seq_length=32768"],
]


def build(pp: int, *overrides: str) -> RunConfig:
    return load_config([], ["model.num_layers=9", f"parallel.pp={pp}", *overrides])


def every_split(config: RunConfig) -> list[tuple[int, ...]]:
    """All splits in which each stage has a block, and an MoE block if the model has any."""
    layers, pp = config.model.num_layers, config.parallel.pp
    splits = [(0, *inner, layers) for inner in combinations(range(1, layers), pp - 1)]
    if not derive.num_moe_layers(config):
        return splits
    return [s for s in splits if all(any(derive.is_moe_layer(config, i) for i in range(*part)) for part in pairwise(s))]


def largest(values: list[int], bounds: tuple[int, ...]) -> int:
    return max(sum(values[first:end]) for first, end in pairwise(bounds))


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("model", MODELS, ids=" ".join)
def test_no_split_is_better(model: list[str], pp: int) -> None:
    if pp > 3 and "moe.every_n_layers=3" in model:
        pp = 3
    config = build(pp, *model)
    costs, weights = stage_block_costs(config), stage_block_weights(config)
    best = min((largest(costs, bounds), largest(weights, bounds)) for bounds in every_split(config))
    bounds = stage_bounds(config)
    assert bounds in every_split(config)
    assert (largest(costs, bounds), largest(weights, bounds)) == best


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_the_stages_cost_what_the_model_costs(pp: int) -> None:
    config = build(pp, "moe.every_n_layers=2")
    assert len(stage_costs(config)) == pp
    assert sum(stage_costs(config)) == derive.flops_per_token(config)


def test_the_head_makes_the_last_stage_short() -> None:
    assert stage_bounds(build(3, "data.seq_length=8192")) == (0, 3, 6, 9)
    assert stage_bounds(build(3)) == (0, 4, 8, 9)
    # And where nothing helps against the head, the stage with the embedding is relieved of weights.
    assert stage_bounds(build(3, "model.vocab_size=65536")) == (0, 1, 8, 9)


def test_among_equal_costs_memory_decides() -> None:
    """Experts weigh much and cost little: two MoE blocks and a dense one of equal cost are not put together."""
    config = build(1, "moe.num_experts=64", "moe.top_k=2", "model.num_layers=4", "parallel.pp=3")
    costs, weights = stage_block_costs(config), stage_block_weights(config)
    equal = [s for s in every_split(config) if largest(costs, s) == largest(costs, stage_bounds(config))]
    assert len(equal) > 1
    assert largest(weights, stage_bounds(config)) == min(largest(weights, s) for s in equal)


def test_every_stage_gets_an_moe_block_although_the_costs_are_against_it() -> None:
    config = build(2, "moe.first_k_dense=8", "parallel.pp=1")
    assert most_stages(config) == 1
    config = build(2, "moe.first_k_dense=7", "model.ffn_size=8192")
    assert stage_bounds(config) == (0, 8, 9)


def test_more_stages_than_blocks_to_put_on_them_is_an_error() -> None:
    config = build(1, "moe.every_n_layers=3").model_copy(update={"parallel": build(4).parallel})
    with pytest.raises(ValueError, match="4 stages for 3 blocks"):
        stage_bounds(config)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_stages_together_are_the_model(tied: str) -> None:
    config = build(3, f"model.tie_embeddings={tied}", "moe.every_n_layers=2")
    parts = [stage_parameters(config, first, end) for first, end in pairwise(stage_bounds(config))]
    total = sum(count.total for part in parts for count in part.values())
    counts = derive.parameter_counts(config)
    twice = counts["embedding"].total if tied == "true" else 0  # the last stage has a copy of its own
    assert total == counts["total"].total + twice


def test_a_large_model_is_split_at_once() -> None:
    """Its 10^70 splits are not tried one by one."""
    config = load_config([], ["model.num_layers=256", "parallel.pp=64", "moe.every_n_layers=2"])
    bounds = stage_bounds(config)
    assert len(bounds) == 65
    assert all(first < end for first, end in pairwise(bounds))
