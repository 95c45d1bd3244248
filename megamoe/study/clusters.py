"""How well the router separates tokens: the Calinski-Harabasz index of the rows that reach each expert."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.data.loader import BatchLoader
from megamoe.data.manifest import check_prepared
from megamoe.eval.loading import load_model, open_checkpoint
from megamoe.model.decoder import Decoder
from megamoe.moe.routers.base import Router
from megamoe.moe.types import RoutingPlan
from megamoe.testing.ranks import run_ranks
from megamoe.training.run_folder import write_json
from megamoe.training.setup import Runtime, distributed

FILE = "clusters.json"
TOKENS = 16384
"""Validation tokens that are clustered, at least; the same for all runs of a study."""
BATCH = 8
TIMEOUT_SECONDS = 3600.0


def calinski_harabasz(rows_ND: Tensor, labels_N: Tensor) -> float:
    """[tr(B) / (k - 1)] / [tr(W) / (n - k)]: spread between clusters over spread within (Calinski, Harabasz 1974).

    Clusters without rows do not count into k. NaN where the index has no value: fewer than two clusters, or as many as
    rows.

    Args:
        rows_ND: [N, D].
        labels_N: int64 [N], the cluster of each row.
    """
    rows_ND = rows_ND.double()
    counts_E = torch.bincount(labels_N)
    sums_ED = rows_ND.new_zeros(len(counts_E), rows_ND.shape[1]).index_add_(0, labels_N, rows_ND)
    means_ED = sums_ED / counts_E.clamp_min(1)[:, None]
    between = counts_E.double() @ (means_ED - rows_ND.mean(0)).square().sum(1)
    within = (rows_ND - means_ED[labels_N]).square().sum()
    n, k = len(rows_ND), int((counts_E > 0).sum())
    return float((between / (k - 1)) / (within / (n - k))) if 1 < k < n else float("nan")


def measure_clusters(folders: Sequence[tuple[Path, Path]]) -> list[dict[int, float]]:
    """The index of each block with experts, for every run; kept in the run's folder and read from there next time.

    Args:
        folders: (run folder, checkpoint) of each run.
    """
    missing = [(str(run), str(checkpoint)) for run, checkpoint in folders if not _known(run, checkpoint)]
    if missing:
        run_ranks(_measure, 1, missing, init=False, timeout=TIMEOUT_SECONDS)
    return [_read(run) for run, _ in folders]


def _known(run: Path, checkpoint: Path) -> bool:
    """Whether the file is there and no older than the checkpoint."""
    path = run / FILE
    return path.is_file() and path.stat().st_mtime >= (checkpoint / "manifest.json").stat().st_mtime


def _read(run: Path) -> dict[int, float]:
    values = json.loads((run / FILE).read_text(encoding="utf-8"))
    return {int(index): float(value) for index, value in values["calinski_harabasz"].items() if value is not None}


def _measure(folders: Sequence[tuple[str, str]]) -> None:
    """In a process of its own, because it makes process groups."""
    first = open_checkpoint(folders[0][1], (), 1).config
    with distributed(first.parallel, first.training.timeout_minutes) as runtime:
        for run, checkpoint in folders:
            values = _of_checkpoint(checkpoint, runtime)
            # NaN is no JSON.
            shown = {index: value if value == value else None for index, value in values.items()}
            write_json(Path(run) / FILE, {"calinski_harabasz": shown, "tokens": TOKENS})


def _of_checkpoint(path: str, runtime: Runtime) -> dict[int, float]:
    checkpoint = open_checkpoint(path, (), 1)
    model, _ = load_model(checkpoint, runtime)
    batches = _batches(checkpoint.config, runtime)
    return {i: calinski_harabasz(*routed) for i, routed in first_choices(model, batches).items()}


def _batches(config: RunConfig, runtime: Runtime) -> list[Batch]:
    data = BatchLoader(config.data, check_prepared(config.data), "validation", config.training.seed)
    count = -(-TOKENS // (BATCH * config.data.seq_length))
    return [data.rank_batch(i * BATCH, 0, 0, 1, BATCH, 1).to(runtime.device) for i in range(count)]


def first_choices(model: Decoder, batches: Sequence[Batch]) -> dict[int, tuple[Tensor, Tensor]]:
    """Per block with experts, the rows that enter its router [N, D] and the expert of the highest logit [N].

    The plans of routers differ (an expert may drop, or choose by itself); their logits do not in what they mean.
    """
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    hooks = [
        module.register_forward_hook(_keep(seen.setdefault(index, [])))
        for index, block in enumerate(model.blocks)
        for module in block.modules()
        if isinstance(module, Router)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {i: (torch.cat([r for r, _ in kept]), torch.cat([e for _, e in kept])) for i, kept in seen.items()}


class _keep:
    """A forward hook that keeps the router's rows and first choices."""

    def __init__(self, into: list[tuple[Tensor, Tensor]]) -> None:
        self.into = into

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], plan: RoutingPlan) -> None:
        self.into.append((args[0].detach(), plan.logits_TE.argmax(-1)))
