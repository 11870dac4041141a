"""Operands that were packed once and are kept: a small store keyed by tensor, dropped when the tensor changes or dies.

A tensor's version counter tells that it changed, and its address and strides that it was given other storage. A write through
``tensor.data`` or a NumPy view is invisible to the version counter; so a sample of the elements, taken again at each
look-up, must still read the same. ``clear`` drops everything.

Environment: ``FASTNN_PACK_MB``, the most that the store may hold (default: an eighth of the memory; 0 turns it off).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .build import Kernel

_SAMPLES = 32


def _default_limit() -> int:
    named = os.environ.get("FASTNN_PACK_MB")
    if named is not None:
        if not named.isdecimal():
            raise ValueError(f"FASTNN_PACK_MB is {named!r}, but must be a whole number of MiB, 0 or more (0: nothing is kept)")
        return int(named) << 20
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    except (AttributeError, ValueError, OSError):  # not POSIX: no such question can be asked
        return 1 << 30


def _make_sample() -> Callable[..., object]:
    from .pack import sample

    def kernel(address, step, count):
        return sample(address, step, count)
    return kernel


_SAMPLE = Kernel("packed_sample", "iii>i", _make_sample)


def _sample(entry: Packing) -> int:
    """A number that changes if any of a few elements, spread over the tensor, changes."""
    return _SAMPLE.run(*entry.sampled)


class Packing:
    """What a tensor was when it was seen, and its packing: at ``address``, cut into ``cut`` panels."""

    __slots__ = ("__weakref__", "address", "buffer", "cut", "origin", "sample", "sampled", "shape", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.version, self.origin, self.shape = tensor._version, tensor.data_ptr(), tensor.shape
        words = tensor.nbytes // 8
        self.sampled = self.origin, words // _SAMPLES * 8, min(_SAMPLES, words)
        self.buffer: Tensor | None = None
        self.address = self.cut = self.sample = 0


_entries: OrderedDict[tuple[int, Hashable], tuple[weakref.ref[Tensor], Packing]] = OrderedDict()
_lock = threading.RLock()
_limit: int | None = None
_bytes = 0


def _new_lock() -> None:
    """In a forked child: the thread that held the old one is not there to let it go, nor to finish what it was at."""
    global _bytes, _lock
    _lock = threading.RLock()
    _bytes = sum(entry.buffer.nbytes for _, entry in _entries.values() if entry.buffer is not None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def limit(megabytes: int | None = None) -> int:
    """Set (if given) and return the most that the store may hold, in MiB. 0 turns keeping off and drops what is kept.

    Raises ValueError for a number below 0.
    """
    global _limit
    if megabytes is not None:
        if megabytes < 0:
            raise ValueError(f"limit(): megabytes must be 0 or more, got {megabytes}")
        _limit = megabytes << 20
        with _lock:
            _shrink(_limit)
    return (_default_limit() if _limit is None else _limit) >> 20


def held() -> int:
    """Bytes that the store holds now."""
    return _bytes


def clear() -> None:
    """Drop every packed operand."""
    with _lock:
        _shrink(0)
        _entries.clear()


def _drop(key: tuple[int, Hashable]) -> None:
    global _bytes
    with _lock:
        found = _entries.pop(key, None)
        if found is not None and found[1].buffer is not None:
            _bytes -= found[1].buffer.nbytes


def _shrink(most: int) -> None:
    while _bytes > most:
        _drop(next(key for key, (_, entry) in _entries.items() if entry.buffer is not None))


def find(tensor: Tensor, kind: Hashable = "") -> Packing | None:
    """The packing of ``tensor`` that is kept, if the tensor has not changed since. Whoever holds it has its memory."""
    found = _entries.get((id(tensor), kind))
    if found is None:
        return None
    owner, entry = found
    same = (owner() is tensor and entry.version == tensor._version and entry.origin == tensor.data_ptr()
            and entry.shape == tensor.shape)
    return entry if same and entry.buffer is not None and entry.sample == _sample(entry) else None


def get(tensor: Tensor, size: int, pack: Callable[[int], int], kind: Hashable = "") -> Packing | None:
    """The kept packing of a dense ``tensor``, made by ``pack(address) -> cut`` when it is seen a second time unchanged.

    ``kind`` tells apart packings of one tensor that differ in their layout.

    None at the first sight (a temporary is not worth keeping, nor is a weight that changes at each step), or where ``size`` bytes
    would not fit the limit: then the caller packs for this call only.
    """
    global _bytes, _limit
    key = id(tensor), kind
    found = _entries.get(key)
    if found is not None:
        entry = found[1]
        if (found[0]() is tensor and entry.version == tensor._version and entry.origin == tensor.data_ptr()
                and entry.shape == tensor.shape
                and (entry.buffer is None or entry.sample == _sample(entry))):
            if entry.buffer is not None:
                return entry
        else:
            _drop(key)
            found = None
    if _limit is None:
        _limit = _default_limit()
    room = size + 64  # to begin at a cache line
    if room > _limit:
        return None
    if found is None:
        with _lock:
            _entries[key] = (weakref.ref(tensor, lambda _: _drop(key)), Packing(tensor))
        return None
    with _lock:
        if entry.buffer is not None:  # another thread was first
            return entry
        _shrink(_limit - room)
        buffer = torch.empty(room, dtype=torch.uint8)
        entry.address = -(-buffer.data_ptr() // 64) * 64
        entry.cut, entry.sample = pack(entry.address), _sample(entry)
        entry.buffer = buffer
        if _entries.get(key) is found:  # else another thread has dropped it, and it serves this call only
            _bytes += buffer.nbytes
            _entries.move_to_end(key)
    return entry
