"""Convolution of planes from a padded copy of them, as compiled: every tap is an offset into it.

A band of rows of some channels is copied with its margin, and each residue of the stride becomes a plane of its own: then what a
tap sees of neighbouring positions are neighbours. Positions are numbered through margins and all, so rows however short fill
vectors, and nobody asks where the image ends; what is computed at margins is left where it is. For a group of few outputs the
register tile reads the planes in place, by a table of offsets; for many a panel is copied out of them first, and read aligned.
"""

from __future__ import annotations

from typing import Any

from .conv_code import by_width, copier, finisher, get
from .conv_fields import DIRECT
from .engine.region import parallel_tasks
from .engine.simd import FLOAT32, INT64, even_lanes, inline, load, load_scalar, outline, store
from .engine.tile import Tile

ROWS, VECS = 4, 3
(_N, _G, _C, _O, _H, _W, _OH, _OW, _SH, _SW, _PH, _PW, _UH, _UW, _DEEP, _WIDE, _XN, _XC, _XH, _YN, _YO, _YH, _TAPS, _TABLE,
 _CHAIN, _SLICE, _BAND, _BANDS, _SEG, _SEGS, _PART, _PARTS, _COPIED, _PITCH, _PLANE, _SUMS, _AT_SUMS, _AT_PANEL) = (
    8 * i for i in range(len(DIRECT)))


def gatherer(e: Any) -> Any:
    """gather(image, table, k, vecs, panel): a panel, for each k so many vectors of the planes"""
    @outline
    def gather(image, table, k, vecs, panel):
        if vecs == VECS:
            for i in range(k):
                s = image + load_scalar(INT64, table + i * 8)
                a, b, c = load(e, s), load(e, s + e.bytes), load(e, s + 2 * e.bytes)
                store(e, panel, a)
                store(e, panel + e.bytes, b)
                store(e, panel + 2 * e.bytes, c)
                panel += VECS * e.bytes
        else:
            for i in range(k):
                s = image + load_scalar(INT64, table + i * 8)
                for j in range(0, vecs * e.bytes, e.bytes):
                    store(e, panel + j, load(e, s + j))
                panel += vecs * e.bytes
    return gather


def padder(e: Any) -> tuple[Any, Any]:
    """place and pad, which copy pixels between zeros"""
    lanes, size = e.lanes, e.size
    zeros, copy = copier(e)

    @outline
    def clear(d, pitch, rows, n, many, d_step):
        """n zeros in each of so many rows of many planes"""
        for _ in range(many if rows > 0 else 0):
            row = d
            for _ in range(rows):
                zeros(row, n)
                row += pitch
            d += d_step

    def placer(step: int) -> Any:
        """Pixels that are so far apart (0: as the argument says)"""
        @inline
        def run(row, pitch, source, s_row, rows, before, n, after, steps):
            for _ in range(rows):
                to = row + before * size
                if before > 0:
                    zeros(row, before)
                if step == 1:
                    for j in range(0, n, lanes):
                        store(e, to + j * size, load(e, source + j * size))
                elif step == 2:
                    for j in range(0, n, lanes):
                        at = source + 2 * j * size
                        store(e, to + j * size, even_lanes(load(e, at), load(e, at + e.bytes)))
                else:
                    copy(to, source, n, steps * size)
                if after > 0:
                    zeros(to + n * size, after)
                row += pitch
                source += s_row
        return run

    place1, place2, place_any = placer(1), placer(2), placer(0)

    @outline
    def place(d, pitch, s, s_row, rows, before, n, after, step, many, d_step, s_step, end):
        """n pixels, ``step`` apart, between zeros, in each of so many rows of many planes. Whole vectors are written, and read
        where that stays before ``end``"""
        for _ in range(many):
            rest = d, pitch, s, s_row, rows, before, n, after, step
            near = s + (rows - 1) * s_row + (n + lanes) * step * size <= end
            if near and step == 2:
                place2(*rest)
            elif near and step == 1:
                place1(*rest)
            else:
                place_any(*rest)
            d += d_step
            s += s_step

    @outline
    def pad(geo, x, end, channels, row0, rows, col0, n, dst):
        """Planes [channel][residue of the rows][of the columns]: so many rows, of n pixels, for outputs from row0, col0 on"""
        sh, sw, h, w, pitch = get(geo, _SH), get(geo, _SW), get(geo, _H), get(geo, _W), get(geo, _PITCH) * size
        xh, xc, plane = get(geo, _XH), get(geo, _XC), get(geo, _PLANE)
        step = get(geo, _UH) * get(geo, _UW) * plane
        for rh in range(get(geo, _UH)):
            top = row0 * sh + rh - get(geo, _PH)
            i0 = min(rows, (sh - 1 - top) // sh) if top < 0 else 0
            i1 = max(i0, min(rows, (h - top + sh - 1) // sh)) if h > top else i0
            for rw in range(get(geo, _UW)):
                left = col0 * sw + rw - get(geo, _PW)
                j0 = min(n, (sw - 1 - left) // sw) if left < 0 else 0
                j1 = max(j0, min(n, (w - left + sw - 1) // sw)) if w > left else j0
                clear(dst, pitch, i0, n, channels, step)
                if i1 > i0:
                    place(dst + i0 * pitch, pitch, x + (top + i0 * sh) * xh + (left + j0 * sw) * size, sh * xh, i1 - i0, j0,
                          j1 - j0, n - j1, sw, channels, step, xc, end)
                clear(dst + i1 * pitch, pitch, rows - i1, n, channels, step)
                dst += plane

    return place, pad


def direct(elem_name: str) -> Any:
    """Outputs of a group a multiple of four; ``conv_fields.DIRECT`` lists what ``geo`` points to."""
    e = FLOAT32
    lanes, size = e.lanes, e.size
    finish = finisher(e)
    _, pad = padder(e)
    gather = gatherer(e)
    in_place, copied = (by_width(*(Tile(e, ROWS, v, table=table) for v in (1, 2, 3))) for table in (True, False))

    @outline
    def products(geo, w, blocks, k, more, n, image, sums, panel):
        """So many blocks of outputs at n positions, k products each, added to what is there if ``more``"""
        w_row, row, table = get(geo, _C) * get(geo, _TAPS) * size, get(geo, _SUMS), get(geo, _TABLE)
        vectors = (n + lanes - 1) // lanes
        panels = (vectors + VECS - 1) // VECS
        for q in range(panels):
            v = vectors * q // panels
            vecs = vectors * (q + 1) // panels - v
            b, c = image + v * e.bytes, sums + v * e.bytes
            start, start_row = (c, row) if more else (0, 0)
            rest = start, start_row, ROWS * start_row, c, row, ROWS * row, lanes, w, 0
            if get(geo, _COPIED):
                gather(b, table, k, vecs, panel)
                copied(vecs, blocks, k, get(geo, _CHAIN), w, w_row, size, ROWS * w_row, panel, vecs * e.bytes, *rest)
            else:
                in_place(vecs, blocks, k, get(geo, _CHAIN), w, w_row, size, ROWS * w_row, b, table, *rest)

    @inline
    def body(t, task, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size):
        groups, bands, segs, parts, pitch = get(geo, _G), get(geo, _BANDS), get(geo, _SEGS), get(geo, _PARTS), get(geo, _PITCH)
        outputs, channels, taps, ow = get(geo, _O), get(geo, _C), get(geo, _TAPS), get(geo, _OW)
        image = ws + t * ws_size
        sums, panel = image + get(geo, _AT_SUMS), image + get(geo, _AT_PANEL)
        part = task % parts
        seg = task // parts % segs
        band = task // parts // segs % bands
        g = task // parts // segs // bands % groups
        i = task // parts // segs // bands // groups
        row0, col0, o0 = band * get(geo, _BAND), seg * get(geo, _SEG), g * outputs + part * get(geo, _PART)
        rows, cols = min(get(geo, _BAND), get(geo, _OH) - row0), min(get(geo, _SEG), ow - col0)
        many = min(get(geo, _PART), (g + 1) * outputs - o0)
        end = x + ((get(geo, _N) - 1) * get(geo, _XN) + (groups * channels - 1) * get(geo, _XC)
                   + (get(geo, _H) - 1) * get(geo, _XH) + get(geo, _W) * size)
        c0 = 0
        while c0 < channels:
            cs = min(get(geo, _SLICE), channels - c0)
            pad(geo, x + i * get(geo, _XN) + (g * channels + c0) * get(geo, _XC), end, cs, row0, rows + get(geo, _DEEP), col0,
                cols + get(geo, _WIDE), image)
            products(geo, w + (o0 * channels + c0) * taps * size, many // ROWS, cs * taps, c0 > 0, (rows - 1) * pitch + cols,
                     image, sums, panel)
            c0 += cs
        # a short row may be written with a whole vector where the next one, which follows it in memory, comes after
        spills = 2 * ow >= lanes and get(geo, _YH) == ow * size and cols == ow
        for o in range(many):
            for r in range(rows):
                at = i * get(geo, _YN) + (o0 + o) * get(geo, _YO) + (row0 + r) * get(geo, _YH) + col0 * size
                finish(max(lanes, cols) if spills and r + 1 < rows else cols, sums + o * get(geo, _SUMS) + r * pitch * size,
                       y + at, size, bias + (o0 + o) * size if bias != 0 else 0, 0, res + at if res != 0 else 0, act, p0, p1)

    def kernel(nt, geo, x, w, y, bias, res, act, ws, ws_size, p0, p1):
        parallel_tasks(nt, get(geo, _N) * get(geo, _G) * get(geo, _BANDS) * get(geo, _SEGS) * get(geo, _PARTS), body,
                       (geo, x, w, y, bias, res, act, p0, p1, ws, ws_size))
    return kernel
