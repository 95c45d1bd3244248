"""megamoe's own ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.bench.peers.base import Peer, Work
from kernels.bench.run import missing_library


def load() -> Peer:
    """Raises ModuleNotFoundError where the library cannot be used."""
    reason = missing_library("plan", "permute_rows", "unpermute_rows", "unpermute_bwd")
    if reason:
        raise ModuleNotFoundError(reason.removeprefix("not run: "))
    return Peer("megamoe", "plan, permute_rows, unpermute_rows, unpermute_bwd", _tasks, {})


def _tasks(work: Work) -> dict[str, Callable[[], Any]]:
    ops, plan = torch.ops.megamoe, work.plan
    return {
        "plan": lambda: ops.plan(work.experts_TK, work.shape.experts),
        "permute": lambda: ops.permute_rows(work.x_TD, plan.source, plan.place),
        "permute_bwd": lambda: ops.unpermute_rows(work.y_RD, plan.place, plan.source),
        "unpermute": lambda: ops.unpermute_rows(work.y_RD, plan.place, plan.source),
        "unpermute_weighted": lambda: ops.unpermute_rows(work.y_RD, plan.place, plan.source, work.weights_TK),
        "unpermute_bwd": lambda: ops.unpermute_bwd(work.dout_TD, work.y_RD, plan.place, plan.source, work.weights_TK),
    }
