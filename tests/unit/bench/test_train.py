"""The training benchmark in a tiny size: the same model but for its MoE layers, and what the report holds."""

import json
import math

import torch

from megamoe.bench.contestants import OURS
from megamoe.bench.train import PEERS, DeepSpeedBlockFFN, TrainSettings, bench_train, markdown, replace_layers
from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.model.decoder import Decoder


def tiny() -> RunConfig:
    size = [
        "model.num_layers=2",
        "model.hidden_size=16",
        "model.num_heads=2",
        "model.ffn_size=16",
        "data.tokenizer.vocab_size=512",
    ]
    moe = ["moe.num_experts=4", "moe.expert_ffn_size=16", "moe.first_k_dense=1", "parallel.ep=2"]
    batch = ["data.seq_length=8", "training.micro_batch_size=1", "training.global_batch_size=4"]
    return load_config([], size + moe + batch)


def test_ours_and_theirs_train_in_one_run() -> None:
    report = json.loads(
        json.dumps(bench_train(tiny(), TrainSettings(ranks=2, steps=1, rounds=2, warmup=0), "a remark"))
    )
    assert [row["contestant"] for row in report["results"]] == [OURS, *PEERS]
    for row in report["results"]:
        assert row["tokens_per_second"]["min"] > 0
        assert abs(row["last_loss"] - math.log(512)) < 0.5  # two steps on random tokens leave it where it starts
    assert [t["target"].rpartition(" over ")[2] for t in report["targets"]] == list(PEERS)
    assert report["conditions"]["note"] == "a remark"
    assert all(name in markdown(report) for name in (OURS, *PEERS))


def test_only_the_moe_layers_are_replaced_and_the_experts_have_our_size() -> None:
    config = load_config(
        [], ["model.hidden_size=16", "model.num_heads=2", "moe.expert_ffn_size=24", "moe.first_k_dense=1"]
    )
    ours, theirs = Decoder(config, 64), Decoder(config, 64)
    replace_layers(theirs, config, drop_tokens=False)
    assert [isinstance(block.ffn, DeepSpeedBlockFFN) for block in theirs.blocks] == [False, True, True, True]

    def numbers(model: Decoder, kind: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if kind in name)

    assert numbers(ours, "experts") == numbers(theirs, "experts")
    total = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert total[0] == total[1]
    assert all(p.dtype == torch.float32 for p in theirs.parameters())
