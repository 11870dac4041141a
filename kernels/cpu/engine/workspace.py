"""Scratch memory for a kernel call: aligned, kept for the next call of the same Python thread, in huge pages if there are any."""

from __future__ import annotations

import ctypes
import mmap
import threading

_PAGE = 2 << 20
_local = threading.local()


def workspace(size: int) -> int:
    """The address of at least ``size`` bytes, aligned to a page. Valid until this thread asks again."""
    if size > getattr(_local, "size", 0):
        rounded = -(-size // _PAGE) * _PAGE
        # Private: a forked child must not scribble over its parent's. Room to start at a huge page's border.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        block = mmap.mmap(-1, rounded + _PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(block))
        _local.block, _local.size, _local.address = block, rounded, -(-start // _PAGE) * _PAGE
    return _local.address if size else 0
