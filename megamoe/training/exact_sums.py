"""Gradients that do not depend on how many ranks share the work (`training.rank_invariant`).

Each micro-batch's gradient is the same on any number of ranks if all operations see the same rows; what differs is the
order in which micro-batches are added up, over time on one rank and over ranks at the end. In fp64 that order does not
matter: a sum of a few fp32 numbers is exact there unless their magnitudes are further apart than 2^29 over their
number. (Ours. Reproducible sums by wider or pre-rounded numbers: Demmel and Nguyen, ARITH 2013.)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megamoe.moe.marker import is_expert
from megamoe.ops.expert_ffn_by_source import GRADIENT_SUM
from megamoe.parallel.collectives import all_reduce_sum
from megamoe.parallel.groups import Groups


class GradientSums:
    """Takes the place of autograd's accumulation and DeepSpeed's reduction.

    Args:
        parameters: those that are trained, whole on this rank but for experts.
        groups: the process groups of the run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], groups: Groups) -> None:
        self._parameters, self._groups = [p for p in parameters if p.requires_grad], groups
        for parameter in self._parameters:
            setattr(parameter, GRADIENT_SUM, torch.zeros_like(parameter, dtype=torch.float64))

    @torch.no_grad()
    def take(self) -> None:
        """Add the gradients of a micro-batch, which are gone afterwards."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                _sum(parameter).add_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def give(self) -> None:
        """Gradients of the whole batch, a mean over the data-parallel ranks. Collective."""
        for parameter in self._parameters:
            total, groups = _sum(parameter), self._groups
            all_reduce_sum(total, (groups.edp if is_expert(parameter) else groups.replica).handle)
            parameter.grad = total.div_(groups.replica.size).to(parameter.dtype)
            total.zero_()


def _sum(parameter: nn.Parameter) -> Tensor:
    total: Tensor = getattr(parameter, GRADIENT_SUM)
    return total
