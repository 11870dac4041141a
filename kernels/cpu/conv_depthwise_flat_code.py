"""Depthwise convolution of planes whose rows keep their length, as compiled: a plane is one long row.

Where an output row is as long as the input's, a tap is one distance for the whole plane, and rows of 7 or 28 fill vectors of 16.
What a tap must not meet, beyond an end of a row or of the plane, is left out by masks, which are alike for all planes; nothing is
copied.
"""

from __future__ import annotations

from typing import Any

from .conv_code import get
from .conv_depthwise_code import putter
from .conv_fields import FLAT
from .engine.region import parallel
from .engine.simd import FLOAT32, INT64, fma, inline, load_scalar, load_where, mask_bytes, spread

VECTORS = 4  # at once
(_N, _C, _O, _XN, _XC, _YN, _YC, _W_STEP, _TAPS, _SHIFTS, _GROUPS, _PLACES, _MASKS) = (8 * i for i in range(len(FLAT)))


def flat(elem_name: str) -> Any:
    """``conv_fields.FLAT`` lists what ``geo`` points to."""
    e = FLOAT32
    bits = mask_bytes(e)
    put_vector = putter(e)

    @inline
    def body(t, nt, geo, x, w, y, bias, res, act):
        channels, outputs, taps, shifts = get(geo, _C), get(geo, _O), get(geo, _TAPS), get(geo, _SHIFTS)
        planes = get(geo, _N) * channels
        for plane in range(planes * t // nt, planes * (t + 1) // nt):
            n = plane // channels
            c = plane - n * channels
            source, filters = x + n * get(geo, _XN) + c // outputs * get(geo, _XC), w + c * get(geo, _W_STEP)
            target = n * get(geo, _YN) + c * get(geo, _YC)
            start = spread(e, load_scalar(e, bias + c * e.size) if bias != 0 else 0.0)
            at, mask = get(geo, _PLACES), get(geo, _MASKS)
            for _ in range(get(geo, _GROUPS)):
                p0, p1, p2, p3 = get(at, 0), get(at, 8), get(at, 16), get(at, 24)
                a0 = a1 = a2 = a3 = start
                for k in range(taps):
                    s = source + load_scalar(INT64, shifts + k * 8)
                    f = spread(e, load_scalar(e, filters + k * e.size))
                    a0 = fma(f, load_where(e, s + p0, mask), a0)
                    a1 = fma(f, load_where(e, s + p1, mask + bits), a1)
                    a2 = fma(f, load_where(e, s + p2, mask + 2 * bits), a2)
                    a3 = fma(f, load_where(e, s + p3, mask + 3 * bits), a3)
                    mask += VECTORS * bits
                to, more = y + target, res + target if res != 0 else 0
                put_vector(a0, to + p0, 0, more + p0 if res != 0 else 0, act)
                put_vector(a1, to + p1, 0, more + p1 if res != 0 else 0, act)
                put_vector(a2, to + p2, 0, more + p2 if res != 0 else 0, act)
                put_vector(a3, to + p3, 0, more + p3 if res != 0 else 0, act)
                at += VECTORS * 8

    def kernel(nt, geo, x, w, y, bias, res, act):
        parallel(nt, body, (geo, x, w, y, bias, res, act))
    return kernel
