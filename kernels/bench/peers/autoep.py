"""DeepSpeed AutoEP's permutation on one rank: a gather by token, its own gather with padding, its weighted restore."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from kernels.bench.peers.base import Peer, Work
from megamoe.bench.conditions import version

PADDED = "rows of every expert padded to a multiple of 8, by a second gather"
NO_SUM = "its combine always applies the weights"


def load() -> Peer:
    """Raises what importing it raises."""
    layer = importlib.import_module("deepspeed.module_inject.auto_ep_layer")
    fused = importlib.import_module("deepspeed.ops.triton_ops.autoep_fused_token_ops")
    about = f"DeepSpeed {version('deepspeed')}: argsort, x[index], permute_by_local_expert, fused_weighted_restore"
    return Peer(
        "DeepSpeed AutoEP",
        about,
        lambda work: tasks(layer, fused, work),
        {"permute": PADDED, "permute_bwd": PADDED, "unpermute": NO_SUM},
    )


def tasks(layer: Any, fused: Any, work: Work) -> dict[str, Callable[[], Any]]:
    """The steps of its layer with one rank, in its fastest setting."""
    s = work.shape
    order = torch.argsort(work.experts_TK.flatten(), stable=True)
    counts = torch.bincount(work.experts_TK.flatten(), minlength=s.experts).to(torch.int32)
    x_TD, weights = work.x_TD.detach().requires_grad_(), work.weights_TK.detach().requires_grad_()

    def plan() -> Any:
        found = torch.argsort(work.experts_TK.flatten(), stable=True)
        return found, work.experts_TK.flatten().index_select(0, found)

    def permute(rows: Any) -> Any:
        return layer.permute_by_local_expert(rows[order // s.top_k], counts)

    padded, indices, _, num_rows = permute(x_TD)
    real = (indices >= 0) & (indices < num_rows)
    grad = torch.zeros_like(padded).index_copy_(0, real.nonzero().squeeze(1), work.y_RD)
    experts_out = grad.clone().requires_grad_()

    def restore(rows: Any, scores: Any) -> Any:
        rows_RD = layer.unpermute_by_local_expert(rows, indices, num_rows)
        if rows_RD.device.type != "cuda":
            return layer.combine_from_routed(
                rows_RD, scores, order, s.top_k, "post", "weighted_sum", (1, s.tokens, s.hidden)
            )[0]
        return fused.fused_weighted_restore(rows_RD, scores, order, s.top_k, (1, s.tokens, s.hidden))[0]

    merged = restore(experts_out, weights)

    def backward() -> Any:
        rows, scores = torch.autograd.grad(merged, (experts_out, weights), work.dout_TD, retain_graph=True)
        return rows, scores

    return {
        "plan": plan,
        "permute": lambda: permute(work.x_TD)[0],
        "permute_bwd": lambda: torch.autograd.grad(padded, x_TD, grad, retain_graph=True)[0],
        "unpermute_weighted": lambda: restore(experts_out.detach(), work.weights_TK),
        "unpermute_bwd": backward,
    }
