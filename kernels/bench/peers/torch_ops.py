"""torch's index ops: what most code does without any library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.bench import plain
from kernels.bench.peers.base import Peer, Work


def load() -> Peer:
    """index_select and index_add."""
    about = f"torch {torch.__version__}: argsort, index_select, index_add"
    return Peer("torch index ops", about, _tasks, {"unpermute": "atomics: not repeatable"})


def load_gather() -> Peer:
    """The repeatable way: no atomics."""
    about = f"torch {torch.__version__}: index_select of K rows per token, then a sum"
    left_out = "as in torch index ops"
    return Peer("torch gather", about, _gather, {"plan": left_out, "permute": left_out, "unpermute_bwd": left_out})


def _tasks(work: Work) -> dict[str, Callable[[], Any]]:
    tokens, found = work.shape.tokens, work.plan
    weights_R = work.weights_TK.flatten()[found.source.long()]
    return {
        "plan": lambda: plain.plan(work.experts_TK, work.shape.experts),
        "permute": lambda: plain.permute(work.x_TD, found.tokens),
        "permute_bwd": lambda: plain.unpermute(work.y_RD, found.tokens, tokens),
        "unpermute": lambda: plain.unpermute(work.y_RD, found.tokens, tokens),
        "unpermute_weighted": lambda: plain.unpermute_weighted(work.y_RD, found.tokens, weights_R, tokens),
        "unpermute_bwd": lambda: plain.unpermute_bwd(work.dout_TD, work.y_RD, found.tokens, weights_R),
    }


def _gather(work: Work) -> dict[str, Callable[[], Any]]:
    place, weights = work.plan.place, work.weights_TK.to(work.y_RD.dtype)

    def weighted() -> torch.Tensor:
        rows_TKD = work.y_RD.index_select(0, place.flatten()).view(*place.shape, -1)
        return torch.einsum("tkd,tk->td", rows_TKD, weights)

    return {
        "permute_bwd": lambda: plain.gather_and_sum(work.y_RD, place),
        "unpermute": lambda: plain.gather_and_sum(work.y_RD, place),
        "unpermute_weighted": weighted,
    }
