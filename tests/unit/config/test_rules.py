"""Every cross-section rule has settings that break it and nothing else; test_parallel_rules.py has the others."""

import pytest

from megamoe.common.errors import TopologyError
from megamoe.config.load import check, load_config, merge
from megamoe.config.parallel_rules import PARALLEL_RULES
from megamoe.config.rank_rules import RANK_RULES
from megamoe.config.rules import RULES, check_world_size
from megamoe.config.run import RunConfig
from megamoe.config.sources import read_override

BOUNDS = ("locmoe", "etr_bound", "etr_success")
EXPERT_CHOICE = ["moe.router.type=expert_choice", "moe.capacity.mode=static"]
FP64 = ["training.precision=fp64", "parallel.zero_stage=0"]
# Name of the rule: overrides that break it, and the path it must name.
BREAKERS: dict[str, list[tuple[list[str], str]]] = {
    "experts_divide_over_ep": [(["moe.num_experts=6", "parallel.ep=4"], "moe.num_experts")],
    "ep_needs_experts": [(["moe.num_experts=0", "parallel.ep=2"], "parallel.ep")],
    "top_k_within_experts": [(["moe.top_k=9"], "moe.top_k")],
    "dense_prefix_leaves_blocks": [(["moe.first_k_dense=4"], "moe.first_k_dense")],
    "some_block_has_experts": [(["moe.first_k_dense=2", "moe.every_n_layers=3"], "moe.every_n_layers")],
    "local_dispatch_needs_local_experts": [(["moe.dispatcher=local", "parallel.ep=2"], "moe.dispatcher")],
    "padded_dispatch_needs_a_capacity": [
        (["moe.dispatcher=padded"], "moe.dispatcher"),
        (
            ["moe.dispatcher=padded", "moe.capacity.mode=static", "moe.router={type: resonance, scope: ep_group}"],
            "moe.dispatcher",
        ),
        (["moe.dispatcher=push", "parallel.ep=2"], "moe.dispatcher"),
    ],
    "groupwise_dispatch_has_groups": [
        (["moe.dispatcher=groupwise", "parallel.ep=2"], "moe.dispatcher"),
        (["moe.dispatcher=groupwise", "moe.num_experts=6", "parallel.ep=3", "parallel.tp=2"], "moe.dispatcher"),
    ],
    "rows_have_other_ranks_to_go_to": [
        (["moe.dispatcher=deduplicated"], "moe.dispatcher"),
        (["moe.dispatcher=hierarchical"], "moe.dispatcher"),
        (["moe.dispatcher=push", "moe.capacity.mode=static"], "moe.dispatcher"),
        (
            ["moe.dispatcher=push", "moe.capacity.mode=static", "parallel.ep=2", "parallel.etp=2"],
            "moe.dispatcher",
        ),
    ],
    "chunks_are_of_experts": [
        (["moe.chunks=2"], "moe.chunks"),
        (["moe.chunks=2", "parallel.ep=2", "parallel.etp=2"], "moe.chunks"),
        (["moe.chunks=5", "parallel.ep=2"], "moe.chunks"),
        (["moe.chunks=2", "parallel.ep=2", "moe.dispatcher=deduplicated"], "moe.chunks"),
        (["moe.chunks=2", "parallel.ep=2", "ops.expert_ffn=grouped_mm"], "moe.chunks"),
    ],
    "bounds_need_affinities": [([f"moe.capacity.mode={mode}"], "moe.capacity.mode") for mode in BOUNDS],
    "expert_choice_needs_a_capacity": [(["moe.router.type=expert_choice"], "moe.capacity.mode")],
    "expert_choice_ranks_by_score": [
        ([*EXPERT_CHOICE, "moe.capacity.drop=position"], "moe.capacity.drop"),
        ([*EXPERT_CHOICE, "moe.capacity.drop=random"], "moe.capacity.drop"),
    ],
    "threshold_ranks_by_affinity": [
        (["moe.router={type: resonance, threshold: 0.9}", "moe.capacity.drop=position"], "moe.router.threshold")
    ],
    "minimum_capacity_within_factor": [
        (["moe.capacity={mode: static, factor: 0.5, minimum: 0.6}"], "moe.capacity.minimum")
    ],
    "scale_limits_in_order": [
        (["moe.router={type: resonance, scale_min: 30}"], "moe.router.scale_min"),
        (["moe.router={type: resonance, scale_max: 20}"], "moe.router.scale_min"),
        (["moe.router={type: resonance, scale_min: 25, scale_max: 20}"], "moe.router.scale_min"),
        (["moe.router={type: resonance, affinity: cosine, scale_init: 1.0, scale_min: 2.0}"], "moe.router.scale_min"),
        (["moe.router={type: resonance, learn_scale: false, scale_min: 9, scale_max: 2}"], "moe.router.scale_min"),
    ],
    "groups_divide_experts": [
        (["moe.router.num_groups=3"], "moe.router.num_groups"),
        (["moe.router.top_groups=2"], "moe.router.top_groups"),
        (["moe.router={num_groups: 8, top_groups: 1}"], "moe.router.top_groups"),
    ],
    "grap_slices_hold_a_feature": [
        (["moe.router.type=resonance", "moe.num_experts=129"], "moe.router.affinity"),
        (["moe.router={type: resonance, affinity: grap}", "moe.num_experts=129"], "moe.router.affinity"),
    ],
    "sigmoid_weights_are_normalised": [
        (["moe.router={score: sigmoid, normalize_weights: false}"], "moe.router.normalize_weights")
    ],
    "broadcast_needs_scores": [
        (["moe.broadcast={threshold: fixed}", "moe.router={type: hash}"], "moe.broadcast"),
        (["moe.broadcast={threshold: fixed}", "moe.router={type: balanced}"], "moe.broadcast"),
        (["moe.broadcast={threshold: fixed}", "moe.num_experts=0"], "moe.broadcast"),
    ],
    "broadcast_quantile_is_measured": [(["moe.broadcast={}"], "moe.broadcast.threshold")],
    "broadcast_reaches_more_experts": [
        (["moe.broadcast={threshold: fixed, top_m: 9}"], "moe.broadcast.top_m"),
        (["moe.broadcast={threshold: fixed, top_m: 2}"], "moe.broadcast.top_m"),
    ],
    "heads_divide_hidden_size": [(["model.hidden_size=130"], "model.hidden_size")],
    "head_size_is_even": [
        (["model.head_size=33"], "model.head_size"),
        (["model.hidden_size=132"], "model.head_size"),
    ],
    "kv_heads_divide_heads": [
        (["model.num_kv_heads=3"], "model.num_kv_heads"),
        (["model.num_kv_heads=8"], "model.num_kv_heads"),
    ],
    "vocabulary_holds_tokenizer": [(["model.vocab_size=4095"], "model.vocab_size")],
    "micro_batches_fill_global_batch": [(["training.micro_batch_size=3"], "training.global_batch_size")],
    "warmup_ends_before_training": [
        (["training.schedule.warmup_steps=200"], "training.schedule.warmup_steps"),
    ],
    "wsd_phases_fit": [(["training.schedule={type: wsd, warmup_steps: 161}"], "training.schedule.decay_fraction")],
    "stop_lies_within_steps": [(["training.stop_after_step=201"], "training.stop_after_step")],
    "traced_steps_lie_within_steps": [(["training.trace_steps=[1, 201]"], "training.trace_steps")],
    "kept_checkpoints_are_written": [
        (["training.checkpoint.keep_every=150"], "training.checkpoint.keep_every"),
        (["training.checkpoint={every: 0, keep_every: 5}"], "training.checkpoint.keep_every"),
    ],
    "zero_0_runs_in_fp32": [(["parallel.zero_stage=0", "training.precision=bf16"], "parallel.zero_stage")],
    "fp64_keeps_its_digits": [
        (["training.precision=fp64"], "parallel.zero_stage"),
        (["training.precision=fp64", "parallel.zero_stage=3"], "parallel.zero_stage"),
        (
            [*FP64, "training.optimizer.type=muon", "training.gradient_clipping=0"],
            "training.optimizer.type",
        ),
        ([*FP64, "deepspeed_extra.communication_data_type=fp32"], "deepspeed_extra.communication_data_type"),
    ],
    "muon_needs_whole_matrices": [
        (
            ["parallel.zero_stage=3", "training.optimizer.type=muon", "training.gradient_clipping=0"],
            "parallel.zero_stage",
        )
    ],
    "muon_updates_are_not_clipped": [(["training.optimizer.type=muon"], "training.gradient_clipping")],
    "spikes_stand_out": [
        (["training.faults.spike_factor=0.5"], "training.faults.spike_factor"),
        (
            ["training.faults.spike_factor=4", "training.optimizer.type=muon", "training.gradient_clipping=0"],
            "training.faults.spike_factor",
        ),
    ],
    "extra_leaves_our_keys": [
        (["deepspeed_extra.zero_optimization.stage=2"], "deepspeed_extra.zero_optimization.stage"),
        (["deepspeed_extra.zero_optimization=2"], "deepspeed_extra.zero_optimization"),
        (["deepspeed_extra.optimizer={type: Adam}"], "deepspeed_extra.optimizer.type"),
        (["deepspeed_extra.fp16.enabled=true"], "deepspeed_extra.fp16.enabled"),
        (["deepspeed_extra.pipeline.stages=2"], "deepspeed_extra.pipeline.stages"),
        (
            ["deepspeed_extra.zero_optimization.offload_optimizer.device=nvme"],
            "deepspeed_extra.zero_optimization.offload_optimizer.device",
        ),
    ],
}

# Settings at the edge of the rules above that must pass.
ACCEPTED = [
    ["parallel.ep=8"],
    ["moe.num_experts=0", "moe.top_k=9", "moe.first_k_dense=9"],
    ["moe.top_k=8"],
    ["moe.first_k_dense=3"],
    ["moe.every_n_layers=4"],
    ["model.hidden_size=130", "model.head_size=32"],
    ["model.num_kv_heads=1"],
    ["model.vocab_size=4096"],
    ["moe.dispatcher=all_to_all"],
    ["moe.dispatcher=deduplicated", "parallel.ep=2", "parallel.etp=2"],
    ["moe.dispatcher=groupwise", "parallel.ep=4", "parallel.tp=2"],
    ["moe.dispatcher=push", "moe.capacity.mode=static", "parallel.ep=2"],
    ["moe.chunks=4", "parallel.ep=2"],
    ["moe.chunks=1", "moe.dispatcher=hierarchical", "parallel.ep=2"],
    ["moe.dispatcher=padded", "moe.capacity.mode=static", "parallel.ep=2"],
    *(["moe.router.type=resonance", f"moe.capacity.mode={mode}"] for mode in BOUNDS),
    EXPERT_CHOICE,
    ["moe.router={type: resonance, scale_min: 4, scale_init: 4, scale_max: 4}"],
    ["moe.router={type: resonance, affinity: cosine, scale_init: 1.0}"],
    ["moe.router={type: resonance, affinity: cosine}", "model.hidden_size=4096"],
    ["moe.router={type: resonance, learn_scale: false, scale_init: 1.0}"],
    ["moe.router={num_groups: 4, top_groups: 1}"],
    ["moe.capacity={mode: static, factor: 0.5, minimum: 0.5}"],
    ["moe.dispatcher=local"],
    ["moe.router.type=resonance", "moe.num_experts=128"],
    ["moe.router={type: resonance, affinity: cosine}", "moe.num_experts=129"],
    ["training.schedule.warmup_steps=199"],
    ["training.schedule={type: wsd, warmup_steps: 160}"],
    ["training.stop_after_step=200"],
    ["training.checkpoint.keep_every=200"],
    ["parallel.zero_stage=0"],
    ["parallel.zero_stage=1", "training.precision=bf16"],
    FP64,
    ["deepspeed_extra.communication_data_type=fp32"],
    ["parallel.zero_stage=2", "training.optimizer.type=muon", "training.gradient_clipping=0"],
    ["parallel.offload_optimizer=true", "deepspeed_extra.zero_optimization.offload_optimizer.pin_memory=false"],
    ["deepspeed_extra.zero_optimization.overlap_comm=true"],
]


def test_every_rule_has_a_breaker() -> None:
    assert [rule.__name__ for rule in RULES if rule not in (*PARALLEL_RULES, *RANK_RULES)] == list(BREAKERS)


@pytest.mark.parametrize(
    "rule, overrides, path",
    [(rule, overrides, path) for rule, cases in BREAKERS.items() for overrides, path in cases],
)
def test_settings_break_exactly_one_rule(rule: str, overrides: list[str], path: str) -> None:
    values = {}
    for override in overrides:
        values = merge(values, read_override(override).values)
    config = RunConfig.model_validate(values)
    assert [r.__name__ for r in RULES for _ in r(config)] == [rule]
    _, problems = check(values)
    assert [problem.path for problem in problems] == [path]


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_settings_at_the_edge_pass(overrides: list[str]) -> None:
    load_config([], overrides)


def test_world_sizes_that_fit() -> None:
    config = load_config([], ["parallel.ep=2"])
    for world_size in (2, 4):
        check_world_size(config, world_size)


@pytest.mark.parametrize(
    "world_size, arithmetic",
    [
        (1, "ep 2 * etp 1 = 2: 1 % 2 = 1; 2 would fit"),
        (3, "ep 2 * etp 1 = 2: 3 % 2 = 1; 2 or 4 would fit"),
        (3, "dp 3 (world size 3 / 1) = 12: 16 % 12 = 4"),
        (8, "dp 8 (world size 8 / 1) = 32: 16 % 32 = 16"),
        (0, "at least one rank, got world size 0"),
    ],
)
def test_world_sizes_that_do_not_fit_show_the_arithmetic(world_size: int, arithmetic: str) -> None:
    with pytest.raises(TopologyError) as caught:
        check_world_size(load_config([], ["parallel.ep=2"]), world_size)
    assert arithmetic in str(caught.value)


def test_model_parallel_degrees_must_divide_the_world() -> None:
    config = RunConfig.model_validate({"parallel": {"tp": 2, "pp": 2}})
    with pytest.raises(TopologyError, match=r"tp 2 \* pp 2 \* cp 1 = 4: 6 % 4 = 2"):
        check_world_size(config, 6)
