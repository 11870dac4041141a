"""Depthwise convolution, as compiled: each channel has filters of its own, so there is no product to make of it.

Memory sets the pace, and vectors run along what lies next to each other: along w with channels first, along the channels with
channels last. The problem is described as in ``conv_code``, so strides, dilation and the phases of a transposed convolution
are the same thing here as there.

* ``planes``: a band of the image is copied with its padding (and, for a stride, its columns sorted by remainder), so that
  the loop over taps reads whole vectors and asks nothing. Rows of outputs share a tap's weight. A row's last vectors overlap
  those before; of short rows the end is overwritten by the next row.
* ``pixels``: four positions next to each other share a vector of weights, and the last four of a row overlap those before;
  positions whose taps leave the image go one by one.

The gradient of the weight is in ``conv_depthwise_weight_code``.
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
from .engine.activation_codes import CODES
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
    maximum_fast,
    minimum_fast,
    outline,
    spread,
    store,
    store_n,
    wide,
)

FOUR = 4
RELU, RELU6 = CODES["relu"], CODES["relu6"]


@inline
def extent(geo, field, low):
    """(least, number) of the taps' offsets along a dimension"""
    taps = get(geo, _TAP)
    a = b = get(taps, field) if get(geo, _TAPS) > 0 else 0
    for t in range(1, get(geo, _TAPS)):
        a, b = min(a, get(taps + t * 24, field)), max(b, get(taps + t * 24, field))
    return a if low else b - a + 1


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
def inside_row(geo, i, valid, number, here):
    """Of these taps those that meet the image at the row's position i: (address at w = 0, tap's number); their number"""
    count = 0
    for t in range(number):
        at = valid + t * 24
        place = i * get(geo, _SW) + get(at, 16)
        if place >= 0 and place < get(geo, _W):
            put(here, count * 24, get(at, 0))
            put(here, count * 24 + 8, get(at, 8))
            count += 1
    return count


@inline
def bounds(geo, tap):
    """The positions along w at which a tap lies within the image"""
    sw = get(geo, _SW)
    low = min(get(geo, _OW), (sw - 1 - tap) // sw) if tap < 0 else 0
    left = get(geo, _W) - tap
    return low, max(low, min(get(geo, _OW), (left + sw - 1) // sw)) if left > 0 else low


def putter(p: Any) -> Any:
    """put_vector(…): the last step where the output is of the compute type and the activation cheap"""
    @inline
    def put_vector(v, y, bias, res, act):
        """The sums of a vector of channels with bias, residual and activation"""
        if bias != 0:
            v = v + load(p, bias)
        if res != 0:
            v = v + load(p, res)
        if act != 0:
            v = maximum_fast(0.0, v)
            if act == RELU6:
                v = minimum_fast(6.0, v)
        store(p, y, v)
    return put_vector


def part_putter(e: Any) -> Any:
    """put(…): the same for the first n lanes, or all; the bias is in the sums already"""
    lanes = e.lanes

    @inline
    def put(v, y, res, act, n):
        if res != 0:
            v = v + load_n(e, res, n) if n < lanes else v + load(e, res)
        if act != 0:
            v = maximum_fast(0.0, v)
            if act == RELU6:
                v = minimum_fast(6.0, v)
        if n < lanes:
            store_n(e, y, v, n)
        else:
            store(e, y, v)
    return put


def bands(e: Any) -> Any:
    """(lay_out, copy_band): a part of the image with its padding, one row behind the other, so that no tap leaves it."""
    p = compute_elem(e)
    lanes, ps = p.lanes, p.size
    zeros, copy_stepped = copier(e)

    @outline
    def lay_out(geo, table, about, band):
        """Clears a band and writes the table of where a tap's first element lies in it, and what ``copy_band`` goes by; returns
        bytes of a row"""
        td, th, tw = extent(geo, 0, True), extent(geo, 8, True), extent(geo, 16, True)
        rows, sw = (get(geo, _DEPTH) + 6) * get(geo, _SH) + extent(geo, 8, False), get(geo, _SW)
        at = about
        put(at, 0, td)
        put(at, 8, th)
        put(at, 16, rows)
        put(at, 24, extent(geo, 0, False))
        put(at, 32, extent(geo, 8, False))
        part = max(get(geo, _OW), 2 * lanes) + (extent(geo, 16, False) - 1) // sw + 1
        for f in range(sw):  # of the columns with remainder f: the first, zeros before it, elements
            w = tw + f
            before = min(part, (sw - 1 - w) // sw) if w < 0 else 0
            upto = max(before, min(part, (get(geo, _W) - w + sw - 1) // sw)) if w < get(geo, _W) else before
            put(at, 40 + f * 24, (w + before * sw) * get(geo, _XW))
            put(at, 48 + f * 24, (f * part + before) * ps)
            put(at, 56 + f * 24, upto - before)
        for t in range(get(geo, _TAPS)):
            tap = get(geo, _TAP) + t * 24
            w = get(tap, 16) - tw
            put(table, t * 8, (((get(tap, 0) - td) * rows + get(tap, 8) - th) * part * sw + w % sw * part + w // sw) * ps)
        zeros(band, extent(geo, 0, False) * rows * part * sw)
        return part * sw * ps

    @outline
    def copy_band(geo, at, x, d, h, n, done, dst, row):
        """The padded rows that n rows of positions from (d, h) on meet, but for the first ``done``; returns their number. What
        lies left and right of the image is zero already"""
        rows, deep = get(at, 16), get(at, 24)
        used = (n - 1) * get(geo, _SH) + get(at, 32)
        sw, step, xh = get(geo, _SW), get(geo, _SW) * get(geo, _XW), get(geo, _XH)
        z, y0 = d * get(geo, _SD) + get(at, 0), h * get(geo, _SH) + get(at, 8)
        for i in range(deep):
            there = z + i >= 0 and z + i < get(geo, _D)
            to = dst + (i * rows + done) * row
            source = x + (z + i) * get(geo, _XD) + (y0 + done) * xh
            for y in range(y0 + done, y0 + used):
                if there and y >= 0 and y < get(geo, _H):
                    for f in range(sw):
                        copy_stepped(to + get(at, 48 + f * 24), source + get(at, 40 + f * 24), get(at, 56 + f * 24), step)
                else:
                    zeros(to, row // ps)
                to += row
                source += xh
        return max(done, used)
    return lay_out, copy_band


def depthwise(elem_name: str) -> Any:
    """Both kinds in one kernel, as ``convolution``."""
    e = ELEMS[elem_name]
    p = compute_elem(e)
    two = wide(p, 2)
    lanes, ps, size = p.lanes, p.size, e.size
    lay_out, copy_band = bands(e)
    put_vector = putter(p)
    finish = finisher(e)

    @inline
    def put_row(q, v, bias, y, res, act, n):
        """One row's sums with bias, residual and activation; the first n, or all"""
        if bias != 0:
            v = v + spread(q, load_scalar(p, bias))
        if res != 0:
            v = v + (load(q, res) if n < 0 else load_n(q, res, n))
        if act != 0:
            v = maximum_fast(0.0, v)
            if act == RELU6:
                v = minimum_fast(6.0, v)
        if n < 0:
            store(q, y, v)
        else:
            store_n(q, y, v, n)

    # A block is a stretch of ``rows`` rows of positions, one below the other. Of ``whole`` of them all lanes are written, of the
    # others n. Rows go downwards: what a whole vector writes past a short row's end is the next row's.

    @outline
    def broad(taps, table, w, wk, at, step, bias, y, y_step, res, act, rows, whole, n):
        """A block of two vectors, at most four rows"""
        a0 = a1 = a2 = a3 = spread(two, 0.0)
        for t in range(taps):
            s = at + load_scalar(INT64, table + t * 8)
            f = spread(two, load_scalar(p, w + t * wk))
            a0, a1 = fma(f, load(two, s), a0), fma(f, load(two, s + step), a1)
            a2, a3 = fma(f, load(two, s + 2 * step), a2), fma(f, load(two, s + 3 * step), a3)
        for i in range(rows):
            put_row(two, a0, bias, y, res, act, -1 if i < whole else n)
            a0, a1, a2 = a1, a2, a3
            y += y_step
            res += y_step if res != 0 else 0

    @outline
    def tall(taps, table, w, wk, at, step, bias, y, y_step, res, act, rows, whole, n):
        """A block of one vector, at most eight rows"""
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = spread(p, 0.0)
        for t in range(taps):
            s = at + load_scalar(INT64, table + t * 8)
            f = spread(p, load_scalar(p, w + t * wk))
            a0, a1 = fma(f, load(p, s), a0), fma(f, load(p, s + step), a1)
            a2, a3 = fma(f, load(p, s + 2 * step), a2), fma(f, load(p, s + 3 * step), a3)
            s += 4 * step
            b0, b1 = fma(f, load(p, s), b0), fma(f, load(p, s + step), b1)
            b2, b3 = fma(f, load(p, s + 2 * step), b2), fma(f, load(p, s + 3 * step), b3)
        for i in range(rows):
            put_row(p, a0, bias, y, res, act, -1 if i < whole else n)
            a0, a1, a2, a3, b0, b1, b2 = a1, a2, a3, b0, b1, b2, b3
            y += y_step
            res += y_step if res != 0 else 0

    @outline
    def planes(geo, first, end, x, w, y, bias, res, act, p0, p1, ws):
        """Planes first … end of the output, counted over images and channels"""
        channels, ow, oh, taps, outputs = get(geo, _G) * get(geo, _O), get(geo, _OW), get(geo, _OH), get(geo, _TAPS), get(geo, _O)
        table, line, band = ws, ws + get(geo, _AT_OUTS), ws + get(geo, _AT_PACK)
        about = table + taps * 8
        row, wk, depth, yh, yw = lay_out(geo, table, about, band), get(geo, _WK), get(geo, _DEPTH), get(geo, _YH), get(geo, _YW)
        line_row, below = (ow + 2 * lanes) * ps, get(geo, _SH) * row
        straight = ps == size and yw == size and act in (0, RELU, RELU6)
        many, width = (8, lanes) if ow <= lanes else (4, 2 * lanes)
        enough = (width + ow - 1) // ow if straight and yh == ow * size else oh + 1  # rows that a block's width fits into
        image = first // channels
        c = first - image * channels
        for _ in range(first, end):
            xc = x + image * get(geo, _XN) + (c if outputs == 1 else c // outputs) * get(geo, _XC)
            yc, wc = image * get(geo, _YN) + c * get(geo, _YO), w + c * get(geo, _WR)
            b = bias + c * size if straight and bias != 0 else 0
            for d in range(get(geo, _OD)):
                for h0 in range(0, oh, depth):
                    n = min(depth, oh - h0)
                    copy_band(geo, about, xc, d, h0, n, 0, band, row)
                    for h in range(0, n, many):
                        rows = min(many, n - h)
                        offset = yc + d * get(geo, _YD) + (h0 + h) * yh
                        at = band + h * below
                        if straight:
                            to, to_step, more, act_now = y + offset, yh, res + offset if res != 0 else 0, act
                        else:
                            to, to_step, more, act_now = line, line_row, 0, 0
                        whole = rows if ow >= width or not straight else max(0, oh - h0 - h - enough + 1)
                        if ow <= lanes:
                            tall(taps, table, wc, wk, at, below, b, to, to_step, more, act_now, rows, whole, ow)
                        else:
                            for j in range(0, ow, width):
                                k = max(0, min(j, ow - width)) * ps
                                r = more + k if more != 0 else 0
                                broad(taps, table, wc, wk, at + k, below, b, to + k, to_step, r, act_now, rows, whole, ow)
                        if not straight:
                            for i in range(rows):
                                finish(ow, line + i * line_row, y + offset + i * yh, yw, bias + c * size if bias != 0 else 0, 0,
                                       res + offset + i * yh if res != 0 else 0, act, p0, p1)
            c += 1
            if c == channels:
                image, c = image + 1, 0

    @outline
    def pair(number, valid, more, w, w_next, step, y, y_step, bias, res, act):
        """Two vectors of channels at four positions; ``more`` is their offset from the taps' addresses"""
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = spread(p, 0.0)
        for t in range(number):
            at = valid + t * 24
            k = get(at, 8) * p.bytes
            f, g = load(p, w + k), load(p, w + w_next + k)
            s = get(at, 0) + more
            a0, b0 = fma(f, load(p, s), a0), fma(g, load(p, s + p.bytes), b0)
            a1, b1 = fma(f, load(p, s + step), a1), fma(g, load(p, s + step + p.bytes), b1)
            s += 2 * step
            a2, b2 = fma(f, load(p, s), a2), fma(g, load(p, s + p.bytes), b2)
            a3, b3 = fma(f, load(p, s + step), a3), fma(g, load(p, s + step + p.bytes), b3)
        after = bias + p.bytes if bias != 0 else 0
        r = res + p.bytes if res != 0 else 0
        more_step = y_step if res != 0 else 0
        put_vector(a0, y, bias, res, act)
        put_vector(b0, y + p.bytes, after, r, act)
        put_vector(a1, y + y_step, bias, res + more_step, act)
        put_vector(b1, y + y_step + p.bytes, after, r + more_step, act)
        put_vector(a2, y + 2 * y_step, bias, res + 2 * more_step, act)
        put_vector(b2, y + 2 * y_step + p.bytes, after, r + 2 * more_step, act)
        put_vector(a3, y + 3 * y_step, bias, res + 3 * more_step, act)
        put_vector(b3, y + 3 * y_step + p.bytes, after, r + 3 * more_step, act)

    @outline
    def quad(number, valid, more, w, w_next, y, bias, res, act):
        """Four vectors of channels at one position"""
        a0 = a1 = a2 = a3 = spread(p, 0.0)
        b = p.bytes
        for t in range(number):
            at = valid + t * 24
            f, s = w + get(at, 8) * b, get(at, 0) + more
            a0, a1 = fma(load(p, f), load(p, s), a0), fma(load(p, f + w_next), load(p, s + b), a1)
            f += 2 * w_next
            a2, a3 = fma(load(p, f), load(p, s + 2 * b), a2), fma(load(p, f + w_next), load(p, s + 3 * b), a3)
        next_bias, next_res = b if bias != 0 else 0, b if res != 0 else 0
        put_vector(a0, y, bias, res, act)
        put_vector(a1, y + b, bias + next_bias, res + next_res, act)
        put_vector(a2, y + 2 * b, bias + 2 * next_bias, res + 2 * next_res, act)
        put_vector(a3, y + 3 * b, bias + 3 * next_bias, res + 3 * next_res, act)

    @outline
    def pixels(geo, first, end, x, w, y, bias, res, act, p0, p1, ws):
        """Rows of positions first … end; weights in panels of one vector"""
        channels, ow, oh, od, taps = get(geo, _G), get(geo, _OW), get(geo, _OH), get(geo, _OD), get(geo, _TAPS)
        valid, here, lines, line_row = ws, ws + taps * 24, ws + get(geo, _AT_OUTS), (get(geo, _G) + lanes) * ps
        tw = extent(geo, 16, True)
        low, _ = bounds(geo, tw)
        _, high = bounds(geo, tw + extent(geo, 16, False) - 1)
        step = get(geo, _SW) * get(geo, _XW)
        straight = ps == size and act in (0, RELU, RELU6)
        pairs = channels // (2 * lanes) * 2 * lanes if straight else 0
        quads = channels // (4 * lanes) * 4 * lanes if straight else 0
        for row in range(first, end):
            r = row // oh
            h = row - r * oh
            image = r // od
            d = r - image * od
            number = inside(geo, x + image * get(geo, _XN), d, h, valid)
            i = 0
            while i < ow:
                four = i >= low and i < high and high - low >= FOUR
                count, table = number, valid
                if four:
                    i = min(i, high - FOUR)  # the last four overlap those before
                else:
                    count, table = inside_row(geo, i, valid, number, here), here
                offset = image * get(geo, _YN) + d * get(geo, _YD) + h * get(geo, _YH) + i * get(geo, _YW)
                done = pairs if four else quads
                for c in range(0, done, 2 * lanes if four else 4 * lanes):
                    here_x, wc, yc = i * step + c * size, w + c * taps * ps, y + offset + c * size
                    bc, rc = bias + c * size if bias != 0 else 0, res + offset + c * size if res != 0 else 0
                    if four:
                        pair(count, table, here_x, wc, taps * p.bytes, step, yc, get(geo, _YW), bc, rc, act)
                    else:
                        quad(count, table, here_x, wc, taps * p.bytes, yc, bc, rc, act)
                for c in range(done, channels, lanes):
                    n = min(lanes, channels - c)
                    wc = w + c * taps * ps
                    a0 = a1 = a2 = a3 = spread(p, 0.0)
                    if four:
                        for t in range(count):
                            at = table + t * 24
                            f = load(p, wc + get(at, 8) * p.bytes)
                            s = get(at, 0) + i * step + c * size
                            a0, a1 = fma(f, load_n(e, s, n), a0), fma(f, load_n(e, s + step, n), a1)
                            a2, a3 = fma(f, load_n(e, s + 2 * step, n), a2), fma(f, load_n(e, s + 3 * step, n), a3)
                        store(p, lines + line_row + c * ps, a1)
                        store(p, lines + 2 * line_row + c * ps, a2)
                        store(p, lines + 3 * line_row + c * ps, a3)
                    else:
                        for t in range(count):
                            at = table + t * 24
                            a0 = fma(load(p, wc + get(at, 8) * p.bytes), load_n(e, get(at, 0) + i * step + c * size, n), a0)
                    store(p, lines + c * ps, a0)
                more = done * size
                if done < channels:
                    for j in range(FOUR if four else 1):
                        to = offset + j * get(geo, _YW) + more
                        finish(channels - done, lines + j * line_row + done * ps, y + to, size, bias + more if bias != 0 else 0,
                               size, res + to if res != 0 else 0, act, p0, p1)
                i += FOUR if four else 1

    @inline
    def body(t, nt, kind, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size):
        mine = ws + t * ws_size
        if kind == 0:
            n = get(geo, _N) * get(geo, _G) * get(geo, _O)
            planes(geo, n * t // nt, n * (t + 1) // nt, x, w, y, bias, res, act, p0, p1, mine)
        else:
            n = get(geo, _N) * get(geo, _OD) * get(geo, _OH)
            pixels(geo, n * t // nt, n * (t + 1) // nt, x, w, y, bias, res, act, p0, p1, mine)

    def kernel(nt, kind, geo, x, w, y, bias, res, act, ws, ws_size, p0, p1):
        parallel(nt, body, (kind, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size))
    return kernel
