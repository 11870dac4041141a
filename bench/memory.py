"""How much memory a call takes while it runs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra(call: Callable[[], object], calls: int = 3) -> int | None:
    """The bytes by which this process grows at most during a call, its result included; None where Linux does not tell.

    Whoever allocates, and in whatever way, is seen, to some ten kilobytes. What a provider keeps from call to call (an
    arena, packed weights) is there before and after, and is not counted. The smallest of several calls. Garbage in cycles
    is for the caller to collect beforehand: that takes longer than most calls.
    """
    if sys.platform != "linux" or not _CLEAR.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    found = []
    for _ in range(calls):
        if trim is not None:  # glibc: what was freed would else be used again, and the growth not be seen
            trim(0)
        _CLEAR.write_text("5")  # the high-water mark is from now on
        before = _bytes("VmRSS")
        call()
        found.append(max(0, _bytes("VmHWM") - before))
    return min(found)


def _bytes(name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(name))
