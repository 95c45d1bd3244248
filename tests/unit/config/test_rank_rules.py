"""Everything that `training.rank_invariant` excludes is refused by name, and what it asks for passes."""

import pytest

from megamoe.config.load import check, load_config, merge
from megamoe.config.sources import read_override

EXACTLY = ["training.rank_invariant=true", "parallel.zero_stage=0", "ops.expert_ffn=by_source"]
FINETUNE = "finetune={checkpoint: runs/tiny, sources: [{name: a, path: a.jsonl}]}"
# One setting more, and the path that is named.
BREAKERS = {
    "training.precision=fp64": "training.precision",
    "parallel.zero_stage=1": "parallel.zero_stage",
    "parallel.tp=2": "parallel.tp",
    "parallel.cp=2": "parallel.cp",
    "parallel.pp=2": "parallel.pp",
    "parallel.etp=2": "parallel.etp",
    "ops.expert_ffn=blocked": "ops.expert_ffn",
    "moe.broadcast={threshold: fixed}": "moe.broadcast",
    "moe.router={type: resonance, scope: ep_group}": "moe.router.scope",
    "training.global_batch_size=24": "training.global_batch_size",
    "training.rank_invariant=false": "ops.expert_ffn",
    "training.frozen=[embedding.weight]": "training.frozen",
    "training.trainable=['*.experts.*']": "training.trainable",
    FINETUNE: "finetune",
}


def problems_of(*overrides: str) -> dict[str, str]:
    values: dict[str, object] = {}
    for override in overrides:
        values = merge(values, read_override(override).values)
    return {problem.path: problem.what for problem in check(values)[1]}


@pytest.mark.parametrize("override, path", BREAKERS.items(), ids=BREAKERS.values())
def test_what_it_excludes(override: str, path: str) -> None:
    found = problems_of(*EXACTLY, override)
    assert list(found) == [path]
    assert "; use " in found[path]


def test_a_batch_that_would_do_is_named() -> None:
    message = problems_of(*EXACTLY, "training.global_batch_size=24")["training.global_batch_size"]
    assert "6 micro-batches" in message
    assert message.endswith("use 16 or 32")


def test_optimizers_and_dispatchers() -> None:
    muon = ["training.optimizer.type=muon", "training.gradient_clipping=0"]
    assert list(problems_of(*EXACTLY, *muon)) == ["training.optimizer.type"]
    padded = ["moe.dispatcher=padded", "moe.capacity.mode=static"]
    assert list(problems_of(*EXACTLY, *padded)) == ["moe.dispatcher"]


@pytest.mark.parametrize("more", [[], ["parallel.ep=4"], ["moe.router.type=resonance"], ["moe.capacity.mode=static"]])
def test_what_it_allows(more: list[str]) -> None:
    load_config(["configs/tiny.yaml", "configs/parallel/rank_invariant.yaml"], more)
