"""What uncertain routing costs: the loss with random experts for the uncertain tokens (GW-MoE, arXiv 2406.12375).

For comparison, also for random tokens and for the most certain ones. A token is uncertain in a block if the normalised
entropy of the router's distribution is at the block's threshold or above (:mod:`megamoe.eval.routing`, which also says
what a measure needs of its batches).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamoe.common.determinism import stream_seed
from megamoe.common.errors import ConfigError
from megamoe.data.batch import Batch
from megamoe.eval.routing import Routed, Thresholds, in_turn, measure_entropy, on_routers, routed_layers
from megamoe.model.decoder import Decoder
from megamoe.moe.routers.base import count
from megamoe.moe.types import RoutingPlan
from megamoe.parallel import collectives
from megamoe.training.setup import Runtime

Choose = Callable[[Routed], Tensor]
"""Which tokens of a router get random experts, bool [T]."""


class Arm(NamedTuple):
    """Which tokens get random experts."""

    name: str
    text: str


ARMS = (
    Arm("uncertain", "uncertain tokens"),
    Arm("random", "as many random tokens"),
    Arm("certain", "as many most certain ones"),
)


@dataclass(frozen=True)
class ArmLoss:
    """Losses with random experts for the tokens of one arm."""

    losses: tuple[float, ...]
    """Of each draw: nats per label."""
    mean: float
    deviation: float | None
    """Standard deviation over the draws, of what is drawn alone and not of the text; None: there is one draw."""
    change: float
    """Mean minus the loss of the unchanged model."""


@dataclass(frozen=True)
class SensitivityReport:
    """The model as it is, and with random experts."""

    labels: int
    """That count."""
    loss: float
    """Of the unchanged model, nats per label."""
    replaced_share: float
    """Of the pairs of a token and a block, those that get random experts; the same in all arms."""
    arms: dict[str, ArmLoss]

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_sensitivity(
    model: Decoder,
    batches: Sequence[Batch],
    thresholds: Thresholds | None,
    runtime: Runtime,
    draws: int = 5,
    seed: int = 0,
) -> SensitivityReport:
    """The loss with random experts for the uncertain tokens (the paper's test), for as many random tokens, and for as
    many of the most certain ones. Collective; any number of ranks.

    Ours: which tokens these are is decided on the unchanged model, in every block by itself. So all arms replace
    equally many tokens in each block and batch, also where what was replaced in earlier blocks changed the entropies.

    Args:
        thresholds: None: as :func:`megamoe.eval.routing.measure_entropy` finds them in the same batches. To compare two
            models, pass those of one.
        draws: of random experts, and of random tokens; 1 at least.
        seed: batch i of rank r draws as number i * P + r, so the draws do not depend on how the batches are dealt out.

    Raises:
        ConfigError: every token goes to all experts already.
    """
    _refuse_dense(model)
    thresholds = thresholds or measure_entropy(model, batches, runtime).thresholds
    total = torch.zeros(4 + len(ARMS) * draws, dtype=torch.float64, device=runtime.device)
    for index, batch in enumerate(in_turn(batches, "random experts", runtime)):
        number = index * runtime.world_size + runtime.rank
        total += torch.stack(_score(model, batch, thresholds, draws, (seed, number))).double()
    pairs, replaced, labels, clean, *nats = collectives.all_reduce_sum(total).tolist()
    losses = [value / max(1.0, labels) for value in nats]
    by_arm = {arm.name: tuple(losses[i * draws : (i + 1) * draws]) for i, arm in enumerate(ARMS)}
    loss = clean / max(1.0, labels)
    arms = {name: _arm_loss(found, loss) for name, found in by_arm.items()}
    return SensitivityReport(int(labels), loss, replaced / max(1.0, pairs), arms)


def _score(model: Decoder, batch: Batch, thresholds: Thresholds, draws: int, key: tuple[int, int]) -> list[Tensor]:
    """Of one batch: pairs of token and block, those replaced, labels, then the summed losses: unchanged, each draw."""
    seen: dict[int, Routed] = {}
    with on_routers(model, lambda routed: seen.update({routed.block: routed})):
        scores = model(*batch, each=True).scores
    uncertain = {block: uncertain_tokens(thresholds)(routed) for block, routed in seen.items()}
    pairs = torch.stack([routed.real_T.sum() for routed in seen.values()]).sum()
    replaced = torch.stack([which_T.sum() for which_T in uncertain.values()]).sum()
    nats = [scores.losses_BS.double().sum()]
    for arm in ARMS:
        for draw in range(draws):
            stream = stream_seed(key[0], arm.name, draw, key[1])
            chosen = {b: arm_tokens(arm, seen[b], which_T, stream) for b, which_T in uncertain.items()}
            with randomised_experts(model, given_tokens(chosen), stream):
                nats.append(model(*batch, each=True).scores.losses_BS.double().sum())
    return [pairs.double(), replaced.double(), scores.counted_BS.double().sum(), *nats]


def given_tokens(which: Mapping[int, Tensor]) -> Choose:
    """Tokens that are known beforehand: by block, bool [T]."""
    return lambda routed: which[routed.block]


def uncertain_tokens(thresholds: Thresholds) -> Choose:
    """The tokens that are uncertain in the pass itself: the test as the paper runs it, and what generation needs."""
    return lambda routed: routed.real_T & (routed.entropy_T >= thresholds[routed.block])


@contextlib.contextmanager
def randomised_experts(model: Decoder, choose: Choose, seed: int) -> Iterator[None]:
    """Meanwhile, tokens that `choose` names have other experts than their router chose: :func:`with_random_experts`.

    Each block draws from a stream of its own, pass after pass. What the layers report (losses, metrics) is still of
    the router's choice.
    """
    generators = {block: _generator(seed, "experts", block) for block in routed_layers(model)}
    with on_routers(model, lambda routed: with_random_experts(routed, choose(routed), generators[routed.block])):
        yield


def with_random_experts(routed: Routed, which_T: Tensor, generator: torch.Generator) -> RoutingPlan:
    """The plan with K random experts for the tokens in `which_T`, all different and none of the chosen ones.

    (With fewer than K others the rest is chosen ones.) Their weights are the router's own probabilities of them, scaled
    to the sum of the weights that the token had. Other tokens keep theirs bit for bit.

    Args:
        which_T: bool [T].
        generator: on the CPU, so that every device draws the same.
    """
    router, plan = routed.router, routed.plan
    tokens_U, kept_A = which_T.nonzero().squeeze(-1), (~which_T)[plan.token_ids_A].nonzero().squeeze(-1)
    priority_UE = torch.rand(len(tokens_U), router.num_experts, generator=generator).to(tokens_U.device)
    experts_UK = (priority_UE - routed.chosen_TE[tokens_U].float()).topk(router.top_k, dim=-1).indices
    weights_UK = _weights(routed, tokens_U, experts_UK)
    tokens_A = torch.cat([plan.token_ids_A[kept_A], tokens_U.repeat_interleave(router.top_k)])
    experts_A = torch.cat([plan.expert_ids_A[kept_A], experts_UK.flatten()])
    weights_A = torch.cat([plan.weights_A[kept_A], weights_UK.flatten()])
    order_A = torch.argsort(experts_A * len(which_T) + tokens_A)
    return plan._replace(
        token_ids_A=tokens_A[order_A],
        expert_ids_A=experts_A[order_A],
        weights_A=weights_A[order_A],
        rows_per_expert_E=count(experts_A, router.num_experts),
        choices=None,
    )


def _weights(routed: Routed, tokens_U: Tensor, experts_UK: Tensor) -> Tensor:
    """The router's probabilities of these experts, scaled to the sum of the token's weights in the plan, [U, K]."""
    plan = routed.plan
    weights_TE = torch.zeros_like(plan.logits_TE)
    weights_TE[plan.token_ids_A, plan.expert_ids_A] = plan.weights_A
    # Never 0, or there would be nothing to scale where fp32 is too small for all of a token's random experts.
    probs_UE = routed.probs_TE[tokens_U].clamp_min(torch.finfo(torch.float32).tiny)
    probs_UK = probs_UE.gather(1, experts_UK)
    return probs_UK / probs_UK.sum(-1, keepdim=True) * weights_TE[tokens_U].sum(-1, keepdim=True)


def arm_tokens(arm: Arm, routed: Routed, uncertain_T: Tensor, seed: int) -> Tensor:
    """The tokens of one block that get random experts, as many as there are uncertain ones, bool [T]."""
    if arm.name == "uncertain":
        return uncertain_T
    priority_T = -routed.entropy_T
    if arm.name == "random":
        generator = _generator(seed, "tokens", routed.block)
        priority_T = torch.rand(len(uncertain_T), generator=generator).to(uncertain_T.device)
    order_T = priority_T.masked_fill(~routed.real_T, -torch.inf).argsort(descending=True, stable=True)
    return torch.zeros_like(uncertain_T).index_fill_(0, order_T[: int(uncertain_T.sum())], True)


def _generator(seed: int, *name: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, *name))


def _arm_loss(losses: tuple[float, ...], unchanged: float) -> ArmLoss:
    mean = statistics.fmean(losses)
    deviation = statistics.stdev(losses) if len(losses) > 1 else None
    return ArmLoss(losses, mean, deviation, mean - unchanged)


def _refuse_dense(model: Decoder) -> None:
    for layer in routed_layers(model).values():
        if layer.router.top_k >= layer.router.num_experts:
            raise ConfigError(
                "there are no other experts to replace the chosen ones by",
                got=f"moe.top_k {layer.router.top_k} of {layer.router.num_experts} experts",
                expected="moe.top_k below moe.num_experts",
                todo="evaluate it without --routing",
            )
