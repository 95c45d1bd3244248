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
    zeroed page by page again. That is a good part of a pass in fp32, the dense layer's most of all, so a comparison
    without it says more about arithmetic and less about the allocator.

    Returns:
        Whether the C library has these settings; where it has not, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


def prepare(keep: bool) -> str:
    """Set the allocator as asked, and say in words how it is."""
    return "freed memory is kept" if keep and keep_freed_memory() else "the C library's default"
