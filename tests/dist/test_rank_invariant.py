"""`training.rank_invariant`: the same bits on one rank, on two and on four."""

from __future__ import annotations

import functools

import pytest
import torch

from megamoe.testing import assert_equal_bits, parity
from megamoe.testing.configs import tiny_config
from megamoe.testing.ranks import run_ranks

STEPS = 4
EXACTLY = ("training.rank_invariant=true", "parallel.zero_stage=0", "ops.expert_ffn=by_source")
SETTINGS = {
    "topk": (),
    "resonance": ("moe.router.type=resonance",),
    "bound": ("moe.router.type=resonance", "moe.capacity={mode: etr_bound, momentum: 0.5}"),
    "sigmoid": ("moe.router={score: sigmoid, bias_update_rate: 0.001}", "training.recompute=full"),
}
LAYOUTS = {"dp2": (2, 1), "ep2": (2, 2), "ep4": (4, 4), "ep2-edp2": (4, 2)}


def train(overrides: tuple[str, ...], steps: int = STEPS) -> parity.ParityRun:
    return parity.train_steps(tiny_config(*overrides), steps)


@functools.cache
def one_rank(setting: str) -> parity.ParityRun:
    return run_ranks(train, 1, (*EXACTLY, *SETTINGS[setting]))[0]


def thorough(setting: str, layout: str) -> bool:
    return layout in ("dp2", "ep4") or setting in ("bound", "sigmoid")


CASES = [
    pytest.param(setting, layout, marks=[pytest.mark.thorough] if thorough(setting, layout) else [])
    for setting in SETTINGS
    for layout in LAYOUTS
]


@pytest.mark.parametrize("setting, layout", CASES)
def test_every_bit_is_one_ranks(setting: str, layout: str) -> None:
    world_size, ep = LAYOUTS[layout]
    run = run_ranks(train, world_size, (*EXACTLY, *SETTINGS[setting], f"parallel.ep={ep}"))[0]
    expected = one_rank(setting)
    assert run.losses == expected.losses
    assert run.norms == expected.norms
    for kind in ("gradients", "weights", "statistics"):
        found, wanted = getattr(run, kind), getattr(expected, kind)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert_equal_bits(value, wanted[name], name=f"{kind} {name}")


def test_it_is_the_same_training_as_without() -> None:
    run, expected = one_rank("topk"), run_ranks(train, 1, ("parallel.zero_stage=0",))[0]
    assert parity.compare_weights(run, expected) < 5e-5
    assert any(not torch.equal(run.weights[name], value) for name, value in expected.weights.items())
