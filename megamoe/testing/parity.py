"""Does this layout train the same model as one process? The same micro-batches through both, and every number compared.

`train_steps` runs on the ranks of a layout (through `run_ranks`, or under a launcher) and returns losses, gradient
norms, first-step gradients, final weights, Adam's moments, running statistics and every routing decision by global
name; `compare` holds two such runs against each other. A routing flip at a near tie makes two runs differ by more than
rounding: it is looked for first and reported as what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.common.determinism import stream_seed
from megamoe.config import derive
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.data.loader import BatchLoader
from megamoe.data.manifest import check_prepared
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.parallel import collectives
from megamoe.parallel.groups import build_groups
from megamoe.testing import parity_record as record
from megamoe.testing.parity_record import ParityRun
from megamoe.testing.tolerance import max_rel_error
from megamoe.training.job import build_engine
from megamoe.training.metrics import Accumulator
from megamoe.training.schedule import lr_factor
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.step import update_statistics

Batches = Callable[[RunConfig, int, int], Batch]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tolerance:
    """Bounds of `compare`; the defaults are for fp32."""

    loss: float = 1e-6
    norm: float = 1e-5
    gradient: float = 1e-5
    weight: float = 5e-5
    moment: float = 5e-5
    statistic: float = 5e-5
    near_tie: float = 1e-5
    """Margin below which rounding may turn a routing decision."""

    def bounds(self) -> dict[str, float]:
        """By the names of `errors_of`."""
        moments = {"exp_avg": self.moment, "exp_avg_sq": self.moment}
        others = {name: getattr(self, name) for name in ("loss", "norm", "gradient", "weight", "statistic")}
        return {**others, **moments, "auxiliary": self.norm}


EXACT = Tolerance(loss=1e-13, norm=1e-13, gradient=1e-13, weight=1e-13, moment=1e-13, statistic=1e-13, near_tie=1e-13)
"""For two runs with `training.precision: fp64`, over some ten steps of a small model (3e-15 where measured)."""


class Error(NamedTuple):
    """The largest difference of one kind, and where it is: a step or a tensor."""

    value: float
    where: str = ""


class Flip(NamedTuple):
    """A token that went to other experts than in the reference."""

    step: int
    """From 0."""
    micro_batch: int
    block: int
    token: int
    margin: float
    """How near the reference was to that decision."""

    def __str__(self) -> str:
        where = f"step {self.step + 1}, micro-batch {self.micro_batch}, block {self.block}, token {self.token}"
        return f"{where}: margin {self.margin:.1e}"


def random_tokens(config: RunConfig, step: int, micro_batch: int) -> Batch:
    """Tokens and labels [B, S] that depend on the seed, the step and the global micro-batch only."""
    generator = torch.Generator().manual_seed(stream_seed(config.training.seed, "parity", step, micro_batch))
    shape = (config.training.micro_batch_size, config.data.seq_length + 1)
    samples = torch.randint(0, derive.vocab_size(config), shape, generator=generator)
    return Batch(samples[:, :-1], samples[:, 1:])


def prepared_samples(config: RunConfig) -> Batches:
    """The samples of the run's own prepared data, for `train_steps`."""
    loader = BatchLoader(config.data, check_prepared(config.data), "train", config.training.seed)

    def batches(config: RunConfig, step: int, micro_batch: int) -> Batch:
        consumed = step * config.training.global_batch_size
        return loader.rank_batch(consumed, micro_batch, 0, 1, config.training.micro_batch_size, 1)

    return batches


def train_steps(
    config: RunConfig,
    steps: int,
    batches: Batches = random_tokens,
    before: Callable[[Decoder], None] = lambda model: None,
    device: torch.device = CPU,
) -> ParityRun:
    """Train with the configuration's schedule. Collective over the default group.

    Args:
        batches: (config, step, global micro-batch) to tokens and labels [B, S]; the same on every layout.
        before: called with this rank's model inside the engine before the first step (ZeRO 0 only), to disturb it.
        device: where this rank computes.
    """
    world_size = collectives.world_size()
    limit = timedelta(minutes=config.training.timeout_minutes)
    groups = build_groups(topology_of(config.parallel, world_size), limit)
    runtime = Runtime(collectives.rank(), world_size, device, groups)
    fill = partial(initialise, config=config.model, seed=config.training.seed)
    engine = build_engine(config, runtime, derive.vocab_size(config), fill)
    before(engine.model)
    run, micro_steps = ParityRun(), derive.accumulation_steps(config, world_size)
    for step in range(steps):
        accumulator = Accumulator()
        numbers = [micro_step * groups.dp.size + groups.dp.place for micro_step in range(micro_steps)]
        own = [batches(config, step, number).to(device) for number in numbers]

        def before_step(step: int = step) -> None:
            if step == 0:
                run.gradients = record.gradients(engine)

        factor = lr_factor(config.training.schedule, step + 1, config.training.steps)
        with record.recording(engine.routers(), run, step, numbers):
            run.norms.append(engine.train(own, factor, accumulator.add, before_step))
        result = accumulator.reduce(groups)
        update_statistics(engine, result)
        run.losses.append(float(result.values["cross_entropy"]))
        # Not as the difference to the whole loss, whose rounding would hide it.
        auxiliary = (v for n, v in result.values.items() if n.endswith("_loss") and not n.startswith("layers."))
        run.auxiliary.append(sum(map(float, auxiliary)))
    run.weights, run.moments = record.weights(engine), record.moments(engine)
    run.statistics = record.statistics(engine)
    record.share_decisions(run)
    engine.close()
    return run


def compare(run: ParityRun, reference: ParityRun, tolerance: Tolerance = Tolerance()) -> dict[str, float]:
    """Largest differences, each within its bound.

    Returns:
        The values of `errors_of`.

    Raises:
        AssertionError: a routing flip, by its place and margin; or a bound that does not hold, by tensor.
    """
    flips = routing_flips(run, reference)
    errors = errors_of(run, reference)
    broken = [
        f"{kind} differs by {error.value:.2e}, at most {tolerance.bounds()[kind]:.0e}: {error.where}"
        for kind, error in errors.items()
        if not error.value <= tolerance.bounds()[kind]
    ]
    if flips:
        raise AssertionError("\n".join([f"{len(flips)} routing flips, first ones:", *map(str, flips[:5]), *broken]))
    if broken:
        raise AssertionError("\n".join(broken))
    return {kind: error.value for kind, error in errors.items()}


def errors_of(run: ParityRun, reference: ParityRun, steps: int | None = None) -> dict[str, Error]:
    """The largest error of each kind.

    Args:
        steps: compare the first so many steps only, and so nothing of what is left after the last one; None: all.

    Returns:
        `loss` (absolute below 1, relative above), `auxiliary` and `norm` (relative), and relative to the largest
        magnitude of the tensor: `gradient` of the first step, and after the last step `weight`, `exp_avg`, `exp_avg_sq`
        and `statistic`. A kind of which there is nothing to compare is left out. What is not finite, is missing or has
        another shape differs infinitely.
    """
    errors = {
        "loss": _worst_step(run.losses[:steps], reference.losses[:steps], 1.0),
        "auxiliary": _worst_step(run.auxiliary[:steps], reference.auxiliary[:steps], 1e-12),
        "norm": _worst_step(run.norms[:steps], reference.norms[:steps], 1e-12),
    }
    tensors = {"gradient": (run.gradients, reference.gradients)} if steps != 0 else {}
    if steps is None:
        tensors["weight"] = run.weights, reference.weights
        tensors |= {kind: (run.moments.get(kind, {}), own) for kind, own in reference.moments.items()}
        tensors["statistic"] = run.statistics, reference.statistics
    errors |= {kind: worst_tensor(actual, expected) for kind, (actual, expected) in tensors.items() if expected}
    return errors if steps != 0 else {}


def compare_weights(run: ParityRun, reference: ParityRun) -> float:
    """The largest difference of a final weight, relative to the largest magnitude of its tensor."""
    return worst_tensor(run.weights, reference.weights).value


def routing_flips(run: ParityRun, reference: ParityRun) -> list[Flip]:
    """Tokens that went to other experts than in the reference, in order of occurrence."""
    assert run.choices.keys() == reference.choices.keys(), "the runs saw different micro-batches"
    flips = []
    for place in sorted(reference.choices):
        differs_T = (run.choices[place] != reference.choices[place]).any(-1)
        for token in differs_T.nonzero().flatten().tolist():
            flips.append(Flip(*place, token, float(reference.margins[place][token])))
    return flips


def first_flip(flips: Sequence[Flip]) -> Flip | None:
    """The flip that has to be a near tie if the runs are equal up to it; None: there is none.

    In the first step with flips, each micro-batch begins to differ in its lowest block, with the flip of the smallest
    margin: others in that block may follow from it, as tokens of one expert make room for each other. Of these
    beginnings, the one of largest margin.
    """
    beginnings: dict[int, Flip] = {}
    for flip in (f for f in flips if f.step == flips[0].step):
        first = beginnings.setdefault(flip.micro_batch, flip)
        if flip.block == first.block and flip.margin < first.margin:
            beginnings[flip.micro_batch] = flip
    return max(beginnings.values(), key=lambda flip: flip.margin, default=None)


def _worst_step(actual: Sequence[float], expected: Sequence[float], smallest_scale: float) -> Error:
    """The largest difference of numbers by step, relative where they are above the smallest scale."""
    pairs = enumerate(zip(actual, expected, strict=True), start=1)
    errors = (Error(_finite(abs(a - b) / max(smallest_scale, abs(b))), f"step {step}") for step, (a, b) in pairs)
    return max(errors, key=lambda error: error.value, default=Error(0.0))


def worst_tensor(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Error:
    """The tensor that differs most, relative to its own largest magnitude; infinitely if it is on one side only."""
    lonely = sorted(actual.keys() ^ expected.keys())
    if lonely:
        return Error(math.inf, f"{lonely[0]} is {'missing' if lonely[0] in expected else 'not in the reference'}")
    errors = (_tensor_error(name, actual[name], expected[name]) for name in expected)
    return max(errors, key=lambda error: error.value, default=Error(0.0))


def _tensor_error(name: str, actual: Tensor, expected: Tensor) -> Error:
    if actual.shape != expected.shape:
        return Error(math.inf, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if not expected.isfinite().all():
        return Error(math.inf, f"{name} is not finite in the reference")
    return Error(_finite(max_rel_error(actual, expected)), name)


def _finite(value: float) -> float:
    """NaN as infinity, so that it is the largest of all."""
    return math.inf if math.isnan(value) else value
