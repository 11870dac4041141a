"""Depthwise convolution, as compiled: each channel has filters of its own, so there is no product to make of it.

Memory sets the pace, and vectors run along what lies next to each other: along w with channels first, along the channels with
channels last. The problem is described as in ``conv_code``, so strides, dilation and the phases of a transposed convolution
are the same thing here as there.

* ``planes``: a band of the image is copied with its padding (and, for a stride, its columns sorted by remainder), so that
  the loop over taps reads whole vectors and asks nothing.
* ``pixels``: four positions next to each other share a vector of weights; positions whose taps leave the image go one by one.
* the gradients of the weight do the same, with the sums of one band or row added to the total at its end, so that chains stay
  short.
"""

from __future__ import annotations

from typing import Any

from .conv_code import (
    _AT_OUTS,
    _AT_PACK,
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
    _WK,
    _WR,
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
    copier,
    finisher,
    get,
    put,
)
from .engine.region import parallel
from .engine.simd import (
    ELEMS,
    INT64,
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
    wide,
)

FOUR = 4


def depthwise(elem_name: str) -> Any:
    """The four kinds in one kernel, as ``convolution``."""
    e = ELEMS[elem_name]
    p = compute_elem(e)
    quad = wide(p, FOUR)
    lanes, ps, size = p.lanes, p.size, e.size
    zeros, copy_stepped = copier(e)
    finish = finisher(e)

    @inline
    def extent(geo, field, low):
        """(least, number) of the taps' offsets along a dimension"""
        taps = get(geo, _TAP)
        a = b = get(taps, field) if get(geo, _TAPS) > 0 else 0
        for t in range(1, get(geo, _TAPS)):
            a, b = min(a, get(taps + t * 24, field)), max(b, get(taps + t * 24, field))
        return a if low else b - a + 1

    @outline
    def lay_out(geo, table):
        """The table of where a tap's first element lies in a copied band, then the taps' extents; returns bytes of a row"""
        td, th, tw = extent(geo, 0, True), extent(geo, 8, True), extent(geo, 16, True)
        rows, sw = (get(geo, _DEPTH) - 1) * get(geo, _SH) + extent(geo, 8, False), get(geo, _SW)
        at = table + get(geo, _TAPS) * 8
        put(at, 0, td)
        put(at, 8, th)
        put(at, 16, tw)
        put(at, 24, extent(geo, 0, False))
        put(at, 32, extent(geo, 8, False))
        over = FOUR * lanes if get(geo, _OW) > lanes else lanes  # what a block of vectors may read past the last position
        part = (get(geo, _OW) + over + (extent(geo, 16, False) - 1) // sw) * ps
        for t in range(get(geo, _TAPS)):
            tap = get(geo, _TAP) + t * 24
            w = get(tap, 16) - tw
            put(table, t * 8, ((get(tap, 0) - td) * rows + get(tap, 8) - th) * part * sw + w % sw * part + w // sw * ps)
        return part * sw

    @outline
    def copy_band(geo, table, x, d, h, n, dst, row):
        """The padded rows that n rows of positions from (d, h) on meet"""
        at = table + get(geo, _TAPS) * 8
        td, th, tw, deep, high = get(at, 0), get(at, 8), get(at, 16), get(at, 24), get(at, 32)
        sw, xw = get(geo, _SW), get(geo, _XW)
        rows, used = (get(geo, _DEPTH) - 1) * get(geo, _SH) + high, (n - 1) * get(geo, _SH) + high
        part = row // (sw * ps)
        for i in range(deep):
            z = d * get(geo, _SD) + td + i
            for j in range(used):
                y = h * get(geo, _SH) + th + j
                for f in range(sw):
                    to = dst + (i * rows + j) * row + f * part * ps
                    before = upto = 0
                    if z >= 0 and z < get(geo, _D) and y >= 0 and y < get(geo, _H):
                        w = tw + f
                        before = min(part, (sw - 1 - w) // sw) if w < 0 else 0
                        upto = max(before, min(part, (get(geo, _W) - w + sw - 1) // sw)) if w < get(geo, _W) else before
                        zeros(to, before)
                        copy_stepped(to + before * ps, x + z * get(geo, _XD) + y * get(geo, _XH) + (w + before * sw) * xw,
                                     upto - before, sw * xw)
                    zeros(to + upto * ps, part - upto)

    @outline
    def planes(geo, first, end, x, w, y, bias, res, act, p0, p1, ws):
        """Planes first … end of the output, counted over images and channels"""
        channels, ow, oh, taps = get(geo, _G) * get(geo, _O), get(geo, _OW), get(geo, _OH), get(geo, _TAPS)
        table, line, band = ws, ws + get(geo, _AT_OUTS), ws + get(geo, _AT_PACK)
        row, wk = lay_out(geo, table), get(geo, _WK)
        for plane in range(first, end):
            image = plane // channels
            c = plane - image * channels
            xc = x + image * get(geo, _XN) + c // get(geo, _O) * get(geo, _XC)
            yc, wc = image * get(geo, _YN) + c * get(geo, _YO), w + c * get(geo, _WR)
            for d in range(get(geo, _OD)):
                for h0 in range(0, oh, get(geo, _DEPTH)):
                    n = min(get(geo, _DEPTH), oh - h0)
                    copy_band(geo, table, xc, d, h0, n, band, row)
                    for h in range(n):
                        at = band + h * get(geo, _SH) * row
                        j = 0
                        while j < ow:
                            if ow - j > lanes:
                                acc = spread(quad, 0.0)
                                for t in range(taps):
                                    acc = fma(spread(quad, load_scalar(p, wc + t * wk)),
                                              load(quad, at + j * ps + load_scalar(INT64, table + t * 8)), acc)
                                store(quad, line + j * ps, acc)
                                j += FOUR * lanes
                            else:
                                one = spread(p, 0.0)
                                for t in range(taps):
                                    one = fma(spread(p, load_scalar(p, wc + t * wk)),
                                              load(p, at + j * ps + load_scalar(INT64, table + t * 8)), one)
                                store(p, line + j * ps, one)
                                j += lanes
                        offset = yc + d * get(geo, _YD) + (h0 + h) * get(geo, _YH)
                        finish(ow, line, y + offset, get(geo, _YW), bias + c * size if bias != 0 else 0, 0,
                               res + offset if res != 0 else 0, act, p0, p1)

    @outline
    def plane_weights(geo, first, end, x, out, grad, ws):
        """The gradients of the filters of outputs first … end"""
        ow, oh, taps = get(geo, _OW), get(geo, _OH), get(geo, _TAPS)
        table, sums, band = ws, ws + get(geo, _AT_OUTS), ws + get(geo, _AT_PACK)
        row = lay_out(geo, table)
        line = sums + 2 * taps * p.bytes
        for c in range(first, end):
            for t in range(taps):
                store(p, sums + t * p.bytes, spread(p, 0.0))
            for image in range(get(geo, _N)):
                xc = x + image * get(geo, _XN) + c // get(geo, _O) * get(geo, _XC)
                for d in range(get(geo, _OD)):
                    for h0 in range(0, oh, get(geo, _DEPTH)):
                        n = min(get(geo, _DEPTH), oh - h0)
                        copy_band(geo, table, xc, d, h0, n, band, row)
                        part = sums + taps * p.bytes
                        for t in range(taps):
                            store(p, part + t * p.bytes, spread(p, 0.0))
                        for h in range(n):
                            at = band + h * get(geo, _SH) * row
                            g = grad + image * get(geo, _YN) + c * get(geo, _YO) + d * get(geo, _YD) + (h0 + h) * get(geo, _YH)
                            copy_stepped(line, g, ow, get(geo, _YW))
                            for j in range(0, ow, lanes):
                                m = min(lanes, ow - j)
                                v = load_n(p, line + j * ps, m)
                                for t in range(taps):
                                    s = load_n(p, at + j * ps + load_scalar(INT64, table + t * 8), m)
                                    store(p, part + t * p.bytes, fma(v, s, load(p, part + t * p.bytes)))
                        for t in range(taps):
                            store(p, sums + t * p.bytes, load(p, sums + t * p.bytes) + load(p, part + t * p.bytes))
            for t in range(taps):
                store_scalar(e, out + (c * taps + t) * size, reduce_add(load(p, sums + t * p.bytes)))

    @inline
    def inside(geo, x, d, h, valid):
        """The taps that meet rows of the image at (d, h): (address at w = 0, tap's number, its offset along w); their number"""
        number = 0
        for t in range(get(geo, _TAPS)):
            tap = get(geo, _TAP) + t * 24
            z, y = d * get(geo, _SD) + get(tap, 0), h * get(geo, _SH) + get(tap, 8)
            if z >= 0 and z < get(geo, _D) and y >= 0 and y < get(geo, _H):
                at = valid + number * 24
                put(at, 0, x + z * get(geo, _XD) + y * get(geo, _XH) + get(tap, 16) * get(geo, _XW))
                put(at, 8, t)
                put(at, 16, get(tap, 16))
                number += 1
        return number

    @inline
    def bounds(geo, tap):
        """The positions along w at which a tap lies within the image"""
        sw = get(geo, _SW)
        low = min(get(geo, _OW), (sw - 1 - tap) // sw) if tap < 0 else 0
        left = get(geo, _W) - tap
        return low, max(low, min(get(geo, _OW), (left + sw - 1) // sw)) if left > 0 else low

    @outline
    def pixels(geo, first, end, x, w, y, bias, res, act, p0, p1, ws):
        """Rows of positions first … end; weights in panels of one vector"""
        channels, ow, oh, od, taps = get(geo, _G), get(geo, _OW), get(geo, _OH), get(geo, _OD), get(geo, _TAPS)
        valid, lines, line_row = ws, ws + get(geo, _AT_OUTS), (get(geo, _G) + lanes) * ps
        tw = extent(geo, 16, True)
        low, _ = bounds(geo, tw)
        _, high = bounds(geo, tw + extent(geo, 16, False) - 1)
        step = get(geo, _SW) * get(geo, _XW)
        for row in range(first, end):
            r = row // oh
            h = row - r * oh
            image = r // od
            d = r - image * od
            number = inside(geo, x + image * get(geo, _XN), d, h, valid)
            i = 0
            while i < ow:
                four = i >= low and i + FOUR <= high
                for c in range(0, channels, lanes):
                    n = min(lanes, channels - c)
                    wc = w + c * taps * ps
                    a0 = a1 = a2 = a3 = spread(p, 0.0)
                    if four:
                        for t in range(number):
                            at = valid + t * 24
                            f = load(p, wc + get(at, 8) * p.bytes)
                            s = get(at, 0) + i * step + c * size
                            if n == lanes:
                                a0, a1 = fma(f, load(e, s), a0), fma(f, load(e, s + step), a1)
                                a2, a3 = fma(f, load(e, s + 2 * step), a2), fma(f, load(e, s + 3 * step), a3)
                            else:
                                a0, a1 = fma(f, load_n(e, s, n), a0), fma(f, load_n(e, s + step, n), a1)
                                a2, a3 = fma(f, load_n(e, s + 2 * step, n), a2), fma(f, load_n(e, s + 3 * step, n), a3)
                        store(p, lines + line_row + c * ps, a1)
                        store(p, lines + 2 * line_row + c * ps, a2)
                        store(p, lines + 3 * line_row + c * ps, a3)
                    else:
                        for t in range(number):
                            at = valid + t * 24
                            place = i * get(geo, _SW) + get(at, 16)
                            if place >= 0 and place < get(geo, _W):
                                a0 = fma(load(p, wc + get(at, 8) * p.bytes), load_n(e, get(at, 0) + i * step + c * size, n), a0)
                    store(p, lines + c * ps, a0)
                for j in range(FOUR if four else 1):
                    offset = image * get(geo, _YN) + d * get(geo, _YD) + h * get(geo, _YH) + (i + j) * get(geo, _YW)
                    finish(channels, lines + j * line_row, y + offset, size, bias, size, res + offset if res != 0 else 0, act, p0,
                           p1)
                i += FOUR if four else 1

    @outline
    def pixel_weights(geo, first, end, x, out, grad, ws):
        """The gradients of the filters of channel vectors first … end"""
        channels, taps = get(geo, _G), get(geo, _TAPS)
        valid, sums = ws, ws + get(geo, _AT_OUTS)
        c0 = first * lanes
        many = min(channels, end * lanes) - c0
        vectors = end - first
        step, yw = get(geo, _SW) * get(geo, _XW), get(geo, _YW)
        for i in range(vectors * taps):
            store(p, sums + i * p.bytes, spread(p, 0.0))
        for image in range(get(geo, _N)):
            for d in range(get(geo, _OD)):
                for h in range(get(geo, _OH)):
                    number = inside(geo, x + image * get(geo, _XN), d, h, valid)
                    row = grad + image * get(geo, _YN) + d * get(geo, _YD) + h * get(geo, _YH)
                    for t in range(number):
                        at = valid + t * 24
                        low, high = bounds(geo, get(at, 16))
                        for v in range(vectors):
                            c = (c0 + v * lanes) * size
                            n = min(lanes, many - v * lanes)
                            acc = spread(p, 0.0)
                            g, s = row + low * yw + c, get(at, 0) + low * step + c
                            for _ in range(low, high):
                                acc = fma(load_n(e, g, n), load_n(e, s, n), acc)
                                g += yw
                                s += step
                            to = sums + (v * taps + get(at, 8)) * p.bytes
                            store(p, to, load(p, to) + acc)
        for v in range(vectors):
            for i in range(min(lanes, many - v * lanes)):
                for t in range(taps):
                    store_scalar(e, out + ((c0 + v * lanes + i) * taps + t) * size,
                                 load_scalar(p, sums + (v * taps + t) * p.bytes + i * ps))

    @inline
    def body(t, nt, kind, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size):
        mine = ws + t * ws_size
        outputs = get(geo, _G) * get(geo, _O)
        if kind == 0:
            n = get(geo, _N) * outputs
            planes(geo, n * t // nt, n * (t + 1) // nt, x, w, y, bias, res, act, p0, p1, mine)
        elif kind == 1:
            n = get(geo, _N) * get(geo, _OD) * get(geo, _OH)
            pixels(geo, n * t // nt, n * (t + 1) // nt, x, w, y, bias, res, act, p0, p1, mine)
        elif kind == 2:
            plane_weights(geo, outputs * t // nt, outputs * (t + 1) // nt, x, w, y, mine)
        else:
            n = (outputs + lanes - 1) // lanes
            pixel_weights(geo, n * t // nt, n * (t + 1) // nt, x, w, y, mine)

    def kernel(nt, kind, geo, x, w, y, bias, res, act, ws, ws_size, p0, p1):
        parallel(nt, body, (kind, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size))
    return kernel
