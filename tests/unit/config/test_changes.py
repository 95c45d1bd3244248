"""What a run that goes on does differently from the one before."""

import copy

import pytest

from megamoe.config.changes import changes
from megamoe.config.load import dump_config
from megamoe.testing.configs import tiny_config


def test_the_same_settings_are_no_change() -> None:
    assert not changes(dump_config(tiny_config()), dump_config(tiny_config()))


@pytest.mark.parametrize(
    "word, part",
    [
        ("training.seed=99", "training.seed: "),
        ("training.optimizer.lr=0.5", "training.optimizer.lr: "),
        ("training.global_batch_size=64", "training.global_batch_size: "),
        ("training.micro_batch_size=4", "training.micro_batch_size: "),  # which routers decide on
        ("training.faults.spike_factor=3.0", "training.faults.spike_factor: "),
        ("moe.router.balance_loss=0.5", "moe.router.balance_loss: "),
    ],
)
def test_what_decides_about_the_result_is_named(word: str, part: str) -> None:
    found = changes(dump_config(tiny_config()), dump_config(tiny_config(word)))
    assert [text.startswith(part) for text in found] == [True]
    assert found[0].endswith(f"-> {word.partition('=')[2]}")


@pytest.mark.parametrize(
    "word",
    [
        "parallel.ep=2",
        "training.log_every=5",
        "training.checkpoint.every=7",
        "data.num_workers=3",
        "ops.plan=reference",
    ],
)
def test_how_it_is_carried_out_is_not(word: str) -> None:
    assert not changes(dump_config(tiny_config()), dump_config(tiny_config(word)))


def test_a_setting_that_one_of_the_versions_does_not_know_is_not() -> None:
    now = dump_config(tiny_config())
    before = copy.deepcopy(now)
    del before["training"]["seed"]
    before["training"]["gone"] = 1
    assert not changes(before, now)
