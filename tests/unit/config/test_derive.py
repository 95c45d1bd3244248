"""Counts against models written out by hand."""

import pytest

from megamoe.config import derive
from megamoe.config.load import load_config
from megamoe.config.memory import MemoryEstimate, memory_by_stage, memory_per_rank

SHAPE = [
    "model.hidden_size=8",
    "model.num_layers=3",
    "model.num_heads=2",
    "model.ffn_size=10",
    "moe.num_experts=4",
]
SMALL = [
    *SHAPE,
    "model.num_kv_heads=1",
    "model.vocab_size=5000",
    "moe.expert_ffn_size=6",
    "moe.first_k_dense=1",
]


def test_batch_split() -> None:
    config = load_config([], ["parallel.ep=2"])
    assert derive.data_parallel_size(config, 4) == 4
    assert derive.expert_data_parallel_size(config, 4) == 2
    assert derive.accumulation_steps(config, 2) == 2
    assert derive.experts_per_rank(config) == 4


@pytest.mark.parametrize(
    "overrides, blocks",
    [
        ([], [0, 1, 2, 3]),
        (["moe.every_n_layers=2"], [1, 3]),
        (["moe.first_k_dense=1"], [1, 2, 3]),
        (["moe.first_k_dense=1", "moe.every_n_layers=2"], [2]),
        (["moe.num_experts=0"], []),
    ],
)
def test_which_blocks_have_experts(overrides: list[str], blocks: list[int]) -> None:
    config = load_config([], overrides)
    assert [index for index in range(4) if derive.is_moe_layer(config, index)] == blocks
    assert derive.num_moe_layers(config) == len(blocks)


@pytest.mark.parametrize("size, padded", [(1, 64), (64, 64), (65, 128), (4096, 4096)])
def test_vocabulary_is_padded_to_64(size: int, padded: int) -> None:
    assert derive.padded_vocab(size) == padded


def test_vocabulary_follows_the_tokenizer_unless_given() -> None:
    assert derive.vocab_size(load_config([]), 301) == 320
    assert derive.vocab_size(load_config([], ["data.tokenizer.vocab_size=400"])) == 448
    assert derive.vocab_size(load_config([], ["model.vocab_size=5001"]), 301) == 5001


def test_parameters_by_hand() -> None:
    counts = derive.parameter_counts(load_config([], [*SMALL, "moe.num_shared_experts=1"]))
    expert = 3 * 8 * 6
    assert {name: count.total for name, count in counts.items()} == {
        "embedding": 5000 * 8,
        "head": 0,
        "attention": 3 * (8 * 2 * 4 + 2 * 8 * 1 * 4 + 2 * 4 * 8),  # wq, wk and wv, wo
        "norms": 7 * 8,
        "dense_mlp": 3 * 8 * 10,
        "experts": 2 * 4 * expert,
        "shared_experts": 2 * expert,
        "router": 2 * 4 * 8,
        "total": 40000 + 576 + 56 + 240 + 8 * expert + 2 * expert + 64,
    }
    assert counts["experts"].active == 2 * 2 * expert
    assert counts["total"].total - counts["total"].active == 4 * expert


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.every_n_layers=2", "moe.num_shared_experts=2", "model.tie_embeddings=false"],
        ["moe.first_k_dense=2", "model.num_kv_heads=1", "model.head_size=48"],
        ["moe.router={type: topk, score: sigmoid, bias_update_rate: 0.1}"],
        ["moe.router={type: resonance, affinity: grap}"],
        ["moe.router={type: resonance, affinity: grap_learned, learn_scale: false}"],
        ["moe.router={type: resonance, affinity: cosine}"],
        ["moe.num_experts=0"],
    ],
    ids=" ".join,
)
def test_parameters_are_those_of_the_model(overrides: list[str]) -> None:
    from megamoe.model.decoder import Decoder

    config = load_config([], overrides)
    model = Decoder(config, derive.vocab_size(config))
    assert derive.parameter_counts(config)["total"].total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "router, size",
    [
        ("{type: topk}", 32),
        ("{type: topk, score: sigmoid, bias_update_rate: 0.1}", 32),
        ("{type: resonance, affinity: grap}", 1),
        ("{type: resonance, affinity: grap, learn_scale: false}", 0),
        ("{type: resonance, affinity: grap_learned}", 9),
        ("{type: resonance, affinity: cosine}", 33),
    ],
)
def test_router_parameters(router: str, size: int) -> None:
    config = load_config([], [*SMALL, f"moe.router={router}"])
    assert derive.parameter_counts(config)["router"].total == 2 * size


def test_an_untied_head_counts_again_but_costs_the_same_flops() -> None:
    tied, untied = (load_config([], [f"model.tie_embeddings={flag}"]) for flag in ("true", "false"))
    difference = derive.parameter_counts(untied)["total"].total - derive.parameter_counts(tied)["total"].total
    assert difference == 4096 * 128
    assert derive.flops_per_token(tied) == derive.flops_per_token(untied)


def test_flops_by_hand() -> None:
    expert, attention = 3 * 8 * 6, 3 * (8 * 2 * 4 + 2 * 8 * 1 * 4 + 2 * 4 * 8)
    weights = 5000 * 8 + attention + 3 * 8 * 10 + 2 * (2 * expert + 4 * 8)
    # scores and values: 2 products of 2 FLOPs over N * H = 8 features and S / 2 = 50 positions, three times
    expected = 6 * weights + 3 * 3 * 2 * 2 * 8 * 50
    assert derive.flops_per_token(load_config([], [*SMALL, "data.seq_length=100"])) == expected


@pytest.mark.parametrize("overrides", [[], ["moe.every_n_layers=2"], ["moe.first_k_dense=2"], ["moe.num_experts=0"]])
def test_blocks_and_head_add_up_to_the_model(overrides: list[str]) -> None:
    config = load_config([], overrides)
    blocks = [derive.block_parameters(config, index) for index in range(4)]
    counts = derive.parameter_counts(config)
    for name in blocks[0]:
        last = 128 if name == "norms" else 0
        assert sum(block[name].total for block in blocks) + last == counts[name].total
        assert sum(block[name].active for block in blocks) + last == counts[name].active
    flops = [derive.block_flops(config, index) for index in range(4)]
    assert sum(flops) + derive.head_flops(config) == derive.flops_per_token(config)


def test_what_one_rank_holds() -> None:
    config = load_config([], [*SMALL, "moe.num_shared_experts=1", "parallel={tp: 2, ep: 2, etp: 2}"])
    expert, kept_whole = 3 * 8 * 6, 2 * 144 + 2 * 4 * 8 + 7 * 8  # shared experts, routers, norms
    experts, others = derive.on_one_rank(config, derive.parameter_counts(config))
    assert experts == 2 * 4 * expert // 4
    assert others == (5000 * 8 + 576 + 240) // 2 + kept_whole


def memory(world_size: int, *overrides: str) -> MemoryEstimate:
    return memory_per_rank(load_config([], overrides), world_size)


def test_memory_shrinks_with_every_degree() -> None:
    alone = memory(1)
    split = {axis: memory(2, f"parallel.{axis}=2") for axis in ("tp", "pp", "ep", "etp", "cp")}
    for axis in ("tp", "pp", "ep", "etp"):
        assert split[axis].weights < 0.9 * alone.weights, axis
    for axis in ("tp", "cp"):
        assert split[axis].activations < 0.8 * alone.activations, axis
    assert split["cp"].weights == alone.weights
    # ZeRO shards over the ranks that share sequences as over those that do not.
    assert split["cp"].optimizer == memory(2).optimizer == alone.optimizer // 2
    # A share of an expert has the rows of the ranks that hold the others.
    assert split["etp"].activations > alone.activations


def test_memory_of_a_pipeline_is_that_of_its_fullest_stage() -> None:
    even = ["parallel.pp=4", "model.num_layers=8", "data.seq_length=8192"]  # two blocks each: the head costs little
    config = load_config([], [*even, "training.global_batch_size=64"])
    stages = memory_by_stage(config, 4)
    assert len(stages) == 4
    assert memory_per_rank(config, 4) == max(stages, key=lambda stage: stage.total)
    # The first is three micro-batches ahead of the last.
    assert stages[0].activations > stages[1].activations > stages[2].activations
    one_micro_batch = load_config([], [*even, "training.global_batch_size=4"])
    early, middle, *_ = memory_by_stage(one_micro_batch, 4)
    assert early.activations == middle.activations


def test_what_is_offloaded_is_not_on_the_device() -> None:
    stage_3 = "parallel.zero_stage=3"
    here, there = memory(2, stage_3), memory(2, stage_3, "parallel.offload_optimizer=true")
    assert (there.optimizer, there.host) == (0, here.optimizer)
    assert there.total == here.total - here.optimizer
    both = memory(2, stage_3, "parallel.offload_optimizer=true", "parallel.offload_parameters=true")
    assert (both.weights, both.host) == (0, here.weights + here.optimizer)


def test_recomputation_keeps_less() -> None:
    kept = {
        what: memory(1, f"training.recompute={what}", "model.num_layers=12").activations
        for what in ("none", "attention", "moe", "full")
    }
    assert kept["full"] < kept["moe"] < kept["attention"] < kept["none"]


def test_memory_follows_the_zero_stage() -> None:
    def memory(stage: int, *more: str):
        config = load_config([], [f"parallel.zero_stage={stage}", "parallel.ep=2", *more])
        return memory_per_rank(config, 4)

    counts = derive.parameter_counts(load_config([]))
    experts = counts["experts"].total // 2
    local = counts["total"].total - counts["experts"].total + experts
    assert memory(0).weights == memory(0).gradients == 4 * local
    assert memory(0).optimizer == 8 * local
    shard = (local - experts) // 4 + experts // 2
    assert memory(1).optimizer == 12 * shard
    assert memory(1).gradients == 4 * local
    assert memory(2).gradients == memory(3).weights == 4 * shard
    assert memory(1, "training.precision=bf16").weights == 2 * local
    exact = memory(0, "training.precision=fp64")
    assert exact.weights == exact.gradients == 8 * local
    assert exact.optimizer == 16 * local
    assert exact.activations == 2 * memory(0).activations
    assert memory(1, "training.optimizer.type=muon", "training.gradient_clipping=0").optimizer == 8 * shard
    assert memory(1, "training.recompute=full").activations < memory(1).activations
    assert memory(1).total > memory(2).total > memory(3).total
