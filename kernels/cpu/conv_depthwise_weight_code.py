"""The gradient of a depthwise convolution's weight, as compiled: each tap is a product of the gradient with a shifted image.

Nine taps at a time have their sums in registers: a vector of the gradient is loaded once, and one of the image for each tap.
Both ways copy a part of the image with its padding first, so that no tap leaves it, a few rows at a time, which are then in L1.

* ``planes`` (channels first): vectors along w, one channel after the other.
* ``pixels`` (channels last): a vector of channels after the other; what the parts of the image hold are vectors. Short rows of
  planes are turned into such vectors, for in vectors along w they would leave lanes idle.

A chain of sums ends with those few rows (CHAIN numbers, or one row of the image).
"""

from __future__ import annotations

from typing import Any

from .conv_code import (
    _AT_OUTS,
    _AT_PACK,
    _AT_SUMS,
    _D,
    _DEPTH,
    _G,
    _H,
    _N,
    _O,
    _OD,
    _OH,
    _OW,
    _SD,
    _SH,
    _SW,
    _TAP,
    _TAPS,
    _W,
    _WIDTH,
    _XC,
    _XD,
    _XH,
    _XN,
    _XW,
    _YD,
    _YH,
    _YN,
    _YO,
    _YW,
    get,
    put,
)
from .conv_depthwise_code import bands, extent
from .engine.pack import packer
from .engine.region import parallel
from .engine.simd import (
    ELEMS,
    compute_elem,
    fma,
    inline,
    load,
    load_n,
    load_scalar,
    outline,
    reduce_add,
    spread,
    store,
    store_scalar,
)

NINE = 9


def depthwise_weight(elem_name: str) -> Any:
    """All kinds in one kernel: 0 planes, 1 pixels, 2 planes turned into pixels."""
    e = ELEMS[elem_name]
    p = compute_elem(e)
    lanes, ps, size = p.lanes, p.size, e.size
    lay_out, copy_band = bands(e)
    pack = packer(e)

    @outline
    def nine(table, at, row, step, g, g_row, g_step, rows, whole, more, n, sums):
        """Adds to the sums of nine taps those of ``rows`` rows of positions: of whole vectors, then of some of n lanes"""
        o0, o1, o2 = get(table, 0), get(table, 8), get(table, 16)
        o3, o4, o5 = get(table, 24), get(table, 32), get(table, 40)
        o6, o7, o8 = get(table, 48), get(table, 56), get(table, 64)
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = a8 = spread(p, 0.0)
        for _ in range(rows):
            s, q = at, g
            for _ in range(whole):
                v = load(e, q)
                a0, a1, a2 = fma(v, load(p, s + o0), a0), fma(v, load(p, s + o1), a1), fma(v, load(p, s + o2), a2)
                a3, a4, a5 = fma(v, load(p, s + o3), a3), fma(v, load(p, s + o4), a4), fma(v, load(p, s + o5), a5)
                a6, a7, a8 = fma(v, load(p, s + o6), a6), fma(v, load(p, s + o7), a7), fma(v, load(p, s + o8), a8)
                s += step
                q += g_step
            for _ in range(more):
                v = load_n(e, q, n)
                a0, a1 = fma(v, load_n(p, s + o0, n), a0), fma(v, load_n(p, s + o1, n), a1)
                a2, a3 = fma(v, load_n(p, s + o2, n), a2), fma(v, load_n(p, s + o3, n), a3)
                a4, a5 = fma(v, load_n(p, s + o4, n), a4), fma(v, load_n(p, s + o5, n), a5)
                a6, a7 = fma(v, load_n(p, s + o6, n), a6), fma(v, load_n(p, s + o7, n), a7)
                a8 = fma(v, load_n(p, s + o8, n), a8)
                s += step
                q += g_step
            at += row
            g += g_row
        b = p.bytes
        store(p, sums, load(p, sums) + a0)
        store(p, sums + b, load(p, sums + b) + a1)
        store(p, sums + 2 * b, load(p, sums + 2 * b) + a2)
        store(p, sums + 3 * b, load(p, sums + 3 * b) + a3)
        store(p, sums + 4 * b, load(p, sums + 4 * b) + a4)
        store(p, sums + 5 * b, load(p, sums + 5 * b) + a5)
        store(p, sums + 6 * b, load(p, sums + 6 * b) + a6)
        store(p, sums + 7 * b, load(p, sums + 7 * b) + a7)
        store(p, sums + 8 * b, load(p, sums + 8 * b) + a8)

    @inline
    def all_taps(geo, table, at, row, step, g, g_row, rows, g_step, whole, more, n, sums):
        for t in range(0, get(geo, _TAPS), NINE):
            nine(table + t * 8, at, row, step, g, g_row, g_step, rows, whole, more, n, sums + t * p.bytes)

    @inline
    def clear(sums, taps):
        for t in range((taps + NINE - 1) // NINE * NINE):
            store(p, sums + t * p.bytes, spread(p, 0.0))

    @outline
    def planes(geo, first, end, x, out, grad, ws):
        """The filters of outputs first … end"""
        ow, oh, taps, depth, few, sh = (get(geo, _OW), get(geo, _OH), get(geo, _TAPS), get(geo, _DEPTH), get(geo, _WIDTH),
                                        get(geo, _SH))
        table, sums, band = ws, ws + get(geo, _AT_OUTS), ws + get(geo, _AT_PACK)
        about = table + (taps + NINE) * 8
        row = lay_out(geo, table, about, band)
        for t in range(taps, (taps + NINE - 1) // NINE * NINE):
            put(table, t * 8, get(table, 0))
        for c in range(first, end):
            clear(sums, taps)
            for image in range(get(geo, _N)):
                xc = x + image * get(geo, _XN) + c // get(geo, _O) * get(geo, _XC)
                for d in range(get(geo, _OD)):
                    g = grad + image * get(geo, _YN) + c * get(geo, _YO) + d * get(geo, _YD)
                    for h0 in range(0, oh, depth):
                        upto, done = min(oh, h0 + depth), 0
                        for h in range(h0, upto, few):
                            rows = min(few, upto - h)
                            done = copy_band(geo, about, xc, d, h0, h + rows - h0, done, band, row)
                            all_taps(geo, table, band + (h - h0) * sh * row, sh * row, p.bytes, g + h * get(geo, _YH),
                                     get(geo, _YH), rows, e.bytes, ow // lanes, 1 if ow % lanes > 0 else 0, ow % lanes, sums)
            for t in range(taps):
                store_scalar(e, out + (c * taps + t) * size, reduce_add(load(p, sums + t * p.bytes)))

    @outline
    def turn(src, s_c, s_row, s_w, n, rows, width, dst):
        """n channels of rows of planes as vectors of channels, one position behind the other"""
        if s_row == width * s_w:
            pack(src, s_c, s_w, n, rows * width, dst, lanes)
        else:
            for i in range(rows):
                pack(src + i * s_row, s_c, s_w, n, width, dst + i * width * p.bytes, lanes)

    @outline
    def copy_pixels(geo, turned, x, d, h, n, done, n_lanes, dst, dst_size, rows, part, buffer):
        """As copy_band, for one vector of channels, or two, whose parts of the image are dst_size apart: (deep, rows, part)
        vectors; n_lanes are those of the only vector, or 0"""
        td, th, tw, deep = extent(geo, 0, True), extent(geo, 8, True), extent(geo, 16, True), extent(geo, 0, False)
        used, b = (n - 1) * get(geo, _SH) + extent(geo, 8, False), p.bytes
        xh, xw, width = get(geo, _XH), get(geo, _XW), get(geo, _W)
        z, y0 = d * get(geo, _SD) + td, h * get(geo, _SH) + th
        before = min(part, max(0, -tw))
        upto = max(before, min(part, width - tw))
        low, high = max(0, y0 + done), min(get(geo, _H), y0 + used)  # rows of the image
        for i in range(deep):
            there = z + i >= 0 and z + i < get(geo, _D)
            source, s_row, s_w = x + (z + i) * get(geo, _XD), xh, xw
            if turned and there and high > low:
                turn(source + low * xh, get(geo, _XC), xh, xw, n_lanes, high - low, width, buffer)
                source, s_row, s_w = buffer - low * width * b, width * b, b
            for r in range(done, used):
                to = dst + (i * rows + r) * part * b
                inside = there and y0 + r >= 0 and y0 + r < get(geo, _H)
                first, end = (before, upto) if inside else (part, part)
                s = source + (y0 + r) * s_row + (tw + before) * s_w
                for j in range(first):
                    store(p, to + j * b, spread(p, 0.0))
                if n_lanes == 0:
                    for j in range(first):
                        store(p, to + dst_size + j * b, spread(p, 0.0))
                    for j in range(first, end):
                        store(p, to + j * b, load(e, s))
                        store(p, to + dst_size + j * b, load(e, s + e.bytes))
                        s += s_w
                    for j in range(end, part):
                        store(p, to + dst_size + j * b, spread(p, 0.0))
                elif n_lanes == lanes or turned:
                    for j in range(first, end):
                        store(p, to + j * b, load(e, s))
                        s += s_w
                else:
                    for j in range(first, end):
                        store(p, to + j * b, load_n(e, s, n_lanes))
                        s += s_w
                for j in range(end, part):
                    store(p, to + j * b, spread(p, 0.0))
        return max(done, used)

    @outline
    def pixels(geo, turned, first, end, x, out, grad, ws):
        """The filters of channel vectors first … end; ``turned``: of planes"""
        channels, ow, oh, taps, depth = get(geo, _G), get(geo, _OW), get(geo, _OH), get(geo, _TAPS), get(geo, _DEPTH)
        few, sh = get(geo, _WIDTH), get(geo, _SH)
        table, sums, band, buffer = ws, ws + get(geo, _AT_OUTS), ws + get(geo, _AT_PACK), ws + get(geo, _AT_SUMS)
        rows, part = (depth - 1) * sh + extent(geo, 8, False), (ow - 1) * get(geo, _SW) + extent(geo, 16, False)
        row, all_sums = part * p.bytes, (taps + NINE - 1) // NINE * NINE * p.bytes
        size_of = rows * row * extent(geo, 0, False)
        for t in range((taps + NINE - 1) // NINE * NINE):
            tap = get(geo, _TAP) + (t if t < taps else 0) * 24
            put(table, t * 8, ((get(tap, 0) - extent(geo, 0, True)) * rows + get(tap, 8) - extent(geo, 8, True)) * row
                + (get(tap, 16) - extent(geo, 16, True)) * p.bytes)
        c, c_end = first * lanes, min(channels, end * lanes)
        while c < c_end:
            vectors = 2 if c_end - c >= 2 * lanes and not turned else 1
            n = min(lanes, c_end - c)
            whole, more = (ow, 0) if n == lanes or turned else (0, ow)
            clear(sums, taps)
            clear(sums + all_sums, taps)
            for image in range(get(geo, _N)):
                xc = x + image * get(geo, _XN) + c * get(geo, _XC)
                for d in range(get(geo, _OD)):
                    gd = grad + image * get(geo, _YN) + c * get(geo, _YO) + d * get(geo, _YD)
                    for h0 in range(0, oh, depth):
                        upto, done = min(oh, h0 + depth), 0
                        for h in range(h0, upto, few):
                            many = min(few, upto - h)
                            done = copy_pixels(geo, turned, xc, d, h0, h + many - h0, done, n if vectors == 1 else 0, band,
                                               size_of, rows, part, buffer)
                            g, g_row, g_step = gd + h * get(geo, _YH), get(geo, _YH), get(geo, _YW)
                            if turned:
                                turn(g, get(geo, _YO), g_row, g_step, n, many, ow, buffer)
                                g, g_row, g_step = buffer, ow * p.bytes, p.bytes
                            for v in range(vectors):
                                all_taps(geo, table, band + v * size_of + (h - h0) * sh * row, sh * row,
                                         get(geo, _SW) * p.bytes, g + v * e.bytes, g_row, many, g_step, whole, more, n,
                                         sums + v * all_sums)
            for v in range(vectors):
                for i in range(n):
                    for t in range(taps):
                        store_scalar(e, out + ((c + v * lanes + i) * taps + t) * size,
                                     load_scalar(p, sums + v * all_sums + t * p.bytes + i * ps))
            c += vectors * lanes

    @inline
    def body(t, nt, kind, geo, x, out, grad, ws, ws_size):
        mine = ws + t * ws_size
        if kind == 0:
            n = get(geo, _G) * get(geo, _O)
            planes(geo, n * t // nt, n * (t + 1) // nt, x, out, grad, mine)
        else:
            n = (get(geo, _G) + lanes - 1) // lanes
            pixels(geo, kind == 2, n * t // nt, n * (t + 1) // nt, x, out, grad, mine)

    def kernel(nt, kind, geo, x, out, grad, ws, ws_size):
        parallel(nt, body, (kind, geo, x, out, grad, ws, ws_size))
    return kernel
