"""How the C library treats the memory of freed tensors."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have freed memory kept in the process for the next tensor, as torch does by itself on GPUs.

    By default glibc returns every block above 32 MB to the system at once, and the next one of that size is mapped and
    zeroed page by page again. Activations and stacked weight gradients are that large, and the same sizes come back in
    every step: without this, page faults take up to a third of a step of 64 experts. The process keeps the largest
    amount of memory it ever needed.

    Returns:
        Whether the C library has these settings; where it has not, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
