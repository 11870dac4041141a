"""Convolution of small groups in planes, as compiled: the image is padded once, and every tap is an offset into it.

A group of a few channels is too narrow to pay for packing its columns: they are as many as its outputs. So a group's planes, of
a band of rows, are copied with their margin, and positions are numbered through margins and all: then what a tap sees of any
stretch of positions lies next to each other, and the register tile reads it there by a table of offsets. What it computes at
margins is left where it is.
"""

from __future__ import annotations

from typing import Any

from .conv_code import finisher, get
from .conv_fields import DIRECT
from .engine.region import parallel_tasks
from .engine.simd import FLOAT32, inline, load, load_n, outline, spread, store, store_n
from .engine.tile import Tile, multiply_blocks

ROWS, VECS = 4, 3
(_N, _G, _C, _O, _H, _W, _OH, _OW, _PH, _PW, _DEEP, _XN, _XC, _XH, _YN, _YO, _YH, _K, _TABLE, _CHAIN, _BAND, _BANDS, _PITCH,
 _PLANE, _SUMS, _AT_SUMS) = (8 * i for i in range(len(DIRECT)))


def direct(elem_name: str) -> Any:
    """Stride 1, outputs of a group a multiple of four; ``conv_fields.DIRECT`` lists what ``geo`` points to."""
    e = FLOAT32
    lanes, size = e.lanes, e.size
    finish = finisher(e)
    t1, t2, t3 = (Tile(e, ROWS, v, table=True) for v in (1, 2, 3))

    @outline
    def pad(geo, x, first, rows, dst):
        """The group's planes from row ``first`` of the padded image on, so many rows of them"""
        pitch, w, height, plane = get(geo, _PITCH), get(geo, _W), get(geo, _H), get(geo, _PLANE)
        whole = w - w % lanes
        for _ in range(get(geo, _C)):
            for j in range(0, plane, e.bytes):
                store(e, dst + j, spread(e, 0.0))
            for r in range(max(0, get(geo, _PH) - first), min(rows, height + get(geo, _PH) - first)):
                s, d = x + (first + r - get(geo, _PH)) * get(geo, _XH), dst + (r * pitch + get(geo, _PW)) * size
                for j in range(0, whole, lanes):
                    store(e, d + j * size, load(e, s + j * size))
                if whole < w:
                    store_n(e, d + whole * size, load_n(e, s + whole * size, w - whole), w - whole)
            x += get(geo, _XC)
            dst += plane

    @outline
    def products(geo, w, n, image, sums):
        """All outputs of the group at n positions"""
        k, row = get(geo, _K), get(geo, _SUMS)
        vectors = (n + lanes - 1) // lanes
        panels = (vectors + VECS - 1) // VECS
        for q in range(panels):
            v = vectors * q // panels
            vecs = vectors * (q + 1) // panels - v
            b = image + v * e.bytes
            rest = (get(geo, _O) // ROWS, k, get(geo, _CHAIN), w, k * size, size, ROWS * k * size, b, get(geo, _TABLE), 0, 0, 0,
                    sums + v * e.bytes, row, ROWS * row, lanes, b, 0)
            if vecs == 3:
                multiply_blocks(t3, *rest)
            elif vecs == 2:
                multiply_blocks(t2, *rest)
            else:
                multiply_blocks(t1, *rest)

    @inline
    def body(t, task, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size):
        groups, bands, outputs, pitch = get(geo, _G), get(geo, _BANDS), get(geo, _O), get(geo, _PITCH)
        image, sums = ws + t * ws_size, ws + t * ws_size + get(geo, _AT_SUMS)
        number = task // bands
        first = (task - number * bands) * get(geo, _BAND)
        rows = min(get(geo, _BAND), get(geo, _OH) - first)
        i = number // groups
        g = number - i * groups
        pad(geo, x + i * get(geo, _XN) + g * get(geo, _C) * get(geo, _XC), first, rows + get(geo, _DEEP), image)
        products(geo, w + g * outputs * get(geo, _K) * size, (rows - 1) * pitch + get(geo, _OW), image, sums)
        ow = get(geo, _OW)
        # a short row may be written with a whole vector where the next one, which follows it in memory, comes after
        spills = 2 * ow >= lanes and get(geo, _YH) == ow * size
        for o in range(outputs):
            channel = g * outputs + o
            for r in range(rows):
                at = i * get(geo, _YN) + channel * get(geo, _YO) + (first + r) * get(geo, _YH)
                finish(max(lanes, ow) if spills and r + 1 < rows else ow, sums + o * get(geo, _SUMS) + r * pitch * size, y + at, size,
                       bias + channel * size if bias != 0 else 0, 0, res + at if res != 0 else 0, act, p0, p1)

    def kernel(nt, geo, x, w, y, bias, res, act, ws, ws_size, p0, p1):
        parallel_tasks(nt, get(geo, _N) * get(geo, _G) * get(geo, _BANDS), body,
                       (geo, x, w, y, bias, res, act, p0, p1, ws, ws_size))
    return kernel
