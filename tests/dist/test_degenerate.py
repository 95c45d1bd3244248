"""Loads at the edge, on every kind of parallelism: ranks and experts without rows, all rows on one expert, most or all
of a rank's rows dropped, sequences that do not divide. Training ends and equals one process, or is refused.

Where tokens go is set by the router's selection bias or running mean, which are the same on every layout.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megamoe.common.errors import ConfigError
from megamoe.config.run import RunConfig
from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.moe.routers.base import Router
from megamoe.moe.routers.resonance import ResonanceRouter
from megamoe.moe.routers.topk import TopKRouter
from megamoe.testing import parity, parity_record
from megamoe.testing.configs import tiny_config
from megamoe.testing.parity import ParityRun
from megamoe.testing.ranks import RankError, RankTimeout, run_ranks
from megamoe.training.workarounds import attributes

LIMIT = 60.0
"""Seconds for everything that ranks do here, or they hang."""
STEPS = 2
LENGTH = 32
EXACT = ("training.precision=fp64", "parallel.zero_stage=0")


class Layout(NamedTuple):
    ranks: int
    overrides: tuple[str, ...]


LAYOUTS = {
    "tp2": Layout(2, ("parallel.tp=2",)),
    "tp2-ep2": Layout(2, ("parallel.tp=2", "parallel.ep=2")),
    "cp2-ep2": Layout(2, ("parallel.cp=2", "parallel.ep=2")),
    "etp2": Layout(2, ("parallel.etp=2",)),
    "pp2": Layout(2, ("parallel.pp=2",)),
    "tp2-ep2-etp2": Layout(4, ("parallel.tp=2", "parallel.ep=2", "parallel.etp=2")),
    "pp2-ep2": Layout(4, ("parallel.pp=2", "parallel.ep=2")),
}
THOROUGH = ("tp2-ep2-etp2", "pp2-ep2")


def all_of(layouts: Iterable[str]) -> list[Any]:
    """As parameters of a test."""
    return [pytest.param(name, marks=pytest.mark.thorough if name in THOROUGH else ()) for name in layouts]


def only(*experts: int) -> Callable[[Router], None]:
    """Tokens go to these experts alone."""

    def disturb(router: Router) -> None:
        assert isinstance(router, TopKRouter)
        router.bias_E.fill_(-100.0)[list(experts)] = 0.0

    return disturb


def towards(expert: int) -> Callable[[Router], None]:
    """Every token's affinity is highest to this expert: what it differs from the running mean by points there."""

    def disturb(router: Router) -> None:
        assert isinstance(router, ResonanceRouter)
        width = router.hidden_size // router.num_experts
        router.token_mean_D[expert * width : (expert + 1) * width] = -3.0

    return disturb


class Load(NamedTuple):
    overrides: tuple[str, ...]
    disturb: Callable[[Router], None]
    reached: Callable[[Tensor], bool]
    """Whether a micro-batch's assignments, bool [T, E], are what the load is named after."""


SECOND_HALF = torch.arange(2 * LENGTH) % LENGTH >= LENGTH // 2
"""The rows of a micro-batch that the second of two ranks has."""
ONE, RESONANCE = "moe.top_k=1", "moe.router.type=resonance"
LOADS = {
    "an empty expert": Load((), only(0, 1, 2, 4, 5, 6, 7), lambda kept_TE: not kept_TE[:, 3].any()),
    "a rank without rows": Load((), only(0, 1), lambda kept_TE: bool(kept_TE[:, :2].all() and kept_TE.sum() == 128)),
    "one expert": Load((ONE,), only(5), lambda kept_TE: bool(kept_TE[:, 5].all())),
    "one expert, most rows dropped": Load(
        (ONE, "moe.capacity={mode: static, factor: 1.5}"),
        only(5),
        lambda kept_TE: bool(kept_TE[:, 5].sum() == kept_TE.sum() == 12),
    ),
    # The expert of the rank that keeps its rows: the other one neither sends nor receives any.
    "all rows of a rank dropped": Load(
        (ONE, "moe.capacity={mode: static, factor: 1.5, drop: position}"),
        only(2),
        lambda kept_TE: bool(kept_TE[:12, 2].all() and kept_TE.sum() == 12 and not kept_TE[SECOND_HALF].any()),
    ),
    "one expert by affinity": Load(
        (ONE, RESONANCE, "moe.capacity.mode=static", "moe.router.threshold=0.5"),
        towards(5),
        lambda kept_TE: bool(0 < kept_TE[:, 5].sum() == kept_TE.sum() <= 9),
    ),
}


def train(name: str, overrides: tuple[str, ...]) -> ParityRun:
    load = LOADS[name]

    def before(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, Router):
                load.disturb(module)

    return parity.train_steps(tiny_config(*load.overrides, *overrides), STEPS, before=before)


def train_all(overrides: tuple[str, ...]) -> dict[str, ParityRun]:
    return {name: train(name, overrides) for name in LOADS}


@functools.cache
def runs_of(layout: str) -> dict[str, ParityRun]:
    ranks, overrides = LAYOUTS[layout]
    return run_ranks(train_all, ranks, (*overrides, *EXACT), timeout=LIMIT)[0]


@functools.cache
def references() -> dict[str, ParityRun]:
    return run_ranks(train_all, 1, EXACT, timeout=LIMIT)[0]


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("layout", all_of(LAYOUTS))
def test_equals_one_process(layout: str, name: str) -> None:
    run, one = runs_of(layout)[name], references()[name]
    parity.compare(run, one, parity.EXACT)
    assert len(one.choices) == STEPS * 4 * 2, "every micro-batch in every block was looked at"
    assert all(LOADS[name].reached(kept_TE) for kept_TE in one.choices.values())


def train_by_stage(name: str, overrides: tuple[str, ...]) -> list[ParityRun]:
    return [train(name, (*overrides, f"parallel.zero_stage={stage}")) for stage in (1, 2, 3)]


@pytest.mark.parametrize("ranks, overrides", [(2, ("parallel.ep=2",)), LAYOUTS["tp2-ep2"]], ids=["ep2", "tp2-ep2"])
def test_a_rank_without_rows_under_zero(ranks: int, overrides: tuple[str, ...]) -> None:
    """Its experts have gradients all the same, which ZeRO reduces as they arrive."""
    for run in run_ranks(train_by_stage, ranks, "a rank without rows", overrides, timeout=LIMIT)[0]:
        parity.compare(run, references()["a rank without rows"])


# --- A micro-batch without tokens


def every_other_empty(config: RunConfig, step: int, micro_batch: int) -> Batch:
    """Micro-batches of which the odd ones are padding throughout."""
    tokens_BS, labels_BS = parity.random_tokens(config, step, micro_batch)[:2]
    documents_BS = torch.full_like(tokens_BS, PADDING if micro_batch % 2 else 0)
    labels_BS = labels_BS.masked_fill(documents_BS == PADDING, IGNORED)
    return Batch(tokens_BS, labels_BS, documents_BS, targets=float(2 * LENGTH) / 2)


CAPACITIES = {"dropless": (), "static": ("moe.capacity.mode=static",), "resonance": (RESONANCE,)}


def train_empty(overrides: tuple[str, ...]) -> dict[str, ParityRun]:
    """Without a record of decisions, which knows of no padding where micro-batches are spread over ranks."""
    configs = {name: tiny_config(*words, *overrides) for name, words in CAPACITIES.items()}
    with attributes(parity_record, {"recording": lambda *args: contextlib.nullcontext()}):
        return {name: parity.train_steps(config, STEPS, every_other_empty) for name, config in configs.items()}


PADDED = {
    "ep2": Layout(2, ("parallel.ep=2",)),
    "tp2-ep4": Layout(4, ("parallel.tp=2", "parallel.ep=4")),
    **{name: LAYOUTS[name] for name in ("cp2-ep2", "etp2", "pp2", "pp2-ep2")},
}


@functools.cache
def padded_references() -> dict[str, ParityRun]:
    return run_ranks(train_empty, 1, EXACT, timeout=LIMIT)[0]


@pytest.mark.parametrize("layout", all_of(PADDED))
def test_a_rank_whose_tokens_are_all_padding(layout: str) -> None:
    ranks, overrides = PADDED[layout]
    for name, run in run_ranks(train_empty, ranks, (*overrides, *EXACT), timeout=LIMIT)[0].items():
        parity.compare(run, padded_references()[name], parity.EXACT)


# --- Sequences that do not divide

UNEVEN = {
    "tp2": (("parallel.tp=2",), 33),
    "cp2": (("parallel.cp=2",), 33),
    "cp2-tp2": (("parallel.cp=2", "parallel.tp=2"), 34),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_sequences_that_do_not_divide_are_refused(name: str) -> None:
    layout, length = UNEVEN[name]
    with pytest.raises(ConfigError) as caught:
        tiny_config(*layout, f"data.seq_length={length}")
    for word in ("data.seq_length", f"{length} tokens", "parallel.tp", "parallel.cp"):
        assert word in str(caught.value)


def train_uneven(layout: tuple[str, ...], length: int) -> None:
    """Past the configuration: batches of another length than it says."""
    longer = tiny_config(f"data.seq_length={length}")
    parity.train_steps(tiny_config(*layout), 1, lambda config, *where: parity.random_tokens(longer, *where))


@pytest.mark.parametrize("name", UNEVEN)
def test_sequences_that_do_not_divide_are_an_error_and_no_hang(name: str) -> None:
    layout, length = UNEVEN[name]
    with pytest.raises(RankError) as caught:
        run_ranks(train_uneven, 2 ** len(layout), layout, length, timeout=LIMIT)
    assert not isinstance(caught.value, RankTimeout)
