"""The balance and the locality loss are the same on every layout, with every recomputation, and so are their gradients.

Both are of one micro-batch: products or logarithms of means over its tokens. What training adds up is their mean over
the micro-batches of a step. So they do not change with the ranks that share a micro-batch, its experts or its blocks,
nor with how micro-batches are spread over ranks and accumulation; they do change with what is in one micro-batch. The
locality loss also depends on the node that a micro-batch is on: on layouts with nodes it is compared with one process
that is told of each micro-batch which experts are near.

Coefficients are such that a loss is most of all that is trained, so that nothing hides behind the cross entropy.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from torch import nn

from megamoe.common import env
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.moe.routers.base import Router
from megamoe.testing import parity
from megamoe.testing.configs import tiny_config
from megamoe.testing.parity import ParityRun
from megamoe.testing.ranks import run_ranks

LIMIT = 60.0
"""Seconds for everything that ranks do here, or they hang."""
STEPS = 2
EXPERTS, MICRO_BATCHES = 8, 4
HOT = "model.init_std=0.1"
"""So that the experts' shares are far from even."""
EXACT = ("training.precision=fp64", "parallel.zero_stage=0")
TOLERANCE = parity.Tolerance(*[1e-12] * 7)
"""In fp64, relative to the largest of a tensor."""

LOSSES = {
    "balance": ("moe.router.balance_loss=50.0",),
    "locality": ("moe.router={type: resonance, balance_loss: 0.0, locality_loss: 50.0}",),
}
RECOMPUTE = ("full", "attention", "moe")
TP2, EP2, CP2, PP2, ETP2 = (f"parallel.{axis}=2" for axis in ("tp", "ep", "cp", "pp", "etp"))
EP4 = "parallel.ep=4"


class Layout(NamedTuple):
    ranks: int
    overrides: tuple[str, ...]
    per_node: int = 0
    """Ranks on a node; 0: all on one. Else such that micro-batch m is near the first half of the experts for even m,
    and near the other half for odd m."""
    recomputes: bool = False


LAYOUTS = {
    "dp2": Layout(2, ()),
    "ep2": Layout(2, (EP2,), per_node=1),
    "etp2": Layout(2, (ETP2,)),
    "tp2": Layout(2, (TP2,)),
    "tp2-ep2": Layout(2, (TP2, EP2), recomputes=True),
    "tp2-ep4": Layout(4, (TP2, EP4), per_node=2),
    "cp2-ep2": Layout(2, (CP2, EP2), recomputes=True),
    "cp2-ep4": Layout(4, (CP2, EP4), per_node=2),
    "pp2": Layout(2, (PP2,), recomputes=True),
    "pp2-ep2": Layout(4, (PP2, EP2), per_node=1),
}
THOROUGH = ("cp2-ep4",)


class Case(NamedTuple):
    loss: str
    recompute: str = "none"


def cases_of(recomputes: bool) -> list[Case]:
    return [Case(loss, recompute) for loss in LOSSES for recompute in ("none", *(RECOMPUTE if recomputes else ()))]


def train(case: Case, overrides: tuple[str, ...], by_micro_batch: bool = False) -> ParityRun:
    config = tiny_config(HOT, f"training.recompute={case.recompute}", *LOSSES[case.loss], *overrides)
    return parity.train_steps(config, STEPS, before=tell_what_is_near if by_micro_batch else lambda model: None)


def tell_what_is_near(model: nn.Module) -> None:
    """Half of the experts, in turn: each router sees the micro-batches of a step one after the other."""
    for router in (module for module in model.modules() if isinstance(module, Router)):
        seen = iter(range(STEPS * MICRO_BATCHES))

        def move(router: nn.Module, args: object, seen: object = seen) -> None:
            assert isinstance(router, Router)
            number = next(seen)  # type: ignore[call-overload]
            router.all_on_node = False
            router.on_node_E = torch.arange(EXPERTS) // (EXPERTS // 2) == number % 2

        router.register_forward_pre_hook(move)


def train_all(cases: list[Case], overrides: tuple[str, ...], per_node: int) -> list[ParityRun]:
    if per_node:
        env.export("LOCAL_WORLD_SIZE", str(per_node))
    return [train(case, overrides) for case in cases]


@functools.cache
def runs_of(name: str) -> dict[Case, ParityRun]:
    layout = LAYOUTS[name]
    cases, overrides = cases_of(layout.recomputes), (*layout.overrides, *EXACT)
    runs = run_ranks(train_all, layout.ranks, cases, overrides, layout.per_node, timeout=LIMIT)[0]
    return dict(zip(cases, runs, strict=True))


class References(NamedTuple):
    """One process."""

    together: dict[str, ParityRun]
    """All experts on one node."""
    by_micro_batch: dict[str, ParityRun]
    """Half of them near, in turn."""
    without: dict[str, ParityRun]
    """The loss without its coefficient."""
    recomputed: dict[Case, ParityRun]


def train_references() -> References:
    off = (*EXACT, "moe.router.balance_loss=0.0")
    unlocal = (*off, "moe.router.locality_loss=0.0")
    return References(
        {loss: train(Case(loss), EXACT) for loss in LOSSES},
        {loss: train(Case(loss), EXACT, by_micro_batch=True) for loss in LOSSES},
        {"balance": train(Case("balance"), off), "locality": train(Case("locality"), unlocal)},
        {case: train(case, EXACT) for case in cases_of(recomputes=True)},
    )


@functools.cache
def references() -> References:
    return run_ranks(train_references, 1, timeout=LIMIT)[0]


@pytest.mark.parametrize(
    "name, case",
    [
        pytest.param(name, case, id="-".join((name, *case)), marks=pytest.mark.thorough if name in THOROUGH else ())
        for name, layout in LAYOUTS.items()
        for case in cases_of(layout.recomputes)
    ],
)
def test_layouts_change_nothing(name: str, case: Case) -> None:
    runs = references().by_micro_batch if LAYOUTS[name].per_node else references().together
    parity.compare(runs_of(name)[case], runs[case.loss], TOLERANCE)


@pytest.mark.parametrize("case", cases_of(recomputes=True)[1:], ids="-".join)
def test_recomputation_changes_nothing(case: Case) -> None:
    parity.compare(references().recomputed[case], references().together[case.loss], TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_most_of_what_is_trained(loss: str) -> None:
    """Or nothing above would tell anything about it. Nor would nodes, if they made no difference."""
    one, without = references().together[loss], references().without[loss]
    assert one.auxiliary[0] > one.losses[0]
    assert without.auxiliary[0] == 0.0
    routers = [name for name in one.gradients if ".router." in name]
    assert routers
    assert all(one.gradients[name].norm() > 10 * without.gradients[name].norm() for name in routers)
    if loss == "locality":
        near = references().by_micro_batch[loss]
        assert parity.errors_of(near, one)["auxiliary"].value > 0.1
        assert parity.errors_of(near, one)["gradient"].value > 0.1


# --- Splitting a step into micro-batches

SPLITS = (1, 2, 4)
"""Sequences in a micro-batch."""


class Samples:
    """Eight sequences per step, whatever micro-batches they come in; each sequence occurs `copies` times in a row."""

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def __call__(self, config: RunConfig, step: int, micro_batch: int) -> Batch:
        size = config.training.micro_batch_size
        numbers = [sample // self.copies for sample in range(micro_batch * size, (micro_batch + 1) * size)]
        single = tiny_config("training.micro_batch_size=1")
        parts = [parity.random_tokens(single, step, number) for number in numbers]
        return Batch(torch.cat([part.tokens_BS for part in parts]), torch.cat([part.labels_BS for part in parts]))


def train_splits(loss: str, copies: int) -> list[ParityRun]:
    words = (HOT, *LOSSES[loss], *EXACT)
    configs = [tiny_config(*words, f"training.micro_batch_size={size}") for size in SPLITS]
    return [parity.train_steps(config, STEPS, Samples(copies)) for config in configs]


def differences(runs: list[ParityRun]) -> list[dict[str, float]]:
    """Of each split to the first one. Which tokens are in which micro-batch differs, so decisions are not compared."""
    return [{kind: error.value for kind, error in parity.errors_of(run, runs[0]).items()} for run in runs[1:]]


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_of_like_content_split_as_they_may(loss: str) -> None:
    """Four copies of a sequence are one micro-batch, or two, or four: the mean over micro-batches is the same."""
    for errors in differences(run_ranks(train_splits, 1, loss, 4, timeout=LIMIT)[0]):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_of_what_is_in_one_micro_batch(loss: str) -> None:
    """By definition: of sequences that differ, the mean of the micro-batches' losses is not that of all together. The
    cross entropy is."""
    runs = run_ranks(train_splits, 1, loss, 1, timeout=LIMIT)[0]
    for run in runs[1:]:
        assert abs(run.losses[0] - runs[0].losses[0]) < 1e-12 * runs[0].losses[0]
        assert run.auxiliary[0] < (1 - 1e-4) * runs[0].auxiliary[0]
