"""What goes wrong, mostly without a message, where one of our safeguards around DeepSpeed is missing.

Each test takes a safeguard out inside of the rank function, and the defect has to show; most run the same with the
safeguard first. Eight defects, by the number in a test's name: (1) experts of different ranks become one, (2) the
gradient's norm misses or repeats something, so clipping goes wrong, (3) layouts of one batch train different weights,
(4) a checkpoint comes back as something else, (5) a stage that trains other kinds of parameters waits for ever, (6) so
does a rank without rows, (7) the engine does not see MoE layers, (8) the balance loss depends on the layout.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.model import decoder
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.model.pipeline import DecoderStage
from megamoe.moe.experts import Experts
from megamoe.moe.marker import ExpertParallelMarker, group_name
from megamoe.moe.routers.topk import TopKRouter
from megamoe.parallel import collectives
from megamoe.parallel.groups import Groups, build_groups
from megamoe.testing import parity
from megamoe.testing import parity_record as record
from megamoe.testing.configs import tiny_config
from megamoe.testing.parity import ParityRun
from megamoe.testing.saving import save_now
from megamoe.testing.ranks import RankError, run_ranks
from megamoe.training import engine as engine_module
from megamoe.training import job, optimizer_states, pipeline_engine, random_state
from megamoe.training.checkpoint import folder as folders
from megamoe.training.checkpoint import load as checkpoint_load
from megamoe.training.checkpoint.reader import Reader
from megamoe.training.engine import Engine
from megamoe.training.fragments import restore
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.state import TrainState
from megamoe.training.workarounds import attributes

LIMIT = 60.0
"""Seconds for everything that ranks do here, or they hang."""
STEPS = 2
HOT = "model.init_std=0.1"
"""Experts that make a good part of the gradient's norm."""
STRONG = "moe.router.balance_loss=5.0"
ZERO = tuple(f"parallel.zero_stage={stage}" for stage in range(4))
BF16 = "training.precision=bf16"
EP2, TP2, CP2, PP2, ETP2 = (f"parallel.{axis}=2" for axis in ("ep", "tp", "cp", "pp", "etp"))

# --- Taking safeguards out, on a rank


@contextlib.contextmanager
def without_tag(tag: str) -> Iterator[None]:
    """Experts that do not have one of the marker's tags."""
    original = ExpertParallelMarker.mark

    def mark(self: ExpertParallelMarker, experts: nn.Module, *sizes: int) -> None:
        original(self, experts, *sizes)
        for parameter in experts.parameters():
            vars(parameter).pop(tag, None)

    with attributes(ExpertParallelMarker, {"mark": mark}):
        yield


@contextlib.contextmanager
def clipped_by_deepspeed() -> Iterator[None]:
    """DeepSpeed's clipping at ZeRO-0 instead of ours."""
    its = settings(lambda config: {"gradient_clipping": config.training.gradient_clipping})

    def unclipped(self: Engine) -> None:
        self._clipped_norm = torch.zeros(())

    with its, attributes(Engine, {"_clip": unclipped}):
        yield


def as_if_tp_ranks_held_the_same() -> contextlib.AbstractContextManager[None]:
    """DeepSpeed's defaults: each tp rank sends a part of what a stage gives, and gathers it in the next one."""
    return settings(lambda config: {"pipeline": {"use_reentrant": False}})


@contextlib.contextmanager
def settings(others: Callable[[RunConfig], dict[str, Any]]) -> Iterator[None]:
    """Other values in what DeepSpeed is configured with."""
    original = engine_module.deepspeed_config

    def changed(config: RunConfig, world_size: int) -> dict[str, Any]:
        return original(config, world_size) | others(config)

    with attributes(engine_module, {"deepspeed_config": changed}):
        yield


@contextlib.contextmanager
def experts_averaged_over_ep() -> Iterator[None]:
    """Expert gradients reduced over the ranks that hold different experts."""
    from deepspeed.utils import groups as registry

    original = engine_module.register_expert_groups

    def register(groups: Groups) -> None:
        original(groups)
        registry._EXPERT_DATA_PARALLEL_GROUP[group_name(groups.ep.size)] = groups.ep.handle
        registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[group_name(groups.ep.size)] = list(groups.ep.ranks)

    with attributes(engine_module, {"register_expert_groups": register}):
        yield


@contextlib.contextmanager
def parts_of_experts_not_counted() -> Iterator[None]:
    """Norms of experts added up over ep alone, although etp ranks hold other parts of them."""
    from deepspeed.utils import groups as registry

    original = engine_module.register_expert_groups

    def register(groups: Groups) -> None:
        original(groups)
        registry._EXPERT_PARALLEL_GROUP[group_name(groups.ep.size)] = groups.ep.handle

    with attributes(engine_module, {"register_expert_groups": register}):
        yield


@contextlib.contextmanager
def layers_of_no_known_class() -> Iterator[None]:
    """MoE layers that DeepSpeed does not recognise."""
    bases = ExpertParallelMarker.__bases__
    ExpertParallelMarker.__bases__ = (nn.Module,)
    try:
        yield
    finally:
        ExpertParallelMarker.__bases__ = bases


@contextlib.contextmanager
def layers_not_looked_for() -> Iterator[None]:
    """No check that DeepSpeed recognised the MoE layers."""
    unchecked = {"_check_moe_seen": lambda self, model: None}
    with attributes(Engine, unchecked), attributes(pipeline_engine.PipelineEngine, unchecked):
        yield


@contextlib.contextmanager
def losses_of_earlier_stages_not_averaged() -> Iterator[None]:
    """The balance loss of a stage without a head counted once per micro-batch, not as a mean over them."""
    original = DecoderStage.forward

    def forward(self: DecoderStage, hidden: Tensor | None, batch: Any, share: float = 1.0, each: bool = False) -> Any:
        return original(self, hidden, batch, 1.0, each)

    with attributes(DecoderStage, {"forward": forward}):
        yield


@contextlib.contextmanager
def weights_untouched_by_no_rows() -> Iterator[None]:
    """Experts that compute nothing, and so give no gradient, where there is nothing to compute."""
    original = Experts.forward

    def forward(self: Experts, rows_RD: Tensor, weights_R: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        return original(self, rows_RD, weights_R, rows_per_expert_L) if len(rows_RD) else rows_RD

    with attributes(Experts, {"forward": forward}):
        yield


REMOVALS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "nothing": contextlib.nullcontext,
    "expert tag": lambda: without_tag("allreduce"),
    "expert family": lambda: without_tag("ds_zero_placement_family"),
    "counted on every tp rank": lambda: without_tag("model_parallel"),
    "clipping of ours": clipped_by_deepspeed,
    "all parts of experts": parts_of_experts_not_counted,
    "tied copy": lambda: attributes(pipeline_engine, {"_is_copy": lambda stage, parameter: False}),
    "sum over tp": lambda: attributes(job, {"sum_replicated_gradients": lambda parameters, axis: None}),
    "expert data groups": experts_averaged_over_ep,
    "whole hidden states": as_if_tp_ranks_held_the_same,
    "linked states": lambda: attributes(optimizer_states, {"_link_all_groups": lambda engine: None}),
    "random streams": lambda: attributes(random_state, {"set_states": lambda states: None}),
    "kinds": lambda: attributes(pipeline_engine, {"_check_kinds": lambda stage, config, groups: None}),
    "touched weights": weights_untouched_by_no_rows,
    "known class": layers_of_no_known_class,
    "check of layers": layers_not_looked_for,
    "mean over micro-batches": losses_of_earlier_stages_not_averaged,
    "share of a cp rank": lambda: attributes(decoder, {"with_gradient_share": lambda loss, share: loss}),
}
"""Safeguards by what they see to, each with the way to take it out."""

Pair = tuple[ParityRun, ParityRun]
"""With the safeguard and without it."""


def train(overrides: tuple[str, ...], removed: str = "nothing", steps: int = STEPS) -> ParityRun:
    with REMOVALS[removed]():
        return parity.train_steps(tiny_config(HOT, *overrides), steps)


def train_both(overrides: tuple[str, ...], removed: str) -> Pair:
    return train(overrides), train(overrides, removed)


@functools.cache
def both(ranks: int, removed: str, *overrides: str) -> list[Pair]:
    return run_ranks(train_both, ranks, overrides, removed, timeout=LIMIT)


@functools.cache
def reference(*overrides: str) -> ParityRun:
    return run_ranks(train, 1, (ZERO[0], *overrides), timeout=LIMIT)[0]


def error_of(run: ParityRun, kind: str, *overrides: str) -> float:
    return parity.errors_of(run, reference(*overrides))[kind].value


class Stuck(RuntimeError):
    """Something waits for what will never come."""


def must_end(engine: Engine, usual: float) -> None:
    """A step in another thread; give up after a time that is long beside the seconds that one usually takes."""
    thread = threading.Thread(target=one_step, args=[engine], daemon=True)
    thread.start()
    thread.join(2.0 + 10 * usual)
    if thread.is_alive() and thread.ident is not None:
        # Raised and not returned: at the end of a rank function that returns, ranks meet once more.
        raise Stuck("stands at\n" + "".join(traceback.format_stack(sys._current_frames()[thread.ident])))


# --- 1: experts of different ranks


def experts_become_one(overrides: tuple[str, ...], removed: str) -> bool:
    first, second = train(overrides, removed, steps=1).weights["blocks.0.ffn.experts.w1"].chunk(2)
    return torch.equal(first, second)


def experts_by_stage(precision: str) -> dict[tuple[int, str], bool]:
    """Whether the experts of both ranks are the same after a step, by ZeRO stage and what was taken out."""
    found = {}
    for stage in (0, 1, 2, 3) if precision == "fp32" else (1, 2, 3):
        for removed in ("nothing", "expert tag" if stage < 3 else "expert family"):
            overrides = (EP2, ZERO[stage], f"training.precision={precision}")
            found[stage, removed] = experts_become_one(overrides, removed)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_1_experts_of_different_ranks_stay_different(precision: str) -> None:
    """By the tags of their parameters, in every ZeRO stage; gradients of bf16 are accumulated in fp32."""
    for found in run_ranks(experts_by_stage, 2, precision, timeout=LIMIT):
        assert found == {(stage, removed): removed != "nothing" for stage, removed in found}
        assert len(found) == (8 if precision == "fp32" else 6)


# --- 2: the norm of the gradient


def test_2_clipping_knows_all_experts_at_zero_0() -> None:
    """DeepSpeed would clip by the mean of norms that each know the experts of one rank."""
    for kept, removed in both(2, "clipping of ours", EP2, ZERO[0]):
        parity.compare(kept, reference())
        assert min(kept.norms) > 1.5 * tiny_config().training.gradient_clipping, "clipping is active"
        assert error_of(removed, "exp_avg") > 1e-2


@pytest.mark.parametrize(
    "removed, overrides",
    [
        pytest.param("counted on every tp rank", (EP2, TP2, ZERO[1]), id="tp2-ep2"),
        pytest.param("tied copy", (PP2, ZERO[1]), id="pp2"),
    ],
)
def test_2_everything_is_counted_once(removed: str, overrides: tuple[str, ...]) -> None:
    for kept, other in both(2, removed, *overrides):
        parity.compare(kept, reference())
        assert error_of(other, "norm") > 1e-2
        assert error_of(other, "exp_avg") > 1e-2, "so clipping gives other gradients"


def test_2_parts_of_experts_are_counted_together() -> None:
    for kept, removed in both(2, "all parts of experts", ETP2, ZERO[1], BF16):
        assert error_of(kept, "norm") < 1e-2, "bf16"
        assert removed.norms[0] < 0.98 * kept.norms[0]


# --- 3: the same weights on every layout


@pytest.mark.parametrize(
    "ranks, removed, overrides, kind, least",
    [
        pytest.param(2, "sum over tp", (TP2, ZERO[1]), "gradient", 0.5, id="tp2"),
        pytest.param(4, "expert data groups", (EP2, ZERO[1]), "weight", 0.5, id="ep2-edp2"),
        pytest.param(4, "whole hidden states", (PP2, TP2, ZERO[1]), "weight", 0.05, id="pp2-tp2"),
    ],
)
def test_3_every_layout_trains_the_same_weights(
    ranks: int, removed: str, overrides: tuple[str, ...], kind: str, least: float
) -> None:
    for kept, other in both(ranks, removed, *overrides):
        parity.compare(kept, reference())
        assert error_of(other, kind) > least


# --- 4: checkpoints


def engine_of(config: RunConfig) -> Engine:
    groups = build_groups(topology_of(config.parallel, collectives.world_size()))
    runtime = Runtime(groups.rank, groups.topology.world_size, parity.CPU, groups)
    fill = functools.partial(initialise, config=config.model, seed=config.training.seed)
    return job.build_engine(config, runtime, derive.vocab_size(config), fill)


def one_step(engine: Engine) -> None:
    groups, steps = engine.groups, derive.accumulation_steps(engine.config, collectives.world_size())
    numbers = [step * groups.dp.size + groups.dp.place for step in range(steps)]
    engine.train([parity.random_tokens(engine.config, 0, number) for number in numbers], 1.0, lambda output: None)


def saved_and_loaded(saved: tuple[str, ...], loaded: tuple[str, ...], folder: Path, by_deepspeed: bool) -> float | str:
    """How much weights are changed by saving in one layout and loading in another, or the error on this rank."""
    engine = engine_of(tiny_config(*saved))
    one_step(engine)
    before = record.weights(engine)
    if by_deepspeed:
        engine._engine.save_checkpoint(str(folder), tag="step", save_latest=False)
    else:
        save_now(engine, folder, TrainState(1))
    engine.close()
    engine = engine_of(tiny_config(*loaded, "training.seed=7"))
    try:
        if by_deepspeed:
            engine._engine.load_checkpoint(str(folder), tag="step", load_lr_scheduler_states=False)
        else:
            (checkpoint,) = folders.complete(folder)
            restore(engine, Reader(checkpoint), updates=1)
    except Exception as error:  # what DeepSpeed raises, whatever it is
        return f"{type(error).__name__}: {error}"
    return parity.worst_tensor(record.weights(engine), before).value


@pytest.mark.parametrize(
    "saved, loaded",
    [pytest.param((EP2, ZERO[1]), (ZERO[1],), id="another_ep"), pytest.param((TP2, ZERO[1]), (TP2, ZERO[1]), id="tp")],
)
def test_4_deepspeeds_own_checkpoints_do_not_hold_it(
    saved: tuple[str, ...], loaded: tuple[str, ...], tmp_path: Path
) -> None:
    """With another EP it reads the experts of another rank without a word; with tp it leaves out a rank's weights.
    test_reshard.py and test_resume.py compare everything of ours."""
    for changed in run_ranks(saved_and_loaded, 2, saved, loaded, tmp_path / "ours", False, timeout=LIMIT):
        assert changed == 0.0
    for changed in run_ranks(saved_and_loaded, 2, saved, loaded, tmp_path / "its", True, timeout=LIMIT):
        assert isinstance(changed, str) or changed > 0.5


def test_4_moments_of_every_group_are_found() -> None:
    """What they are is compared in every test of parity."""
    with pytest.raises(RankError, match="exp_avg not found"):
        run_ranks(train, 2, (EP2, ZERO[1]), "linked states", timeout=LIMIT)


def same_draws_after_loading(folder: Path) -> tuple[bool, bool]:
    """Whether torch's generator goes on after a checkpoint was loaded as it did after it was saved: with the safeguard,
    and without it."""
    engine = engine_of(tiny_config(EP2, ZERO[0]))
    one_step(engine)
    path = save_now(engine, folder / "run", TrainState(1))
    expected, found = torch.rand(4), []
    for removed in ("nothing", "random streams"):
        random_state.seed_all(7, collectives.rank())
        with REMOVALS[removed]():
            checkpoint_load.load_checkpoint(engine, path, folders.read_manifest(path))
        found.append(torch.equal(torch.rand(4), expected))
    return found[0], found[1]


def test_4_random_streams_go_on(tmp_path: Path) -> None:
    assert run_ranks(same_draws_after_loading, 2, tmp_path, timeout=LIMIT) == [(True, False)] * 2


# --- 5 and 6: what would wait for ever


def usual_seconds(engine: Engine) -> float:
    """Of one step, after the first."""
    one_step(engine)
    start = time.monotonic()
    one_step(engine)
    return time.monotonic() - start


def steps_of_other_kinds() -> None:
    """Steps of stages that train the same kinds of parameters, then one of stages that do not."""
    usual = usual_seconds(engine_of(tiny_config(PP2, ZERO[1])))
    with REMOVALS["kinds"]():
        engine = engine_of(tiny_config(PP2, ZERO[1], 'training.trainable=["norm.*", "*.ffn.router.*"]'))
    must_end(engine, usual)


def test_5_stages_of_other_kinds_would_wait_for_each_other() -> None:
    """That they are refused: test_pipeline.py::test_stages_that_train_other_kinds_are_refused. Stages without an MoE
    block, the usual case, by the configuration: test_parallel_rules.py (`stages_have_blocks`)."""
    with pytest.raises(RankError, match=r"Stuck: stands at[\s\S]*(_exec_optimizer_step|_aggregate_total_loss)"):
        run_ranks(steps_of_other_kinds, 2, timeout=LIMIT)


def onto_two_experts(model: Decoder) -> None:
    """Send every token to the first two experts, so that ranks with others have no rows."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.bias_E[2:] -= 100.0


def steps_without_rows() -> None:
    """Steps at ZeRO-3 in which one rank of two has nothing to compute: with the safeguard, then one without it."""
    engine = engine_of(tiny_config(EP2, ZERO[3]))
    onto_two_experts(engine.model)
    usual = usual_seconds(engine)
    with REMOVALS["touched weights"]():
        must_end(engine, usual)


def test_6_a_rank_without_rows_would_stop_the_others() -> None:
    """ZeRO-3 reduces a gradient when it arrives, on all ranks together. What such ranks train: test_degenerate.py."""
    with pytest.raises(RankError, match=r"Stuck: stands at[\s\S]*_micro_step"):
        run_ranks(steps_without_rows, 2, timeout=LIMIT)


# --- 7: layers that the engine does not see


def experts_unseen(overrides: tuple[str, ...]) -> bool:
    with REMOVALS["check of layers"]():
        return experts_become_one(overrides, "known class")


@pytest.mark.parametrize("overrides", [(EP2, ZERO[1], BF16), (EP2, ZERO[3])], ids=["zero1-bf16", "zero3"])
def test_7_layers_that_are_not_seen_would_lose_their_experts(overrides: tuple[str, ...]) -> None:
    """That they are refused: test_engine.py::test_experts_that_the_engine_does_not_see_are_refused."""
    assert run_ranks(experts_unseen, 2, overrides, timeout=LIMIT) == [True, True]


def steps_of_an_unseen_stage() -> None:
    """Steps of a pipeline, then one in which the engine of the last stage does not see its MoE layers."""
    config = tiny_config(PP2, ZERO[1], BF16)
    usual = usual_seconds(engine_of(config))
    with REMOVALS["check of layers"](), REMOVALS["known class" if collectives.rank() == 1 else "nothing"]():
        engine = engine_of(config)
        must_end(engine, usual)


def test_7_a_stage_that_is_not_seen_would_make_the_others_wait() -> None:
    """That it is refused: test_pipeline.py::test_a_stage_whose_experts_the_engine_does_not_see_is_refused."""
    with pytest.raises(RankError, match=r"Stuck: stands at[\s\S]*train_batch"):
        run_ranks(steps_of_an_unseen_stage, 2, timeout=LIMIT)


# --- 8: the balance loss


@pytest.mark.parametrize(
    "removed, overrides",
    [
        pytest.param("mean over micro-batches", (PP2, ZERO[1]), id="pp2"),
        pytest.param("share of a cp rank", (CP2, EP2, ZERO[1]), id="cp2-ep2"),
        pytest.param("sum over tp", (TP2, ZERO[1]), id="tp2"),
    ],
)
def test_8_the_balance_loss_counts_once(removed: str, overrides: tuple[str, ...]) -> None:
    """More layouts, and to rounding: test_balance_invariance.py."""
    for kept, other in both(2, removed, STRONG, *overrides):
        parity.compare(kept, reference(STRONG))
        assert error_of(other, "auxiliary", STRONG) < 1e-2, "the value alone does not tell"
        assert parity.worst_tensor(routers(other), routers(reference(STRONG))).value > 0.2


def routers(run: ParityRun) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in run.gradients.items() if ".router." in name}
