"""Measures on held-out data during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megamoe.config.run import RunConfig
from megamoe.data.batch import PADDING, Batch
from megamoe.model.decoder import ModelOutput, Scores
from megamoe.parallel import collectives
from megamoe.training.engine import Engine
from megamoe.training.metrics import Accumulator
from megamoe.training.setup import Runtime
from megamoe.training.step import Loader, rank_batches


def mean_loss(engine: Engine, data: Loader, config: RunConfig, runtime: Runtime) -> dict[str, float]:
    """`validation_loss`: mean cross entropy over the first `training.validation.batches` global batches."""
    accumulator = Accumulator()
    with engine.evaluating():
        for number in range(config.training.validation.batches):
            for batch in rank_batches(data, config, runtime, number * config.training.global_batch_size):
                accumulator.add(engine.evaluate(batch))
    return {"validation_loss": float(accumulator.reduce(runtime.groups).values["cross_entropy"])}


class Rows(Loader, Protocol):
    """A loader that ends."""

    num_rows: int


def answer_scores(engine: Engine, sources: Mapping[str, Rows], config: RunConfig, runtime: Runtime) -> dict[str, float]:
    """How well the answers of held-out conversations are known, over all sources and for each one.

    Over the first `training.validation.batches` global batches of each source:
    `validation_loss`: mean cross entropy of the answers' tokens. `exact_match`: share of conversations all of whose
    answer tokens are the likeliest ones given those before, which is what greedy generation would write.
    `validation_loss.<source>`, `exact_match.<source>`: of one source; the overall `exact_match` is the mean of these.
    Nothing where nothing is held out.
    """
    if not sources:
        return {}
    totals = {name: _total(engine, data, config, runtime) for name, data in sources.items()}
    per_source = {
        name: (nats / max(1.0, labels), exact / max(1.0, held)) for name, (nats, labels, exact, held) in totals.items()
    }
    nats, labels = (sum(total[i] for total in totals.values()) for i in (0, 1))
    values = {
        "validation_loss": nats / max(1.0, labels),
        "exact_match": sum(exact for _, exact in per_source.values()) / max(1, len(per_source)),
    }
    for name, (loss, exact) in per_source.items():
        values |= {f"validation_loss.{name}": loss, f"exact_match.{name}": exact}
    return values


def _total(engine: Engine, data: Rows, config: RunConfig, runtime: Runtime) -> list[float]:
    """Nats, labels, conversations known by heart, conversations; over all ranks."""
    size = config.training.global_batch_size
    rounds = min(config.training.validation.batches, -(-data.num_rows // size))
    total = torch.zeros(4, dtype=torch.float64, device=runtime.device)
    with engine.evaluating():
        for number in range(rounds):
            for batch in rank_batches(data, config, runtime, number * size):
                total += score_batch(batch, engine.evaluate(batch, each=True))
    return collectives.all_reduce_sum(total, runtime.groups.dp.handle).tolist()


def score_batch(batch: Batch, output: ModelOutput) -> Tensor:
    """Nats, labels, conversations all of whose labels are right, conversations; float64 [4]."""
    scores = output.scores
    assert isinstance(scores, Scores)
    assert batch.documents_BS is not None
    length = batch.tokens_BS.shape[1]
    rows_B1 = torch.arange(len(batch.tokens_BS), device=batch.tokens_BS.device)[:, None]
    counted_BS = scores.counted_BS & (batch.documents_BS != PADDING)
    conversation_N = (rows_B1 * length + batch.documents_BS)[counted_BS]
    wrong_N = (~scores.right_BS)[counted_BS].double()
    empty = torch.zeros(batch.tokens_BS.numel(), dtype=torch.float64, device=wrong_N.device)
    labels, wrong = (empty.index_add(0, conversation_N, v) for v in (torch.ones_like(wrong_N), wrong_N))
    held = labels > 0
    return torch.stack(
        [scores.losses_BS.double().sum(), labels.sum(), (held & (wrong == 0)).sum().double(), held.sum().double()]
    )
