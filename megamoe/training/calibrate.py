"""Which routing entropy counts as uncertain: measured once, on the model that fine-tuning starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megamoe.common.log import get_logger
from megamoe.config.run import RunConfig
from megamoe.data.sft import RowsSummary
from megamoe.moe.broadcast import normalised_entropy
from megamoe.moe.routers.base import Router, Rows
from megamoe.moe.types import RoutingPlan
from megamoe.parallel import collectives
from megamoe.training.engine import Engine
from megamoe.training.setup import Runtime
from megamoe.training.step import Loader, rank_batches

BINS = 8192
"""Of the histogram over [0, 1] that the quantile is read from; a sum over ranks that no layout changes."""

log = get_logger("megamoe.calibrate")


def calibrate(engine: Engine, data: Loader, config: RunConfig, runtime: Runtime, epoch: RowsSummary) -> None:
    """Set every block's threshold to the quantile that `moe.broadcast` asks for. Collective.

    Args:
        data: the training data, read from its beginning.
        epoch: one pass over the data, which is read at most once.
    """
    broadcast = config.moe.broadcast
    if broadcast is None or broadcast.threshold != "quantile":
        return
    size = config.training.global_batch_size
    wanted = math.ceil(broadcast.calibration_tokens / (size * config.data.seq_length * epoch.fill))
    with engine.evaluating(), _entropies(engine) as histograms:
        for number in range(max(1, min(wanted, epoch.rows // size))):
            for batch in rank_batches(data, config, runtime, number * size):
                engine.evaluate(batch)
    thresholds = []
    for router, histogram in histograms.items():
        collectives.all_reduce_sum(histogram, runtime.groups.stage.handle)
        assert router.broadcast is not None
        router.broadcast.threshold.fill_(quantile(histogram.cpu(), broadcast.quantile))
        thresholds.append(f"{float(router.broadcast.threshold):.3f}")
    tokens = int(next(iter(histograms.values())).sum())
    log.info(
        "entropy of uncertain tokens, %g quantile over %s tokens: %s (of ln E, per block)",
        broadcast.quantile,
        f"{tokens:,}",
        " ".join(thresholds),
    )


def quantile(histogram: Tensor, share: float) -> float:
    """The value below which that share of the counts lies, evenly spread inside of a bin over [0, 1].

    Args:
        histogram: counts, float64 [bins].
    """
    reached = histogram.cumsum(0)
    aim = share * float(reached[-1])
    place = min(int(torch.searchsorted(reached, torch.tensor(aim, dtype=reached.dtype))), len(histogram) - 1)
    before = float(reached[place] - histogram[place])
    inside = (aim - before) / max(1.0, float(histogram[place]))
    return (place + min(1.0, max(0.0, inside))) / len(histogram)


@contextmanager
def _entropies(engine: Engine) -> Iterator[dict[Router, Tensor]]:
    """Per router the histogram of its entropies while the context is open, padding left out."""
    routers = list(engine.routers().values())
    device = next(engine.model.buffers()).device
    histograms = {router: torch.zeros(BINS, dtype=torch.float64, device=device) for router in routers}

    def observe(router: Router, args: tuple[Any, ...], plan: RoutingPlan) -> None:
        entropy_T = normalised_entropy(router.probabilities(plan.logits_TE))
        about = args[1] if len(args) > 1 else Rows()
        if about.sequences_T is not None and about.spread is None:  # spread rows come without their padding
            entropy_T = entropy_T[about.sequences_T >= 0]
        histograms[router] += torch.histc(entropy_T.float(), BINS, 0.0, 1.0)

    handles = [router.register_forward_hook(observe) for router in routers]
    try:
        yield histograms
    finally:
        for handle in handles:
            handle.remove()
