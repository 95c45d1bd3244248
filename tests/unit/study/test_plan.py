"""A study's file: read strictly, and every arm checked before anything starts."""

from pathlib import Path

import pytest

from megamoe.common.errors import ConfigError, MegamoeError
from megamoe.study.plan import cost_config, load_study

PLAN = """\
title: T
question: Q?
config: [base.yaml]
baseline: a
arms:
  a: {label: A}
  b: {label: B, set: [moe.router.type=resonance]}
seeds: [3, 4]
cost: {ranks: 2, set: [parallel.ep=2]}
"""


def write(folder: Path, text: str = PLAN) -> Path:
    (folder / "base.yaml").write_text("# Common to all arms.\nmoe: {num_experts: 4}\n")
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def test_arms_are_laid_over_the_common_configuration(tmp_path: Path) -> None:
    study = load_study(write(tmp_path), ["training.steps=30"])
    assert [arm.config.moe.num_experts for arm in study.arms.values()] == [4, 4]
    assert [arm.config.moe.router.type for arm in study.arms.values()] == ["topk", "resonance"]
    assert [arm.config.training.steps for arm in study.arms.values()] == [30, 30]
    assert cost_config(study, study.arms["b"]).parallel.ep == 2
    assert study.seeds == (3, 4)


def test_another_setting_of_the_same_arms(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("moe: {num_experts: 16}\n")
    study = load_study(write(tmp_path), more=[tmp_path / "large.yaml"])
    assert [arm.config.moe.num_experts for arm in study.arms.values()] == [16, 16]
    assert [arm.config.moe.router.type for arm in study.arms.values()] == ["topk", "resonance"]


def test_a_part_of_the_arms_and_seeds_keeps_the_baseline(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, PLAN.replace("  b:", "  c: {label: C}\n  b:")), only=["b"], num_seeds=1)
    assert list(study.arms) == ["a", "b"]
    assert study.seeds == (3,)


@pytest.mark.parametrize(
    "change, said",
    [
        (("baseline: a", "baseline: z"), "baseline: z is none of the arms: a, b"),
        (("seeds: [3, 4]", "seeds: [3, 3]"), "seeds: an entry is given twice"),
        (("seeds: [3, 4]", "seeds: []"), "seeds"),
        (("title: T", "titel: T"), "titel: unknown key; did you mean title?"),
        (("{label: A}", "{set: []}"), "arms.a.label: is required and not given"),
        (("{label: A}", "{label: A, set: [training.seed=3]}"), "the study sets this for each run"),
        (("set: [parallel.ep=2]", "set: [parallel.ep=2, training.output_dir=x]"), "cost.set: training.output_dir=x: "),
        (("type=resonance", "type=resonanz"), "Arm b: "),
        (("set: [moe.router", "set: [training.steps=7, moe.router"), "does not read the same samples"),
        (("config: [base.yaml]", "config: [none.yaml]"), "none.yaml"),
        (("question: Q?", "question: [Q"), "study.yaml"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = write(tmp_path, PLAN.replace(*change))
    with pytest.raises(MegamoeError) as caught:
        load_study(path)
    assert said in str(caught.value)


def test_wrong_choices_are_said(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ConfigError, match="no such arm"):
        load_study(path, only=["q"])
    with pytest.raises(ConfigError, match="1 to 2"):
        load_study(path, num_seeds=3)
    with pytest.raises(ConfigError, match=r"training\.seed=99: the study sets this"):
        load_study(path, ["training.seed=99"])
    with pytest.raises(MegamoeError, match="never validated"):
        load_study(path, ["training.validation.batches=0"])
    study = load_study(write(tmp_path, PLAN.replace("ranks: 2", "ranks: 3")))
    with pytest.raises(MegamoeError, match="world size 3"):
        cost_config(study, study.baseline)
