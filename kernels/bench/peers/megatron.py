"""Megatron-core's permute and unpermute without Transformer Engine: torch ops on a mask."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from kernels.bench.peers.base import Peer, Work
from megamoe.bench.conditions import version

IN_PERMUTE = "inside permute"


def load() -> Peer:
    """Raises what importing it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    about = f"{version('megatron-core')}: permute and unpermute, fused=False"
    return Peer("Megatron-core unfused", about, lambda work: tasks(module, work), {"plan": IN_PERMUTE})


def tasks(module: Any, work: Work) -> dict[str, Callable[[], Any]]:
    """Forward as it is, backward through autograd of a graph that is kept."""
    s = work.shape
    x_TD, y_RD, probs_TE = (t.detach().requires_grad_() for t in (work.x_TD, work.y_RD, work.probs_TE))

    def permute(rows: Any) -> Any:
        return module.permute(rows, work.map_TE, num_out_tokens=s.rows)

    order = permute(work.x_TD)[2]

    def unpermute(rows: Any, probs: Any) -> Any:
        return module.unpermute(rows, order, work.x_TD.shape, probs=probs, routing_map=work.map_TE)

    permuted, merged = permute(x_TD)[0], unpermute(y_RD, probs_TE)
    return {
        "permute": lambda: permute(work.x_TD)[0],
        "permute_bwd": lambda: torch.autograd.grad(permuted, x_TD, work.y_RD, retain_graph=True)[0],
        "unpermute": lambda: unpermute(work.y_RD, None),
        "unpermute_weighted": lambda: unpermute(work.y_RD, work.probs_TE),
        "unpermute_bwd": lambda: torch.autograd.grad(merged, (y_RD, probs_TE), work.dout_TD, retain_graph=True),
    }
