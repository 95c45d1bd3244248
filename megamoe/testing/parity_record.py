"""What a training run leaves behind for a comparison, by global names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megamoe.moe.bounds import Limits
from megamoe.moe.decisions import recomputing
from megamoe.moe.routers.base import Choice, Router, Rows
from megamoe.moe.types import RoutingPlan
from megamoe.parallel import collectives
from megamoe.parallel.shards import shards_of, whole
from megamoe.training.engine import Engine
from megamoe.training.optimizer_states import MOMENTS, full_moments

Place = tuple[int, int, int]
"""(step, global micro-batch, block): where a routing decision was made."""


@dataclass
class ParityRun:
    """One layout's run, by global names; equal on all ranks if the layout is right. Tensors are on the CPU."""

    losses: list[float] = field(default_factory=list)
    auxiliary: list[float] = field(default_factory=list)
    """Sum of the auxiliary losses per step."""
    norms: list[float] = field(default_factory=list)
    """Before clipping."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """After the first step's backward passes, before clipping; experts stacked over all ranks."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Adam's, by moment and parameter."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """The routers' running statistics."""
    choices: dict[Place, Tensor] = field(default_factory=dict)
    """Kept experts per token as a mask [T, E]."""
    margins: dict[Place, Tensor] = field(default_factory=dict)
    """How near each token was to another decision, [T]: the distance of its K-th logit to the next one, or of its
    affinity to the cut of an expert that keeps only some, whichever is less."""


@contextmanager
def recording(routers: dict[int, Router], run: ParityRun, step: int, micro_batches: list[int]) -> Iterator[None]:
    """Note every router's decisions of an optimizer step, whose micro-batches come in that order."""
    seen = dict.fromkeys(routers, 0)
    cuts: dict[int, Tensor] = {}

    def record(block: int, router: Router, about: Rows, plan: RoutingPlan) -> None:
        if recomputing():
            return
        plan = plan.trimmed()
        top = plan.logits_TE.detach().topk(min(router.top_k + 1, router.num_experts), dim=-1).values
        margin_T = top[:, router.top_k - 1] - top[:, -1]
        place = (step, micro_batches[seen[block]], block)
        seen[block] += 1
        spread = about.spread
        if spread is not None and (local_T := spread.own(margin_T.device)[1]) is not None:
            # The plan has logits of real rows only, and speaks of places among all rows of the rank.
            real_T, margin_T = margin_T, margin_T.new_zeros(spread.batch * spread.length)
            margin_T[local_T] = real_T
        mask_TE = torch.zeros(len(margin_T), router.num_experts, dtype=torch.bool, device=margin_T.device)
        mask_TE[plan.token_ids_A, plan.expert_ids_A] = True
        if spread is not None:
            mask_TE, margin_T = about.whole(mask_TE), about.whole(margin_T)
        if block in cuts:
            margin_T = torch.minimum(margin_T, cuts.pop(block))
        run.choices[place], run.margins[place] = mask_TE.cpu(), margin_T.cpu()

    handles = [
        router.register_forward_hook(lambda m, args, plan, block=block: record(block, m, args[1], plan))
        for block, router in routers.items()
    ]
    for block, router in routers.items():
        _note_cuts(router, block, cuts)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for router in routers.values():
            del router.keep


def _note_cuts(router: Router, block: int, cuts: dict[int, Tensor]) -> None:
    """Let `router.keep` leave in `cuts` how near each token was to being kept or dropped by one of its experts."""
    original = router.keep

    def keep(choice: Choice, limits: Limits | None, threshold: float, about: Rows) -> Tensor:
        kept_A = original(choice, limits, threshold, about)
        if not recomputing():
            affinity_A = choice.affinity_TK.detach().reshape(-1)
            margin_A = cut_margins(affinity_A, choice.expert_ids_TK.reshape(-1), kept_A, router.num_experts + 1)
            cuts[block] = margin_A.view(choice.expert_ids_TK.shape).amin(-1)
        return kept_A

    router.keep = keep  # type: ignore[method-assign]


def cut_margins(affinity_A: Tensor, expert_ids_A: Tensor, kept_A: Tensor, num_experts: int) -> Tensor:
    """Distance of each candidate's affinity to the nearest of its expert that met the other fate, [A]; inf: none."""
    infinite = affinity_A.new_full((num_experts,), torch.inf)
    least_kept_E = infinite.scatter_reduce(0, expert_ids_A, affinity_A.masked_fill(~kept_A, torch.inf), "amin")
    most_dropped_E = (-infinite).scatter_reduce(0, expert_ids_A, affinity_A.masked_fill(kept_A, -torch.inf), "amax")
    other_A = torch.where(kept_A, most_dropped_E[expert_ids_A], least_kept_E[expert_ids_A])
    return (affinity_A - other_A).abs()


def weights(engine: Engine) -> dict[str, Tensor]:
    """Every parameter of the model. Collective."""
    return _complete(engine, {name: _whole(engine, name, tensor) for name, tensor in engine.full_weights()})


def gradients(engine: Engine) -> dict[str, Tensor]:
    """The gradient of everything that is trained, inside `before_step`. Collective."""
    return _complete(engine, {name: _whole(engine, name, tensor) for name, tensor in engine.full_gradients()})


def moments(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Adam's moments. Collective."""
    found: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for name, moment, tensor in full_moments(engine):
        found[moment][name] = _whole(engine, name, tensor)
    return {moment: _complete(engine, tensors) for moment, tensors in found.items()}


def statistics(engine: Engine) -> dict[str, Tensor]:
    """The routers' buffers that a checkpoint keeps. Collective."""
    buffers = (
        (f"blocks.{block}.ffn.router.{name}", buffer)
        for block, router in engine.routers().items()
        for name, buffer in router.named_buffers()
        if name in router.state_dict()
    )
    return _complete(engine, {name: buffer.detach().cpu().clone() for name, buffer in buffers})


def share_decisions(run: ParityRun) -> None:
    """Give every rank the decisions of all micro-batches and blocks. Collective."""
    for choices, margins in collectives.gather_objects((run.choices, run.margins)):
        run.choices |= choices
        run.margins |= margins


def _whole(engine: Engine, name: str, part: Tensor) -> Tensor:
    """A copy, put together of the parts that the ranks hold."""
    return whole(part.detach(), shards_of(engine.parameter(name)), engine.groups).cpu().clone()


def _complete(engine: Engine, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """With those of the other pipeline stages; of what several have, this rank's, so that every copy is looked at."""
    pp = engine.groups.pp
    parts: Iterable[dict[str, Tensor]] = collectives.gather_objects(own, pp.handle) if pp.size > 1 else []
    return {name: tensor for part in (*parts, own) for name, tensor in part.items()}
