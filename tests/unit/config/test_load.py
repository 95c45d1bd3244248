"""Layers, overrides and the one error that names every problem."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.common.errors import ConfigError
from megamoe.config.load import dump_config, load_config
from megamoe.config.routers import ResonanceRouterConfig, TopKRouterConfig
from megamoe.config.run import RunConfig


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(*overrides: str, paths: tuple[Path, ...] = ()) -> str:
    """The text of the error that these settings cause."""
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    return str(caught.value)


def test_nothing_given_is_the_defaults() -> None:
    assert load_config([]) == RunConfig()


def test_later_layers_win_and_mappings_merge(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "training: {steps: 10, seed: 1, optimizer: {lr: 1e-2, eps: 1e-6}}\n")
    second = write(tmp_path, "b.yaml", "training: {steps: 20, optimizer: {lr: 2e-2}}\n")
    config = load_config([first, second], ["training.steps=30"])
    assert config.training.steps == 30
    assert config.training.seed == 1
    assert config.training.optimizer.lr == 0.02
    assert config.training.optimizer.eps == 1e-6


def test_lists_are_replaced(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "data: {sources: [{name: a, path: a}, {name: b, path: b}]}\n")
    config = load_config([first], ["data.sources=[{name: c, path: c}]"])
    assert [source.name for source in config.data.sources] == ["c"]


def test_a_changed_router_type_starts_from_that_types_defaults(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "moe: {router: {score: sigmoid, balance_loss: 0.5}}\n")
    second = write(tmp_path, "b.yaml", "moe: {router: {type: resonance, affinity: cosine}}\n")
    assert load_config([first, second]).moe.router == ResonanceRouterConfig(affinity="cosine")


def test_the_same_router_type_merges(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "moe: {router: {score: sigmoid, balance_loss: 0.5}}\n")
    second = write(tmp_path, "b.yaml", "moe: {router: {type: topk, z_loss: 0.25}}\n")
    expected = TopKRouterConfig(score="sigmoid", balance_loss=0.5, z_loss=0.25)
    assert load_config([first, second]).moe.router == expected


@pytest.mark.parametrize("order", [1, -1])
def test_overrides_of_a_new_router_type_come_in_any_order(order: int) -> None:
    overrides = ["moe.router.type=resonance", "moe.router.affinity=cosine"][::order]
    assert load_config([], overrides).moe.router == ResonanceRouterConfig(affinity="cosine")


@pytest.mark.parametrize(
    "text, expected",
    [("3e-4", 3e-4), ("3.e2", 300.0), (".5", 0.5), ("1", 1.0), ("+1.5E+2", 150.0), ("1e3", 1000.0)],
)
def test_numbers_are_those_of_yaml_1_2(text: str, expected: float) -> None:
    assert load_config([], [f"training.optimizer.lr={text}"]).training.optimizer.lr == expected


@pytest.mark.parametrize("text, expected", [("no", "no"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01")])
def test_words_stay_words(text: str, expected: str) -> None:
    assert load_config([], [f"training.output_dir={text}"]).training.output_dir == expected


def test_override_values_are_yaml() -> None:
    config = load_config([], ["training.optimizer.betas=[0.8, 0.9]", "training.stop_after_step=null"])
    assert config.training.optimizer.betas == (0.8, 0.9)
    assert config.training.stop_after_step is None
    assert load_config([], ["training.seed=010"]).training.seed == 10


def test_a_dumped_configuration_loads_to_itself(tmp_path: Path) -> None:
    overrides = ["moe.router.type=resonance", "moe.router.scale_init=35.0", "deepspeed_extra.dump_state=true"]
    config = load_config([], [*overrides, "data.sources=[{name: c, path: c, weight: 0.1}]"])
    path = write(tmp_path, "config.json", json.dumps(dump_config(config)))
    assert load_config([path]) == config


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "training:\n  stepz: 3\n  seed: '7'\nmodel:\n  norm: tourch\n")
    text = complaint("moe.num_experts=3", "parallel.ep=2", "training.micro_batch_size=3", paths=(path,))
    assert "The configuration has 5 problems:" in text
    assert f"training.stepz: unknown key; did you mean training.steps? ({path}:2)" in text
    assert f"training.seed: must be a valid integer, got '7' ({path}:3)" in text
    assert f"did you mean 'torch'?), got 'tourch' ({path}:5)" in text
    assert "moe.num_experts: 3 experts do not divide over parallel.ep 2" in text
    assert "training.global_batch_size: no multiple of training.micro_batch_size 3: 16 % 3 = 1" in text
    assert [f"  {number}. " in text for number in range(1, 7)] == [True] * 5 + [False]


def test_unread_layers_are_reported_with_wrong_fields_but_without_rules(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    text = complaint("nonsense", "training.stepz=3", "moe.num_experts=3", "parallel.ep=2", paths=(missing,))
    assert "The configuration has 3 problems:" in text
    assert "the override 'nonsense' is not of the form" in text
    assert f"there is no file {missing}" in text
    assert "did you mean training.steps?" in text


@pytest.mark.parametrize(
    "override, hint",
    [
        ("training.optimiser.lr=1.0", "training.optimiser: unknown key; did you mean training.optimizer?"),
        ("trainin.steps=1", "trainin: unknown key; did you mean training?"),
        ("training.num_experts=4", "did you mean moe.num_experts?"),
        ("lr=1.0", "did you mean training.optimizer.lr?"),
        ("moe.router.affinity=cosine", "it belongs to moe.router.type: resonance"),
        ("moe.router.afinity=cosine", "did you mean moe.router.affinity?"),
        ("training.zzzzqqqq=1", "unknown key; training has: checkpoint, "),
        ("data.sources=[{name: a, path: b, wait: 1.0}]", "did you mean data.sources.0.weight?"),
    ],
)
def test_unknown_keys_name_the_nearest_valid_one(override: str, hint: str) -> None:
    text = complaint(override)
    assert hint in text
    assert "has 1 problem:" in text


@pytest.mark.parametrize(
    "override, hint",
    [
        (
            "moe.router.type=resonence",
            "'resonance', 'sinkhorn', 'topk' (did you mean 'resonance'",
        ),
        ("moe.router=3", "moe.router: must be a section with keys of its own, got 3"),
        ("training=", "training: must be a section with keys of its own, got None"),
        ("training.optimizer.lr=.inf", "training.optimizer.lr: must be a finite number, got inf"),
        ("training.steps=true", "training.steps: must be a valid integer, got True"),
        ("training.steps=2.0", "training.steps: must be a valid integer, got 2.0"),
        ("data.sources=[{name: a}]", "data.sources.0.path: is required and not given"),
        ("=3", "is not of the form section.field=value"),
        ("a..b=3", "is not of the form section.field=value"),
        ("training.steps=[1", "cannot read the value of 'training.steps=[1'"),
        ("deepspeed_extra={1: 2}", "deepspeed_extra.1: "),
    ],
)
def test_wrong_values_say_what_was_given(override: str, hint: str) -> None:
    text = complaint(override)
    assert hint in text
    assert "has 1 problem:" in text


@pytest.mark.parametrize(
    "text, hint",
    [
        ("training:\n  steps: 1\n  steps: 2\n", "training.steps: this key is given twice"),
        ("- 1\n", "not a mapping of sections"),
        ("training: [\n", "cannot read"),
        ("? [a]\n: 1\n", "cannot read"),
        ("model: &m\n  norm: *m\n", "refers to itself"),
        ("a: 1\n---\nb: 2\n", "cannot read"),
    ],
)
def test_unreadable_yaml_is_a_problem(tmp_path: Path, text: str, hint: str) -> None:
    path = write(tmp_path, "a.yaml", text)
    message = complaint(paths=(path,))
    assert hint in message
    assert str(path) in message


def test_unreadable_files_are_problems(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    twice = write(tmp_path, "twice.json", '{"training": {"steps": 1, "steps": 2}}')
    broken = write(tmp_path, "broken.json", "{")
    text = complaint(paths=(binary, twice, broken, tmp_path))
    assert "has 4 problems:" in text
    assert "these keys are given twice: steps" in text


def test_an_empty_overlay_changes_nothing(tmp_path: Path) -> None:
    assert load_config([write(tmp_path, "a.yaml", "# nothing yet\n")]) == RunConfig()


def test_rules_are_not_judged_on_fields_that_are_wrong_themselves() -> None:
    # ep 3 would not divide the default of 8 experts, but the user meant another number of experts.
    assert "has 1 problem:" in complaint("parallel.ep=3", "moe.num_expert=9")
    assert "has 1 problem:" in complaint("parallel.ep=3", "moe.num_experts=nine")
    assert "has 2 problems:" in complaint("parallel.ep=3", "training.seed=nine")


def test_loading_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, megamoe.config.load as load; load.load_config([]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
