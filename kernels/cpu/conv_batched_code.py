"""Convolution of many short sequences, as compiled: a vector holds the same position of as many sequences.

So sequences fill vectors however short they are, and taps that lie before a sequence or behind it are left out, position by
position: of a filter of 64 taps over 8 positions, padded to keep the length, seven of eight. A task turns a band of positions of
some channels round, with its margin, each residue of the stride apart; then every tap is an offset. The weight is arranged by
slices of channels and in these tap by tap, so that the taps a position meets are one stretch of k.
"""

from __future__ import annotations

from typing import Any

from .conv_code import by_width, copier, finisher, get
from .conv_direct_code import VECS, gatherer
from .conv_fields import BATCHED
from .engine.pack import packer
from .engine.region import parallel_tasks
from .engine.simd import FLOAT32, inline, outline
from .engine.tile import Tile, tile_size

(_N, _C, _O, _L, _OL, _STEP, _PAD, _GAP, _XN, _XC, _YN, _YO, _TAPS, _TABLE, _LAST_TABLE, _CHAIN, _SLICE, _BAND, _BANDS, _PART,
 _PARTS, _BLOCK, _BLOCKS, _RESIDUES, _DEEP, _PITCH, _PLANE, _SUMS, _AT_SUMS, _TURNED, _AT_TURNED, _AT_PANEL) = (
    8 * i for i in range(len(BATCHED)))


def batched(elem_name: str) -> Any:
    """Outputs a multiple of the tile's rows; ``conv_fields.BATCHED`` lists what ``geo`` points to."""
    e = FLOAT32
    lanes, size = e.lanes, e.size
    tile_rows = tile_size()[0]
    finish, pack = finisher(e), packer(e)
    zeros, _ = copier(e)
    gather = gatherer(e)
    tiles = by_width(*(Tile(e, tile_rows, v) for v in (1, 2, 3)))

    @outline
    def turn(geo, x, many, channels, first, rows, dst):
        """Planes [channel][residue][position][sequence]: so many rows, for outputs from ``first`` on"""
        step, pitch, n = get(geo, _STEP), get(geo, _PITCH) * size, get(geo, _L)
        for c in range(channels):
            for r in range(get(geo, _RESIDUES)):
                top = first * step + r - get(geo, _PAD)
                i0 = min(rows, (step - 1 - top) // step) if top < 0 else 0
                i1 = max(i0, min(rows, (n - top + step - 1) // step)) if n > top else i0
                zeros(dst, i0 * get(geo, _PITCH))
                if i1 > i0:
                    pack(x + c * get(geo, _XC) + (top + i0 * step) * size, get(geo, _XN), step * size, many, i1 - i0,
                         dst + i0 * pitch, get(geo, _PITCH))
                zeros(dst + i1 * pitch, (rows - i1) * get(geo, _PITCH))
                dst += get(geo, _PLANE)

    @outline
    def products(geo, w, blocks, channels, table, more, first, positions, planes, sums, panel):
        """So many blocks of outputs at positions from ``first`` on, added to what is there if ``more``"""
        pitch, row, taps, gap = get(geo, _PITCH), get(geo, _SUMS), get(geo, _TAPS), get(geo, _GAP)
        w_row = taps * channels * size
        vectors = positions * pitch // lanes
        panels = (vectors + VECS - 1) // VECS
        for q in range(panels):
            v = vectors * q // panels
            vecs = vectors * (q + 1) // panels - v
            # The taps that the first or the last of these positions meets
            low = (first + v * lanes // pitch) * get(geo, _STEP) - get(geo, _PAD)
            high = (first + ((v + vecs) * lanes - 1) // pitch) * get(geo, _STEP) - get(geo, _PAD)
            t0 = min(taps, (gap - 1 - high) // gap) if high < 0 else 0
            t1 = max(t0, min(taps, (get(geo, _L) - 1 - low) // gap + 1))
            c = sums + v * e.bytes
            start, start_row = (c, row) if more else (0, 0)
            if t1 > t0 or not more:
                a, k = w + t0 * channels * size, (t1 - t0) * channels
                gather(planes + v * e.bytes, table + t0 * channels * 8, k, vecs, panel)
                tiles(vecs, blocks, k, get(geo, _CHAIN), a, w_row, size, tile_rows * w_row, panel, vecs * e.bytes, start,
                      start_row, tile_rows * start_row, c, row, tile_rows * row, lanes, a, 0)

    @inline
    def body(t, task, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size):
        bands, parts, channels, taps = get(geo, _BANDS), get(geo, _PARTS), get(geo, _C), get(geo, _TAPS)
        planes = ws + t * ws_size
        sums, turned, panel = (planes + get(geo, _AT_SUMS), planes + get(geo, _AT_TURNED), planes + get(geo, _AT_PANEL))
        first, o0 = task % bands * get(geo, _BAND), task // bands % parts * get(geo, _PART)
        n0 = task // bands // parts * get(geo, _BLOCK)
        positions, outputs = min(get(geo, _BAND), get(geo, _OL) - first), min(get(geo, _PART), get(geo, _O) - o0)
        many = min(get(geo, _BLOCK), get(geo, _N) - n0)
        c0 = 0
        while c0 < channels:
            cs = min(get(geo, _SLICE), channels - c0)
            turn(geo, x + n0 * get(geo, _XN) + c0 * get(geo, _XC), many, cs, first, positions + get(geo, _DEEP), planes)
            products(geo, w + (get(geo, _O) * c0 + o0 * cs) * taps * size, outputs // tile_rows, cs,
                     get(geo, _TABLE if cs == get(geo, _SLICE) else _LAST_TABLE), c0 > 0, first, positions, planes, sums,
                     panel)
            c0 += cs
        width = get(geo, _TURNED)
        for o in range(outputs):
            pack(sums + o * get(geo, _SUMS), get(geo, _PITCH) * size, size, positions, many, turned, width)
            at = n0 * get(geo, _YN) + (o0 + o) * get(geo, _YO) + first * size
            for n in range(many):
                finish(positions, turned + n * width * size, y + at, size, bias + (o0 + o) * size if bias != 0 else 0, 0,
                       res + at if res != 0 else 0, act, p0, p1)
                at += get(geo, _YN)

    def kernel(nt, geo, x, w, y, bias, res, act, ws, ws_size, p0, p1):
        parallel_tasks(nt, get(geo, _BLOCKS) * get(geo, _PARTS) * get(geo, _BANDS), body,
                       (geo, x, w, y, bias, res, act, p0, p1, ws, ws_size))
    return kernel
