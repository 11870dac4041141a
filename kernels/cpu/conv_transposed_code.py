"""Transposed convolution as a product and a sum, as compiled: what each pixel sends to all it reaches, then who receives it.

One product (taps and outputs) × channels × positions reads the image once for all taps, and however few outputs there are, its
tiles are full; its columns, of some rows of the image and some outputs, stay in L2 and are added into rows of the output there
(the explicit col2im has them all; Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning", section 4).
"""

from __future__ import annotations

from typing import Any

from .conv_code import by_width, finisher, get
from .conv_fields import SCATTER
from .engine.pack import packer
from .engine.region import parallel_tasks
from .engine.simd import (
    FLOAT32,
    inline,
    interleave_high,
    interleave_low,
    load,
    load_n,
    load_scalar,
    outline,
    spread,
    store,
    store_n,
    store_scalar,
)
from .engine.tile import Tile, tile_size

ROWS, VECS = tile_size()
(_N, _C, _O, _H, _W, _OH, _OW, _KH, _KW, _SH, _SW, _PH, _PW, _XN, _XC, _YN, _YO, _YH, _BANDS, _PARTS, _GROUP, _DEPTH, _CHAIN,
 _LINE, _AT_STRIP, _AT_COLUMNS, _AT_PACK) = (8 * i for i in range(len(SCATTER)))


def scatter(elem_name: str) -> Any:
    """``conv_fields.SCATTER`` lists what ``geo`` points to; the weight is arranged as rows (output, tap) of channels."""
    e = FLOAT32
    lanes, size = e.lanes, e.size
    pack, finish = packer(e), finisher(e)
    multiply = by_width(*(Tile(e, ROWS, v) for v in (1, 2, 3)))

    @outline
    def columns(geo, x, w, n, o0, o1, fresh, cols, packed):
        """cols = W x for all taps of outputs o0 … o1 at n positions; a tile may have rows beyond. Packs x if ``fresh``"""
        channels, depth, chain, x_c = get(geo, _C), get(geo, _DEPTH), get(geo, _CHAIN), get(geo, _XC)
        vectors = (n + lanes - 1) // lanes
        panels, row = (vectors + VECS - 1) // VECS, vectors * lanes * size
        blocks = ((o1 - o0) * get(geo, _KH) * get(geo, _KW) + ROWS - 1) // ROWS
        w += o0 * get(geo, _KH) * get(geo, _KW) * channels * size
        for k0 in range(0, channels, depth):
            k = min(depth, channels - k0)
            for q in range(panels):
                v = vectors * q // panels
                vecs = vectors * (q + 1) // panels - v
                b, b_k = packed + v * lanes * k * size, vecs * lanes * size
                if fresh or channels > depth:
                    pack(x + k0 * x_c + v * lanes * size, size, x_c, min(vecs * lanes, n - v * lanes), k, b, vecs * lanes)
                c = cols + v * lanes * size
                start, start_row = (c, row) if k0 > 0 else (0, 0)
                multiply(vecs, blocks, k, chain, w + k0 * size, channels * size, size, ROWS * channels * size, b, b_k, start,
                         start_row, ROWS * start_row, c, row, ROWS * row, lanes, b, 0)

    @inline
    def add(d, s, n):
        whole = n - n % lanes
        for j in range(0, whole, lanes):
            store(e, d + j * size, load(e, d + j * size) + load(e, s + j * size))
        if whole < n:
            d, s = d + whole * size, s + whole * size
            store_n(e, d, load_n(e, d, n - whole) + load_n(e, s, n - whole), n - whole)

    @outline
    def collect(geo, y, low, cols, row, lines):
        """Row y of the output, its pixels of each residue of the stride in a line of their own"""
        kw, sh, sw, ow, w, line = get(geo, _KW), get(geo, _SH), get(geo, _SW), get(geo, _OW), get(geo, _W), get(geo, _LINE)
        for j in range(0, sw * line, e.bytes):
            store(e, lines + j, spread(e, 0.0))
        for i in range(get(geo, _KH)):
            h = (y + get(geo, _PH) - i) // sh
            if h * sh == y + get(geo, _PH) - i and h >= 0 and h < get(geo, _H):
                for j in range(kw):
                    ahead = (j - get(geo, _PW)) // sw  # a pixel w goes to place w + ahead of line r
                    r = j - get(geo, _PW) - ahead * sw
                    first, end = max(0, -ahead), min(w, (ow - r + sw - 1) // sw - ahead)
                    if end > first:
                        add(lines + r * line + (first + ahead) * size,
                            cols + (i * kw + j) * row + ((h - low) * w + first) * size, end - first)

    @outline
    def merge(geo, lines, strip):
        """The row from its lines; whole vectors are written"""
        sw, ow, line = get(geo, _SW), get(geo, _OW), get(geo, _LINE)
        if sw == 2:
            for j in range(0, ow, 2 * lanes):
                at = lines + j // 2 * size
                even, odd = load(e, at), load(e, at + line)
                store(e, strip + j * size, interleave_low(even, odd))
                store(e, strip + (j + lanes) * size, interleave_high(even, odd))
        else:
            for j in range(ow):
                store_scalar(e, strip + j * size, load_scalar(e, lines + j % sw * line + j // sw * size))

    @inline
    def body(t, task, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size):
        parts, bands, height, oh, sh, ph = (
            get(geo, _PARTS), get(geo, _BANDS), get(geo, _H), get(geo, _OH), get(geo, _SH), get(geo, _PH))
        width, outputs, group = get(geo, _W), get(geo, _O), get(geo, _GROUP)
        lines = ws + t * ws_size
        strip, cols, packed = lines + get(geo, _AT_STRIP), lines + get(geo, _AT_COLUMNS), lines + get(geo, _AT_PACK)
        part = task % parts
        band = task // parts % bands
        image = task // parts // bands
        first = max(0, min(oh, height * band // bands * sh - ph)) if band > 0 else 0
        end = max(0, min(oh, height * (band + 1) // bands * sh - ph)) if band + 1 < bands else oh
        low = max(0, (first + ph - get(geo, _KH) + sh) // sh)
        n = max(0, min(height, (end - 1 + ph) // sh + 1) - low) * width
        row = (n + lanes - 1) // lanes * lanes * size
        x += image * get(geo, _XN) + low * width * size
        y_at = image * get(geo, _YN)
        fresh = True
        taps, last = get(geo, _KH) * get(geo, _KW), outputs * (part + 1) // parts
        for o0 in range(outputs * part // parts, last, group):
            o1 = min(last, o0 + group)
            if n > 0:
                columns(geo, x, w, n, o0, o1, fresh, cols, packed)
                fresh = False
            for o in range(o0, o1):
                for line in range(first, end):
                    collect(geo, line, low, cols + (o - o0) * taps * row, row, lines)
                    source = lines
                    if get(geo, _SW) > 1:
                        merge(geo, lines, strip)
                        source = strip
                    at = y_at + o * get(geo, _YO) + line * get(geo, _YH)
                    finish(get(geo, _OW), source, y + at, size, bias + o * size if bias != 0 else 0, 0,
                           res + at if res != 0 else 0, act, p0, p1)

    def kernel(nt, geo, x, w, y, bias, res, act, ws, ws_size, p0, p1):
        parallel_tasks(nt, get(geo, _N) * get(geo, _BANDS) * get(geo, _PARTS), body,
                       (geo, x, w, y, bias, res, act, p0, p1, ws, ws_size))
    return kernel
