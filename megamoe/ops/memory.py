"""Memory for large tensors of the same size in every step."""

from __future__ import annotations

import mmap
import sys
import weakref

import torch
from torch import Tensor

WORTHWHILE_BYTES = 4 << 20
"""Smaller tensors come from the C library's heap, which keeps what is freed."""

_free: dict[int, list[mmap.mmap]] = {}


def recycled_like(tensor: Tensor) -> Tensor:
    """As `torch.empty_like`; on a Linux CPU a large one lies in the memory of an earlier one of its size that is gone.

    glibc hands large blocks back to the system when they are freed, and the next one is mapped and zeroed anew, page
    by page: for the weight gradients of 64 experts that took a third of the backward pass. torch recycles memory by
    itself on GPUs and not on CPUs. Only for sizes that come back, because a block that nobody asks for again stays.
    """
    size = tensor.numel() * tensor.element_size()
    if size < WORTHWHILE_BYTES or tensor.device.type != "cpu" or sys.platform != "linux":
        return torch.empty_like(tensor)
    blocks = _free.setdefault(size, [])
    try:
        block = blocks.pop()
    except IndexError:
        # Private: after a fork parent and child must not write into each other's gradients.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(block)
    # The tensor's storage holds the view and nobody else does, so the view's end is the end of the last tensor on it.
    weakref.finalize(view, blocks.append, block).atexit = False
    return torch.frombuffer(view, dtype=tensor.dtype).view(tensor.shape)
