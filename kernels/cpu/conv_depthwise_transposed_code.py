"""Depthwise transposed convolution of stride 2 along rows, as compiled: the gradient in the input of a depthwise convolution.

A phase writes every second pixel of a row. Both phases of a row are computed at once, from the same padded plane, and interleaved
in registers: rows are written whole. Four rows of one phase share the weights.
"""

from __future__ import annotations

from typing import Any

from .conv_code import copier, get
from .conv_fields import BETWEEN
from .engine.region import parallel
from .engine.simd import (
    FLOAT32,
    fma,
    inline,
    interleave_high,
    interleave_low,
    load,
    load_scalar,
    outline,
    spread,
    store,
    store_n,
)

FOUR = 4
(_N, _C, _H, _W, _OH, _OW, _XN, _XC, _XH, _YN, _YC, _YH, _WC, _SH, _TABLE, _LOW, _MORE, _LEFT, _BAND, _PITCH) = (
    8 * i for i in range(len(BETWEEN)))


def between(elem_name: str) -> Any:
    """``conv_fields.BETWEEN`` lists what ``geo`` points to. The table has for each phase of the rows the number of taps of even
    and of odd pixels, and of each tap its offset in the padded plane and in the filter.
    """
    e = FLOAT32
    lanes, size = e.lanes, e.size
    zeros, copy = copier(e)

    @outline
    def pad(geo, x, first, rows, dst):
        """Rows of the padded plane, whose margins left and right are zero already"""
        row = get(geo, _PITCH) * size
        for h in range(first, first + rows):
            if h >= 0 and h < get(geo, _H):
                copy(dst + get(geo, _LEFT) * size, x + h * get(geo, _XH), get(geo, _W), size)
            else:
                zeros(dst, get(geo, _PITCH))
            dst += row

    @outline
    def block(taps, even, odd, w, b, at, pitch, y, y_step, rows, n):
        """At most four rows of two vectors, of which n pixels are written"""
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = spread(e, b)
        for _ in range(even):
            s, f = at + get(taps, 0), spread(e, load_scalar(e, w + get(taps, 8)))
            a0, a1 = fma(f, load(e, s), a0), fma(f, load(e, s + pitch), a1)
            a2, a3 = fma(f, load(e, s + 2 * pitch), a2), fma(f, load(e, s + 3 * pitch), a3)
            taps += 16
        for _ in range(odd):
            s, f = at + get(taps, 0), spread(e, load_scalar(e, w + get(taps, 8)))
            b0, b1 = fma(f, load(e, s), b0), fma(f, load(e, s + pitch), b1)
            b2, b3 = fma(f, load(e, s + 2 * pitch), b2), fma(f, load(e, s + 3 * pitch), b3)
            taps += 16
        for _ in range(rows):
            low, high = interleave_low(a0, b0), interleave_high(a0, b0)
            if n >= 2 * lanes:
                store(e, y, low)
                store(e, y + e.bytes, high)
            elif n >= lanes:
                store(e, y, low)
                store_n(e, y + e.bytes, high, n - lanes)
            else:
                store_n(e, y, low, n)
            a0, a1, a2, b0, b1, b2 = a1, a2, a3, b1, b2, b3
            y += y_step

    @inline
    def body(t, nt, geo, x, w, y, bias, ws, ws_size):
        channels, oh, ow, sh, band, row = (get(geo, _C), get(geo, _OH), get(geo, _OW), get(geo, _SH), get(geo, _BAND),
                                           get(geo, _PITCH) * size)
        plane = ws + t * ws_size
        zeros(plane, (band + get(geo, _MORE) + FOUR) * get(geo, _PITCH))
        for number in range(get(geo, _N) * channels * t // nt, get(geo, _N) * channels * (t + 1) // nt):
            image = number // channels
            c = number - image * channels
            wc, b = w + c * get(geo, _WC), load_scalar(e, bias + c * size) if bias != 0 else 0.0
            for m0 in range(0, (oh + sh - 1) // sh, band):
                pad(geo, x + image * get(geo, _XN) + c * get(geo, _XC), m0 + get(geo, _LOW), band + get(geo, _MORE), plane)
                taps = get(geo, _TABLE)
                for r in range(sh):
                    even, odd = get(taps, 0), get(taps, 8)
                    rows = min(band, (oh - r + sh - 1) // sh - m0)
                    for m in range(0, rows, FOUR):
                        at = y + image * get(geo, _YN) + c * get(geo, _YC) + ((m0 + m) * sh + r) * get(geo, _YH)
                        for j in range(0, ow, 2 * lanes):
                            v = max(0, min(j, ow - 2 * lanes)) if ow % 2 == 0 else j  # the last ones overlap those before
                            block(taps + 16, even, odd, wc, b, plane + m * row + v // 2 * size, row, at + v * size,
                                  sh * get(geo, _YH), min(FOUR, rows - m), ow - v)
                    taps += (1 + even + odd) * 16

    def kernel(nt, geo, x, w, y, bias, ws, ws_size):
        parallel(nt, body, (geo, x, w, y, bias, ws, ws_size))
    return kernel
