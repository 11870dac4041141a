"""How much memory a call takes while it runs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: glibc's names of what ``mallopt`` sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4

#: Whether glibc keeps what is freed: see ``kept``.
keeps = False

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra(call: Callable[[], object], calls: int = 3) -> int | None:
    """The bytes by which this process grows at most during a call, its result included; None where Linux does not tell.

    Whoever allocates, and in whatever way, is seen, to some ten kilobytes. What a provider keeps from call to call (an
    arena, packed weights) is there before and after, and is not counted. The smallest of several calls. Garbage in cycles
    is for the caller to collect beforehand: that takes longer than most calls.
    """
    if sys.platform != "linux" or not _CLEAR.exists():
        return None
    found = []
    for _ in range(calls):
        trim()  # what was freed would else be used again, and the growth not be seen
        _CLEAR.write_text("5")  # the high-water mark is from now on
        before = _bytes("VmRSS")
        call()
        found.append(max(0, _bytes("VmHWM") - before))
    return min(found)


@contextmanager
def kept() -> Iterator[None]:
    """Have glibc keep what is freed, where there is a glibc: everyone's outputs lie in pages that are there already.

    Else an output above 32 MiB is new pages in each call, which the system clears, unless some earlier case has left a hole
    in the heap that it fits in: a sixth of the time, by chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or not (mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1)):
        yield
        return
    global keeps
    keeps = True
    try:
        yield
    finally:  # where glibc's own adjustment ends in a process that has freed large blocks
        keeps = False
        trim()
        mallopt(_MMAP_MAX, 65536)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def trim() -> None:
    """Give back what is kept and not in use, where there is a glibc."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        malloc_trim(0)


def _bytes(name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(name))
