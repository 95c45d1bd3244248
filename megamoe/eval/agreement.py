"""Whether the experts that tokens go to are the best ones for them.

Asked of uncertain and of all other tokens, so that there is something to compare with. A token is uncertain in a block
if the normalised entropy of the router's distribution is at the block's threshold or above
(:mod:`megamoe.eval.routing`, which also says what a measure needs of its batches).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megamoe.common.errors import ConfigError
from megamoe.data.batch import PADDING, Batch
from megamoe.eval.routing import Routed, Thresholds, in_turn, measure_entropy, on_routers, routed_layers
from megamoe.model.decoder import Decoder
from megamoe.moe.layer import MoELayer
from megamoe.ops.precision import at_least_fp32
from megamoe.parallel import collectives
from megamoe.training.setup import Runtime


@dataclass(frozen=True)
class Agreement:
    """Tokens of one kind in one block."""

    tokens: int
    share: float | None
    """Mean over the tokens of |chosen & best| / K; None: there are no such tokens."""


@dataclass(frozen=True)
class BlockAgreement:
    """One block, its uncertain tokens and all others."""

    block: int
    uncertain: Agreement
    certain: Agreement


@dataclass(frozen=True)
class AgreementReport:
    """All blocks with experts."""

    chance: float
    """What experts chosen at random reach: K / E."""
    blocks: tuple[BlockAgreement, ...]

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


class Gains(NamedTuple):
    """What each expert could do for each token of one block."""

    routed: Routed
    gains_TE: Tensor
    """First-order decrease of the summed loss, in nats, per unit of gate weight."""
    counts_T: Tensor
    """bool: neither padding nor a token on whose output no label depends."""


@torch.no_grad()
def measure_agreement(
    model: Decoder, batches: Sequence[Batch], runtime: Runtime, thresholds: Thresholds | None = None
) -> AgreementReport:
    """How many of the chosen experts are among the K best ones. Collective; every rank holds all experts.

    Best are the experts of largest :func:`expert_gains`. Tokens that no label depends on do not count: those of the
    last block whose own label is ignored, for instance.

    Args:
        thresholds: None: as :func:`megamoe.eval.routing.measure_entropy` finds them in the same batches.

    Raises:
        ConfigError: the experts are spread over ranks.
    """
    layers = routed_layers(model)
    _refuse_spread(layers)
    thresholds = thresholds or measure_entropy(model, batches, runtime).thresholds
    # Per block, for certain and for uncertain tokens, their number and the sum of their agreements.
    totals = {str(block): torch.zeros(2, 2, dtype=torch.float64, device=runtime.device) for block in layers}
    for batch in in_turn(batches, "agreement", runtime):
        for block, gains in expert_gains(model, batch).items():
            agreement_T, uncertain_T = agreement(gains), gains.routed.entropy_T >= thresholds[block]
            for kind, which_T in enumerate((~uncertain_T, uncertain_T)):
                among_T = agreement_T[which_T & gains.counts_T].double()
                totals[str(block)][kind] += torch.stack([torch.ones_like(among_T).sum(), among_T.sum()])
    totals = collectives.reduce_dict(totals, None)
    router = next(iter(layers.values())).router
    return AgreementReport(
        router.top_k / router.num_experts,
        tuple(BlockAgreement(b, _mean(totals[str(b)][1]), _mean(totals[str(b)][0])) for b in layers),
    )


def expert_gains(model: Decoder, batch: Batch) -> dict[int, Gains]:
    """The first-order gain of giving each token to each expert, by block.

    Ours: gain_ti = -<dL/dy_t, E_i(x_t)>, with x the rows that enter the block's experts, y what the routed experts add
    up to and L the sum of the losses of the batch. Why: a bit of expert i more changes y_t by eps * E_i(x_t) and so the
    loss by -eps * gain_ti. For a chosen expert it is minus the derivative of the loss by its gate weight, and the dense
    layer sum_i g_i E_i would have the same derivative for all others. It costs one backward pass, where trying all sets
    of K experts would cost one forward pass for each.

    What it does not see: anything beyond the first order. A chosen expert is asked for its next bit, after what it
    already adds, and one whose weight is just right gains 0; so a good router's agreement stays below 1, and may be
    below chance.
    """
    layers, seen = routed_layers(model), {}

    def keep(routed: Routed) -> None:
        plan = routed.plan._replace(logits_TE=routed.plan.logits_TE.detach())
        seen[routed.block] = routed._replace(rows_TD=routed.rows_TD.detach(), plan=plan)

    # Divided by 1: the sum.
    with torch.enable_grad(), on_routers(model, keep), _probes(layers) as probes:
        loss = model(*batch._replace(targets=1.0)).cross_entropy
    grads = torch.autograd.grad(loss, [probes[block] for block in layers])
    flat = (_routed_rows(grad, batch) for grad in grads)
    return {block: _gains(layer, seen[block], grad) for (block, layer), grad in zip(layers.items(), flat, strict=True)}


def _routed_rows(grad_BSD: Tensor, batch: Batch) -> Tensor:
    """Of the rows that routers see: padding goes to no expert."""
    if batch.documents_BS is None:
        return grad_BSD.flatten(0, -2)
    return grad_BSD[batch.documents_BS != PADDING]


def agreement(gains: Gains) -> Tensor:
    """|chosen & best| / K of each token, fp32 [T]."""
    top_k = gains.routed.router.top_k
    best_TK = gains.gains_TE.topk(top_k, dim=-1).indices
    return gains.routed.chosen_TE.gather(1, best_TK).sum(-1) / top_k


@contextlib.contextmanager
def _probes(layers: Mapping[int, MoELayer]) -> Iterator[dict[int, Tensor]]:
    """Zeros added to the layers' outputs, by block, after a forward pass: the gradients by them are those by the
    outputs, although no parameter has one."""
    probes: dict[int, Tensor] = {}

    def probe(block: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            probes[block] = torch.zeros_like(output[0], requires_grad=True)
            return output[0] + probes[block], output[1]

        return hook

    hooks = [layer.register_forward_hook(probe(block)) for block, layer in layers.items()]
    try:
        yield probes
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _gains(layer: MoELayer, routed: Routed, grad_TD: Tensor) -> Gains:
    rows_TD = routed.rows_TD
    ones_T, gains = rows_TD.new_ones(len(rows_TD)), []
    for expert in range(layer.router.num_experts):  # one at a time: of all, the outputs would be E times the rows
        rows_per_expert_E = torch.zeros_like(routed.plan.rows_per_expert_E)
        rows_per_expert_E[expert] = len(rows_TD)
        out_TD = layer.experts(rows_TD, ones_T, rows_per_expert_E)
        gains.append(-(at_least_fp32(grad_TD) * at_least_fp32(out_TD)).sum(-1))
    return Gains(routed, torch.stack(gains, dim=1), routed.real_T & (grad_TD != 0).any(-1))


def _mean(total: Tensor) -> Agreement:
    tokens, shares = total.tolist()
    return Agreement(int(tokens), shares / tokens if tokens else None)


def _refuse_spread(layers: Mapping[int, MoELayer]) -> None:
    ranks = max(layer.router.ep.size for layer in layers.values())
    if ranks > 1:
        raise ConfigError(
            "agreement with the best experts needs all experts on one rank",
            got=f"experts spread over {ranks} ranks",
            expected="expert-parallel degree 1",
            todo="measure on one rank: python launch/evaluate.py --routing ...",
        )
