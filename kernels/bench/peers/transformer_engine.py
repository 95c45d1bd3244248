"""Transformer Engine's permutation by mask map: its Triton kernels, without its compiled part."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from kernels.bench.peers.base import Peer, Work, distribution_version, stand_in, unpacked

PACKAGE = "transformer_engine"


def load() -> Peer:
    """Raises what importing its files raises."""
    root = unpacked(PACKAGE)
    stand_in(f"{PACKAGE}.common.triton", root)
    stand_in(f"{PACKAGE}.pytorch.triton", root)
    module = importlib.import_module(f"{PACKAGE}.pytorch.triton.permutation")
    about = f"{distribution_version(root, PACKAGE)}: Triton kernels of its permutation by mask map"
    return Peer("Transformer Engine", about, lambda work: tasks(module, work), {})


def tasks(module: Any, work: Work) -> dict[str, Callable[[], Any]]:
    """Its functions; it takes the choices as a mask [T, E], which costs nothing here."""
    s = work.shape
    row_ids = module.make_row_id_map(work.map_TE, s.tokens, s.experts)

    def merged(probs_TE: Any) -> Any:
        sizes = (s.tokens, s.experts, s.hidden)
        return module.unpermute_with_mask_map(work.y_RD, row_ids, probs_TE, None, None, *sizes)[0]

    return {
        "plan": lambda: module.make_row_id_map(work.map_TE, s.tokens, s.experts),
        "permute": lambda: module.permute_with_mask_map(
            work.x_TD, row_ids, None, None, None, s.tokens, s.experts, s.rows, s.hidden, 0
        )[0],
        "permute_bwd": lambda: merged(None),
        "unpermute": lambda: merged(None),
        "unpermute_weighted": lambda: merged(work.probs_TE),
        "unpermute_bwd": lambda: module.unpermute_with_mask_map_bwd_with_merging_probs(
            work.dout_TD, row_ids, work.y_RD, work.probs_TE, None, s.tokens, s.experts, s.rows, s.hidden
        ),
    }
