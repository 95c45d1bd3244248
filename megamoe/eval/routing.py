"""How uncertain a model's routing is: the entropy of every router's distribution over its experts.

Also what all measures of routing share; the others are :mod:`megamoe.eval.agreement` (are the chosen experts the best
ones) and :mod:`megamoe.eval.sensitivity` (what do random ones cost). They take the batches of this rank, are
collective, and need equally many batches on every rank, because the experts' exchange needs all of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from rich import get_console
from rich.progress import track
from torch import Tensor, nn

from megamoe.common.errors import ConfigError
from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.data.loader import BatchLoader
from megamoe.model.decoder import Decoder
from megamoe.moe.broadcast import ENTROPY_BINS, normalised_entropy
from megamoe.moe.layer import MoELayer
from megamoe.moe.routers import Router, Rows
from megamoe.moe.routers.fixed import FixedRouter
from megamoe.moe.types import RoutingPlan
from megamoe.parallel import collectives
from megamoe.training.setup import Runtime

QUANTILE = 0.95
RELEASED = (0.769, 0.866)
"""Thresholds of GW-MoE's released settings, 1.6 and 1.8 nats of 8 experts' ln 8 (arXiv 2406.12375)."""

Thresholds = Mapping[int, float]
"""Normalised entropy from which on a token is uncertain, by block."""


class Routed(NamedTuple):
    """One router's part in a forward pass."""

    block: int
    """Place among the model's blocks."""
    router: Router
    rows_TD: Tensor
    real_T: Tensor
    """bool: not padding."""
    plan: RoutingPlan

    @property
    def probs_TE(self) -> Tensor:
        """The router's distribution over all experts, without a gradient."""
        return self.router.probabilities(self.plan.logits_TE.detach())

    @property
    def entropy_T(self) -> Tensor:
        """Normalised entropy of that distribution, in [0, 1]."""
        return normalised_entropy(self.probs_TE)

    @property
    def chosen_TE(self) -> Tensor:
        """bool: the token goes to the expert."""
        chosen_TE = torch.zeros_like(self.plan.logits_TE, dtype=torch.bool)
        chosen_TE[self.plan.token_ids_A, self.plan.expert_ids_A] = True
        return chosen_TE


Act = Callable[[Routed], RoutingPlan | None]
"""Looks at what was routed; what it returns, if anything, becomes the plan."""


@contextlib.contextmanager
def on_routers(model: Decoder, act: Act) -> Iterator[None]:
    """Call `act` after every router, in each forward pass meanwhile."""
    hooks = [
        layer.router.register_forward_hook(_hook(block, layer.router, act))
        for block, layer in routed_layers(model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(block: int, router: Router, act: Act) -> Callable[..., RoutingPlan | None]:
    def hook(_: nn.Module, args: tuple[Any, ...], plan: RoutingPlan) -> RoutingPlan | None:
        rows_TD, about = args[0], args[1] if len(args) > 1 else Rows()
        real_T = torch.ones(len(rows_TD), dtype=torch.bool, device=rows_TD.device)
        if about.sequences_T is not None:
            real_T = about.sequences_T >= 0
        return act(Routed(block, router, rows_TD, real_T, plan.trimmed()))

    return hook


def routed_layers(model: Decoder) -> dict[int, MoELayer]:
    """The layers with experts, by the number of their block.

    Raises:
        ConfigError: there are none, or their routers have no scores.
        ValueError: the model is in training mode, where experts drop tokens and tokens are broadcast.
    """
    if model.training:
        raise ValueError("routing is measured in evaluation mode")
    layers = {index: block.ffn for index, block in enumerate(model.blocks) if isinstance(block.ffn, MoELayer)}
    without = next((layer.router for layer in layers.values() if isinstance(layer.router, FixedRouter)), None)
    if not layers or without is not None:
        raise ConfigError(
            "there is no routing to measure",
            got=f"{type(without).__name__}, which chooses experts without scores" if layers else "no block has experts",
            expected="a model with experts whose router gives a distribution over them (topk, resonance, ...)",
            todo="evaluate it without --routing",
        )
    return layers


def in_turn(batches: Sequence[Batch], what: str, runtime: Runtime) -> Iterator[Batch]:
    """The batches on this rank's device, with a progress bar on rank 0 of a terminal.

    Raises:
        ValueError: not equally many on all ranks.
    """
    if len(set(collectives.gather_objects(len(batches)))) > 1:
        raise ValueError("ranks have different numbers of batches, so the last ones would wait for experts in vain")
    # Where there is no terminal, the bar would leave an empty line behind.
    hidden = runtime.rank != 0 or not get_console().is_terminal
    for batch in track(batches, description=what, transient=True, disable=hidden):
        yield batch.to(runtime.device)


# --- entropy


@dataclass(frozen=True)
class BlockEntropy:
    """One block's router."""

    block: int
    tokens: int
    mean: float
    """Mean normalised entropy."""
    quantile: float
    """The entropy that the quantile asked for lies at: as many tokens as that leaves have at least this much."""
    threshold: float
    """From where on a token counts as uncertain."""
    threshold_from: Literal["broadcast", "quantile"]
    """The threshold that the router broadcasts by where it has one, else the quantile."""
    uncertain_share: float
    """Of the tokens, those at the threshold or above."""
    share_at: dict[str, float]
    """Share of the tokens at or above each of the :data:`RELEASED` thresholds, by the threshold."""
    histogram: tuple[int, ...]
    """Tokens in each of 32 even bins over [0, 1]."""


@dataclass(frozen=True)
class EntropyReport:
    """All blocks with experts."""

    quantile: float
    """Which one was asked for."""
    blocks: tuple[BlockEntropy, ...]

    @property
    def thresholds(self) -> dict[int, float]:
        """From where on a token is uncertain, by block: what the other measures take."""
        return {block.block: block.threshold for block in self.blocks}

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_entropy(
    model: Decoder, batches: Sequence[Batch], runtime: Runtime, quantile: float = QUANTILE
) -> EntropyReport:
    """Entropy of every router over all tokens of all ranks, padding left out. Collective.

    Args:
        quantile: in (0, 1); uncertain are the tokens of the highest 1 - `quantile` of each block, where the block has
            no threshold of its own.
    """
    routers = {block: layer.router for block, layer in routed_layers(model).items()}
    seen: dict[int, list[Tensor]] = {block: [torch.zeros(0)] for block in routers}

    def keep(routed: Routed) -> None:
        seen[routed.block].append(routed.entropy_T[routed.real_T].float().cpu())

    with on_routers(model, keep):
        for batch in in_turn(batches, "entropy", runtime):
            model(*batch, each=True)
    ranks = collectives.gather_objects({block: torch.cat(parts) for block, parts in seen.items()})
    return EntropyReport(
        quantile,
        tuple(
            describe(block, torch.cat([of[block] for of in ranks]), quantile, own_threshold(router))
            for block, router in routers.items()
        ),
    )


def describe(block: int, entropy_N: Tensor, quantile: float, own: float | None = None) -> BlockEntropy:
    """The numbers of one block.

    Args:
        entropy_N: normalised entropies, fp32 [N].
        own: the block's threshold; None: the quantile.
    """
    count = len(entropy_N)
    if count == 0 or not 0.0 < quantile < 1.0:
        raise ValueError(f"no quantile {quantile} of {count} tokens")
    # The order statistic with ceil((1 - quantile) * N) values from it on; no interpolation, so it is a token's own.
    place = min(count, math.floor(quantile * count) + 1)
    at_quantile = float(entropy_N.kthvalue(place).values)
    threshold = at_quantile if own is None else own
    return BlockEntropy(
        block,
        count,
        float(entropy_N.double().mean()),
        at_quantile,
        threshold,
        "quantile" if own is None else "broadcast",
        _share(entropy_N, threshold),
        {str(released): _share(entropy_N, released) for released in RELEASED},
        tuple(int(n) for n in torch.histc(entropy_N, ENTROPY_BINS, 0.0, 1.0).tolist()),
    )


def own_threshold(router: Router) -> float | None:
    """The threshold that the router broadcasts by; None where it does not broadcast or is not calibrated."""
    value = math.nan if router.broadcast is None else float(router.broadcast.threshold)
    return None if math.isnan(value) else value


def _share(entropy_N: Tensor, threshold: float) -> float:
    return int((entropy_N >= threshold).sum()) / len(entropy_N)


# --- text to measure on


def held_out(loader: BatchLoader, num_tokens: int, batch_size: int, seq_length: int, runtime: Runtime) -> list[Batch]:
    """This rank's share of the first `num_tokens` held-out tokens, whole samples; no more than there are.

    Batch j goes to rank j mod P, so the batches are the same on any number of ranks. Ranks that are left without one in
    the last round get one of padding.

    Args:
        loader: of the validation split.
        batch_size: samples.
        seq_length: tokens of a sample.
    """
    samples = min(math.ceil(num_tokens / seq_length), sum(loader.num_samples.values()))
    rounds = math.ceil(samples / (batch_size * runtime.world_size))
    firsts = [batch_size * (i * runtime.world_size + runtime.rank) for i in range(rounds)]
    return [_samples(loader, first, min(batch_size, samples - first)) for first in firsts]


def _samples(loader: BatchLoader, first: int, count: int) -> Batch:
    if count <= 0:
        return Batch(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORED), torch.full((1, 1), PADDING))
    tokens = loader.batch(first, count)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
