"""Does this layout train the same model as one process? The same micro-batches through both, and every number compared.

`train_steps` runs on the ranks of a layout (through `run_ranks`, or under a launcher) and returns losses, gradient
norms, first-step gradients, final weights and every routing decision by global name; `compare` holds two such runs
against each other. A routing flip at a near tie makes two runs differ by more than rounding: it is looked for first and
reported as what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

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
from megamoe.moe.routers.base import Router
from megamoe.moe.types import RoutingPlan
from megamoe.parallel import collectives
from megamoe.parallel.groups import Groups, build_groups
from megamoe.testing.tolerance import max_rel_error
from megamoe.training.job import build_engine
from megamoe.training.metrics import Accumulator
from megamoe.training.schedule import lr_factor
from megamoe.training.setup import Runtime, topology_of
from megamoe.training.step import update_statistics

Place = tuple[int, int, str]
"""(step, global micro-batch, router): where a routing decision was made."""
Batches = Callable[[RunConfig, int, int], Batch]


@dataclass
class ParityRun:
    """One layout's run, by global names; equal on all ranks."""

    losses: list[float] = field(default_factory=list)
    auxiliary: list[float] = field(default_factory=list)
    """Sum of the auxiliary losses per step."""
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """After the first step's backward passes, before clipping; experts stacked over all ranks."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[Place, Tensor] = field(default_factory=dict)
    """Kept experts per token as a mask [T, E]."""
    margins: dict[Place, Tensor] = field(default_factory=dict)
    """Distance between the K-th and the next logit, [T]."""


@dataclass(frozen=True)
class Tolerance:
    """Bounds of `compare`; the defaults are for fp32."""

    loss: float = 1e-6
    norm: float = 1e-5
    gradient: float = 1e-5
    weight: float = 5e-5


EXACT = Tolerance(loss=1e-13, norm=1e-13, gradient=1e-13, weight=1e-13)
"""For two runs with `training.precision: fp64`, over some ten steps of a small model (3e-15 where measured)."""


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
) -> ParityRun:
    """Train with the configuration's schedule. Collective over the default group.

    Args:
        batches: (config, step, global micro-batch) to tokens and labels [B, S]; the same on every layout.
        before: called with this rank's model inside the engine before the first step (ZeRO 0 only), to disturb it.
    """
    world_size = collectives.world_size()
    groups = build_groups(topology_of(config.parallel, world_size))
    runtime = Runtime(collectives.rank(), world_size, torch.device("cpu"), groups)
    fill = partial(initialise, config=config.model, seed=config.training.seed)
    engine = build_engine(config, runtime, derive.vocab_size(config), fill)
    before(engine.model)
    run, micro_steps = ParityRun(), derive.accumulation_steps(config, world_size)
    for step in range(steps):
        accumulator = Accumulator()
        for micro_step in range(micro_steps):
            micro_batch = micro_step * groups.dp.size + groups.dp.place
            with _recording(engine.model, run, step, micro_batch):
                batch = batches(config, step, micro_batch)
                accumulator.add(engine.micro_step(batch, last=micro_step == micro_steps - 1))
        if step == 0:
            run.gradients = _global(engine.full_gradients(), groups)
        factor = lr_factor(config.training.schedule, step + 1, config.training.steps)
        run.norms.append(engine.optimizer_step(factor))
        result = accumulator.reduce(groups.dp.handle)
        update_statistics(engine, result)
        run.losses.append(float(result.values["cross_entropy"]))
        run.auxiliary.append(float(result.values["loss"] - result.values["cross_entropy"]))
    run.weights = _global(engine.full_weights(), groups)
    for part in collectives.gather_objects((run.choices, run.margins)):
        run.choices |= part[0]
        run.margins |= part[1]
    engine.close()
    return run


def compare(run: ParityRun, reference: ParityRun, tolerance: Tolerance = Tolerance()) -> dict[str, float]:
    """Largest differences, each within its bound.

    Returns:
        The largest error of `loss` and `auxiliary` (absolute below 1, relative above), of `norm` (relative), and of
        `gradient` and `weight` (relative to the largest magnitude of the tensor).

    Raises:
        AssertionError: a routing flip, by its place and margin; or a bound that does not hold, by tensor.
    """
    flips = routing_flips(run, reference)
    errors = {
        "loss": _worst(run.losses, reference.losses),
        "auxiliary": _worst(run.auxiliary, reference.auxiliary),
        "norm": _worst(run.norms, reference.norms, smallest_scale=1e-12),
        "gradient": _worst_tensor(run.gradients, reference.gradients),
        "weight": compare_weights(run, reference),
    }
    bounds = {"auxiliary": tolerance.loss, **vars(tolerance)}
    broken = [
        f"{name} differs by {value:.2e}, at most {bounds[name]:.0e}"
        for name, value in errors.items()
        if not value <= bounds[name]
    ]
    if flips:
        raise AssertionError("\n".join([f"{len(flips)} routing flips, first ones:", *flips[:5], *broken]))
    if broken:
        raise AssertionError("\n".join([*broken, *_where(run, reference)]))
    return errors


def compare_weights(run: ParityRun, reference: ParityRun) -> float:
    """The largest difference of a final weight, relative to the largest magnitude of its tensor."""
    return _worst_tensor(run.weights, reference.weights)


def routing_flips(run: ParityRun, reference: ParityRun) -> list[str]:
    """Tokens that went to other experts than in the reference, in order of occurrence, each with its margin."""
    assert run.choices.keys() == reference.choices.keys(), "the runs saw different micro-batches"
    flips = []
    for place in sorted(reference.choices):
        differs_T = (run.choices[place] != reference.choices[place]).any(-1)
        for token in differs_T.nonzero().flatten().tolist():
            margin = float(reference.margins[place][token])
            step, micro_batch, router = place
            flips.append(f"step {step}, micro-batch {micro_batch}, {router}, token {token}: margin {margin:.1e}")
    return flips


@contextmanager
def _recording(model: Decoder, run: ParityRun, step: int, micro_batch: int) -> Iterator[None]:
    """Note every router's decisions of one forward pass."""

    def record(name: str, router: Router, plan: RoutingPlan) -> None:
        mask_TE = torch.zeros_like(plan.logits_TE, dtype=torch.bool)
        mask_TE[plan.token_ids_A, plan.expert_ids_A] = True
        top = plan.logits_TE.detach().topk(min(router.top_k + 1, router.num_experts), dim=-1).values
        place = (step, micro_batch, name)
        if place not in run.choices:  # recomputation passes here a second time
            run.choices[place], run.margins[place] = mask_TE, top[:, router.top_k - 1] - top[:, -1]

    routers = [(n, m) for n, m in model.named_modules() if isinstance(m, Router)]
    handles = [m.register_forward_hook(lambda m, _, plan, n=n: record(n, m, plan)) for n, m in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _global(tensors: Iterator[tuple[str, Tensor]], groups: Groups) -> dict[str, Tensor]:
    """By name, with the experts of all ranks stacked in the order of their global numbers."""
    result = {}
    for name, tensor in list(tensors):
        copy = tensor.detach().clone()
        if ".experts." in name:
            copy = torch.cat(collectives.all_gather(copy, groups.ep.handle))
        result[name] = copy
    return result


def _worst(actual: list[float], expected: list[float], smallest_scale: float = 1.0) -> float:
    return max(abs(a - b) / max(smallest_scale, abs(b)) for a, b in zip(actual, expected, strict=True))


def _worst_tensor(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(max_rel_error(actual[name], expected[name]) for name in expected)


def _where(run: ParityRun, reference: ParityRun) -> list[str]:
    """The tensors that differ most."""
    lines = []
    for kind in ("gradients", "weights"):
        actual, expected = getattr(run, kind), getattr(reference, kind)
        worst = sorted(expected, key=lambda n: -max_rel_error(actual[n], expected[n]))[:3]
        lines += [f"  {kind} of {n}: {max_rel_error(actual[n], expected[n]):.2e}" for n in worst]
    return lines
