"""torchtitan's MinimalAsyncEP: its Triton kernels on one rank whose peer is itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from kernels.bench.peers.base import Peer, Work, distribution_version, stand_in, unpacked

PACKAGE = "torchtitan"
COPIES = "without its exchange: the copy of every row back to its source rank, and its barriers, are left out"


def load() -> Peer:
    """Raises what importing its files raises."""
    root = unpacked(PACKAGE)
    stand_in(f"{PACKAGE}.distributed.minimal_async_ep", root)
    module = importlib.import_module(f"{PACKAGE}.distributed.minimal_async_ep.kernels")
    about = f"{distribution_version(root, PACKAGE)}: Triton kernels of minimal_async_ep, one rank"
    return Peer(PACKAGE, about, lambda work: tasks(module, work), {"unpermute": COPIES, "unpermute_weighted": COPIES})


def tasks(module: Any, work: Work) -> dict[str, Callable[[], Any]]:
    """Its functions as its dispatch and combine call them, the receive buffer being one of our own."""
    s, device = work.shape, work.x_TD.device
    flat = work.plan.source.long()
    sources = flat // s.top_k
    received = torch.empty_like(work.y_RD)
    pointers = torch.tensor([received.data_ptr()], dtype=torch.int64, device=device)
    ranks, rows = torch.zeros_like(flat), torch.arange(s.rows, device=device)
    slots = module.invert_flat_indices_kernel(flat, num_rows=s.rows)
    scores = work.weights_TK.flatten()

    def plan() -> Any:
        order = torch.argsort(work.experts_TK.flatten(), stable=True)
        counts = torch.bincount(work.experts_TK.flatten(), minlength=s.experts)
        starts = counts.cumsum(0) - counts
        module.fill_dispatch_metadata_kernel(
            counts,
            starts,
            starts,
            num_routed_tokens=s.rows,
            num_local_experts=s.experts,
            max_tokens_per_segment=s.tokens,
        )
        return module.invert_flat_indices_kernel(order, num_rows=s.rows)

    def permute() -> torch.Tensor:
        module.copy_rows_to_peers_kernel(
            work.x_TD,
            [received],
            ranks,
            rows,
            ep_size=1,
            num_rows=s.rows,
            num_cols=s.hidden,
            dst_ptrs=pointers,
            src_rows=sources,
        )
        return received

    def reduce(scores: Any) -> Any:
        return module.reduce_topk_slots_kernel(
            work.y_RD, slots, scores, num_tokens=s.tokens, top_k=s.top_k, scores_are_slot_ordered=True
        )

    def backward() -> Any:
        ordered = {"top_k": s.top_k, "scores_are_slot_ordered": True}
        rows_grad = module.expand_topk_grad_kernel(work.dout_TD, flat, scores, dtype=work.y_RD.dtype, **ordered)
        return rows_grad, module.topk_scores_grad_kernel(work.y_RD, work.dout_TD, flat, dtype=torch.float32, **ordered)

    return {
        "plan": plan,
        "permute": permute,
        "permute_bwd": lambda: reduce(None),
        "unpermute": lambda: reduce(None),
        "unpermute_weighted": lambda: reduce(scores),
        "unpermute_bwd": backward,
    }
