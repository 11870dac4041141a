"""Rows of a table, taken and summed, as compiled. Imported only to build a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .activation_code import WIDTH
from .engine.region import parallel
from .engine.simd import (
    BFLOAT16,
    ELEMS,
    FLOAT32,
    INT64,
    Elem,
    compute_elem,
    inline,
    load,
    load_n,
    load_scalar,
    prefetch,
    spread,
    store,
    store_n,
    store_scalar,
    wide,
)
from .softmax_code import LINE

TERMS = 64  # rows that are summed before they are added to the total: its error grows more slowly
AHEAD = 4  # rows


def gather() -> Callable[..., Any]:
    """kernel(threads, n, indices, table, rows, step, size, out, bad)

    out: n rows of ``size`` bytes, copied from the table of ``rows`` rows, ``step`` bytes apart. bad: set to 1 + the place of an
    index that is out of range. The numbers are moved and not looked at, so float32 stands for every dtype.
    """
    several, L, W = wide(FLOAT32, WIDTH), FLOAT32.lanes * 4, FLOAT32.lanes * WIDTH * 4

    @inline
    def body(thread, threads, n, indices, table, rows, step, size, out, bad):
        end = n * (thread + 1) // threads
        for k in range(n * thread // threads, end):
            index = load_scalar(INT64, indices + k * 8)
            if index < 0 or index >= rows:
                store_scalar(INT64, bad, k + 1)
                continue
            later = table
            if k + AHEAD < end:
                later = table + load_scalar(INT64, indices + (k + AHEAD) * 8) * step
            source, target, i = table + index * step, out + k * size, 0
            while i + W <= size:
                for line in range(0, W, LINE):
                    prefetch(later + i + line)
                store(several, target + i, load(several, source + i))
                i += W
            while i + 4 <= size:
                words = (size - i) // 4
                store_n(FLOAT32, target + i, load_n(FLOAT32, source + i, words), words)
                i += min(L, words * 4)
            if i < size:  # a last number of two bytes
                store_scalar(BFLOAT16, target + i, load_scalar(BFLOAT16, source + i))

    def kernel(threads, n, indices, table, rows, step, size, out, bad):
        parallel(threads, body, (n, indices, table, rows, step, size, out, bad))
    return kernel


def scatter(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, n, indices, places, grad, step, size, out, rows, padding, by_frequency, bad)

    out, which is zero: each of its ``rows`` rows of ``size`` elements becomes the sum of the rows of grad that have its index.
    indices: sorted; places: where in grad each belongs, in their first order, so that a row is summed in one order by one thread.
    """
    elem = ELEMS[elem_name]

    def summing(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def add(i, k, args):
            first, last, places, grad, step, into, factor = args
            total, at = spread(target, 0.0), first
            while at < last:
                part, end = spread(target, 0.0), min(last, at + TERMS)
                while at < end:
                    row = grad + load_scalar(INT64, places + at * 8) * step + i * elem.size
                    part = part + (load_n(source, row, k) if masked else load(source, row))
                    at += 1
                total = total + part
            if masked:
                store_n(source, into + i * elem.size, total * factor, k)
            else:
                store(source, into + i * elem.size, total * factor)
        return add
    c = compute_elem(elem)
    several, one = summing(wide(elem, WIDTH), wide(c, WIDTH), False), summing(elem, c, True)
    L, W = elem.lanes, elem.lanes * WIDTH

    @inline
    def body(thread, threads, n, indices, places, grad, step, size, out, rows, padding, by_frequency, bad):
        first, end = n * thread // threads, n * (thread + 1) // threads
        while 0 < first < end and load_scalar(INT64, indices + first * 8) == load_scalar(INT64, indices + (first - 1) * 8):
            first += 1  # the row is that of the thread before
        while first < end:
            index, last = load_scalar(INT64, indices + first * 8), first + 1
            while last < n and load_scalar(INT64, indices + last * 8) == index:
                last += 1
            if index < 0 or index >= rows:
                store_scalar(INT64, bad, first + 1)
            elif index != padding:
                factor = 1.0 / (last - first) if by_frequency else 1.0
                args = (first, last, places, grad, step, out + index * size * elem.size, factor)
                i = 0
                while i + W <= size:
                    several(i, W, args)
                    i += W
                while i < size:
                    one(i, min(L, size - i), args)
                    i += L
            first = last

    def kernel(threads, n, indices, places, grad, step, size, out, rows, padding, by_frequency, bad):
        parallel(threads, body, (n, indices, places, grad, step, size, out, rows, padding, by_frequency, bad))
    return kernel
