"""Every rule about ranks has settings that break it and nothing else; each refusal names both fields and a way out."""

import pytest

from megamoe.config.load import check, load_config, merge
from megamoe.config.parallel_rules import PARALLEL_RULES
from megamoe.config.problems import nearest_divisor, nearest_multiple
from megamoe.config.rules import RULES
from megamoe.config.run import RunConfig
from megamoe.config.sources import read_override

MUON = ["training.optimizer.type=muon", "training.gradient_clipping=0"]
BF16_MUON = [*MUON, "training.precision=bf16"]
FINETUNE = "finetune={checkpoint: runs/tiny, sources: [{name: a, path: a.jsonl}]}"
BROADCAST = "moe.broadcast={threshold: fixed}"
DENSE = "moe.num_experts=0"
# Name of the rule: overrides that break it, the path it must name, and the rest of its sentence.
# The defaults: 4 blocks with 8 experts of width 192, width 128, 4 heads, vocabulary 4096, sequences of 256.
BREAKERS: dict[str, list[tuple[list[str], str, str]]] = {
    "tp_divides_heads": [
        (
            ["parallel.tp=8"],
            "parallel.tp",
            "8 does not divide model.num_heads 4: 4 % 8 = 4; use 4, or model.num_heads 8",
        ),
        (
            ["parallel.tp=4", "model.num_heads=6", "model.head_size=32"],
            "parallel.tp",
            "4 does not divide model.num_heads 6: 6 % 4 = 2; use 3, or model.num_heads 8",
        ),
    ],
    "tp_fits_kv_heads": [
        (
            ["parallel.tp=4", "model.num_heads=12", "model.head_size=32", "model.num_kv_heads=6"],
            "parallel.tp",
            "4 neither divides model.num_kv_heads 6 (6 % 4 = 2) nor is a multiple of it (4 % 6 = 4); use 3, or "
            "model.num_kv_heads 4",
        )
    ],
    "tp_divides_vocabulary": [
        (
            ["parallel.tp=4", "model.vocab_size=4098"],
            "parallel.tp",
            "4 does not divide model.vocab_size 4098: 4098 % 4 = 2; use 3, or model.vocab_size 4100",
        ),
        (
            ["parallel.tp=3", "model.num_heads=3", "model.head_size=32", "data.seq_length=255"],
            "parallel.tp",
            "4096 % 3 = 1; use 2, or model.vocab_size 4098",
        ),
    ],
    "tp_divides_dense_blocks": [
        (
            ["parallel.tp=4", "model.ffn_size=386", "moe.first_k_dense=1"],
            "parallel.tp",
            "4 does not divide model.ffn_size 386: 386 % 4 = 2; use 2, or model.ffn_size 388",
        ),
        ([*("parallel.tp=4", "model.ffn_size=386"), DENSE], "parallel.tp", "386 % 4 = 2"),
    ],
    "cp_divides_heads": [
        (
            ["parallel.cp=8"],
            "parallel.cp",
            "8 does not divide model.num_heads 4 / parallel.tp 1 = 4 heads, which its ranks share in attention: "
            "4 % 8 = 4; use 4, or model.num_heads 8",
        ),
        (["parallel.cp=4", "parallel.tp=2"], "parallel.cp", "2 % 4 = 2; use 2, or model.num_heads 8"),
    ],
    "sequences_divide_over_ranks": [
        (
            ["parallel.cp=2", "parallel.tp=2", "data.seq_length=254"],
            "data.seq_length",
            "254 tokens do not divide over parallel.tp 2 * parallel.cp 2 = 4 ranks: 254 % 4 = 2; use 256",
        ),
        (["parallel.cp=2", "data.seq_length=1"], "data.seq_length", "1 % 2 = 1; use 2"),
    ],
    "etp_needs_experts": [
        (
            ["parallel.etp=2", DENSE],
            "parallel.etp",
            "2 needs experts, but moe.num_experts is 0; use 1 for a dense model",
        )
    ],
    "etp_divides_experts": [
        (
            ["parallel.etp=5"],
            "parallel.etp",
            "5 does not divide moe.expert_ffn_size 192: 192 % 5 = 2; use 4, or moe.expert_ffn_size 190",
        )
    ],
    "stages_have_blocks": [
        (
            ["parallel.pp=5", DENSE],
            "parallel.pp",
            "5 stages cannot each hold one of model.num_layers 4 blocks; use 4",
        ),
        (
            ["parallel.pp=3", "moe.every_n_layers=2"],
            "parallel.pp",
            "3 stages cannot each hold one of the 2 MoE blocks of model.num_layers 4 (moe.first_k_dense 0, "
            "moe.every_n_layers 2), and DeepSpeed waits for ever on a stage without experts; use 2",
        ),
        (["parallel.pp=2", "moe.first_k_dense=3"], "parallel.pp", "use 1"),
    ],
    "pipelines_keep_gradients_and_weights_whole": [
        (["parallel.pp=2", f"parallel.zero_stage={stage}"], "parallel.zero_stage", "use 1") for stage in (2, 3)
    ],
    "router_scope_is_whole_micro_batch": [
        (
            ["parallel.etp=2", "moe.router={type: resonance, scope: ep_group}"],
            "moe.router.scope",
            "ep_group would leave out the tokens of parallel.etp 2",
        ),
        *(
            (
                [f"parallel.{axis}=2", f"moe.router={{type: resonance, scope: {scope}}}"],
                "moe.router.scope",
                f"{scope} is not defined where the tokens of a micro-batch are spread over ranks",
            )
            for axis, scope in (("tp", "ep_group"), ("cp", "local"))
        ),
    ],
    "conversations_stay_on_their_rank": [
        ([FINETUNE, "parallel.cp=2"], "parallel.cp", "2 is not supported with finetune in this version"),
        ([FINETUNE, BROADCAST, "parallel.cp=2"], "parallel.cp", "use 1 (parallel.tp works)"),
    ],
    "muon_sees_whole_matrices": [
        (
            [*MUON, f"parallel.{axis}=2"],
            f"parallel.{axis}",
            "2 cuts matrices that training.optimizer.type muon orthogonalises as a whole; use 1, or adamw",
        )
        for axis in ("tp", "etp")
    ],
    "padded_dispatch_needs_whole_micro_batches": [
        (
            ["moe.dispatcher=padded", "moe.capacity.mode=static", f"parallel.{axis}=2"],
            "moe.dispatcher",
            "use auto or all_to_all",
        )
        for axis in ("tp", "cp")
    ],
    "offloading_follows_zero": [
        (
            ["parallel.offload_optimizer=true", "parallel.zero_stage=0"],
            "parallel.offload_optimizer",
            "true needs an optimizer that DeepSpeed shards, but parallel.zero_stage is 0; use 1, 2 or 3",
        ),
        (
            ["parallel.offload_parameters=true", "parallel.zero_stage=2"],
            "parallel.offload_parameters",
            "true needs weights that DeepSpeed shards, but parallel.zero_stage is 2; use 3",
        ),
    ],
    "muon_accumulates_in_fp32": [
        (
            BF16_MUON,
            "parallel.zero_stage",
            "1 takes training.optimizer.type muon in bf16 for dense models without a pipeline only; use 2",
        ),
        ([*BF16_MUON, DENSE, "parallel.pp=2"], "parallel.zero_stage", "use adamw or training.precision fp32"),
        (
            [*BF16_MUON, "parallel.zero_stage=2", "parallel.offload_optimizer=true"],
            "parallel.offload_optimizer",
            "true accumulates the bf16 gradients of training.optimizer.type muon in bf16; use false, or fp32",
        ),
    ],
}

# Combinations that must pass.
ACCEPTED = [
    ["parallel.tp=4"],
    ["parallel.tp=4", "model.num_kv_heads=2"],
    ["parallel.tp=4", "model.num_kv_heads=1"],
    ["parallel.tp=2", "model.ffn_size=385"],  # there is no dense block
    ["parallel.tp=2", "moe.num_shared_experts=1", "moe.expert_ffn_size=191"],  # shared experts are not cut
    ["parallel.tp=2", "parallel.cp=2"],
    ["parallel.cp=4", "parallel.zero_stage=3"],
    ["parallel.ep=2", "parallel.etp=2", "parallel.tp=2"],
    ["parallel.tp=2", "parallel.ep=8", "parallel.zero_stage=2"],
    ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "parallel.cp=2", "parallel.etp=3"],
    ["parallel.pp=4"],
    ["parallel.pp=4", DENSE],
    ["parallel.pp=2", "moe.every_n_layers=2"],
    ["parallel.pp=2", "training.precision=bf16"],
    ["parallel.tp=2", "parallel.zero_stage=0", "training.precision=fp64"],
    ["parallel.tp=2", "moe.router.type=resonance"],
    ["parallel.ep=2", "moe.router={type: resonance, scope: ep_group}"],
    ["parallel.tp=2", "moe.capacity.mode=static"],
    ["parallel.tp=2", "moe.capacity.mode=static", "moe.dispatcher=all_to_all"],
    ["parallel.ep=2", BROADCAST],
    ["parallel.ep=2", FINETUNE],
    [*MUON, "parallel.pp=2"],
    [*MUON, "parallel.cp=2"],
    [*MUON, "parallel.offload_optimizer=true"],
    [*BF16_MUON, "parallel.zero_stage=2"],
    [*BF16_MUON, DENSE, "parallel.cp=2"],
    *([f"parallel.zero_stage={stage}", "parallel.offload_optimizer=true"] for stage in (1, 2, 3)),
    ["parallel.offload_optimizer=true", "training.precision=bf16"],
    ["parallel.offload_optimizer=true", "parallel.pp=2"],
    ["parallel.offload_optimizer=true", "parallel.pp=2", "training.precision=bf16", "model.tie_embeddings=false"],
    ["parallel.zero_stage=3", "parallel.offload_parameters=true"],
    ["parallel.zero_stage=3", "parallel.offload_parameters=true", "parallel.offload_optimizer=true"],
    *([f"training.recompute={what}"] for what in ("none", "full", "attention", "moe")),
]


def merged(overrides: list[str]) -> dict:
    values: dict = {}
    for override in overrides:
        values = merge(values, read_override(override).values)
    return values


def test_every_rule_has_a_breaker() -> None:
    assert [rule.__name__ for rule in PARALLEL_RULES] == list(BREAKERS)


@pytest.mark.parametrize(
    "rule, overrides, path, what",
    [(rule, *case) for rule, cases in BREAKERS.items() for case in cases],
)
def test_settings_break_exactly_one_rule(rule: str, overrides: list[str], path: str, what: str) -> None:
    values = merged(overrides)
    config = RunConfig.model_validate(values)
    assert [r.__name__ for r in RULES for _ in r(config)] == [rule]
    _, problems = check(values)
    assert [problem.path for problem in problems] == [path]
    assert what in problems[0].what


@pytest.mark.parametrize("overrides", [case[0] for cases in BREAKERS.values() for case in cases], ids=" ".join)
def test_a_refusal_names_two_fields_and_a_value(overrides: list[str]) -> None:
    _, (problem,) = check(merged(overrides))
    assert "use " in problem.what
    assert any(field in problem.what for field in problem.related), problem


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_combinations_that_work_pass(overrides: list[str]) -> None:
    load_config([], overrides)


@pytest.mark.parametrize(
    "whole, wanted, divisor", [(8, 3, 2), (12, 5, 4), (7, 4, 1), (7, 5, 7), (1, 9, 1), (4096, 3, 2)]
)
def test_the_nearest_divisor(whole: int, wanted: int, divisor: int) -> None:
    assert nearest_divisor(whole, wanted) == divisor


@pytest.mark.parametrize("part, wanted, multiple", [(4, 6, 8), (4, 5, 4), (4, 1, 4), (3, 9, 9), (5, 192, 190)])
def test_the_nearest_multiple(part: int, wanted: int, multiple: int) -> None:
    assert nearest_multiple(part, wanted) == multiple


def test_the_nearest_values_that_a_refusal_gives_are_legal() -> None:
    """Every `use N` for a degree, taken at its word."""
    for size in range(1, 40):
        for ranks in range(1, 20):
            assert size % nearest_divisor(size, ranks) == 0
            assert nearest_multiple(ranks, size) % ranks == 0 < nearest_multiple(ranks, size)
