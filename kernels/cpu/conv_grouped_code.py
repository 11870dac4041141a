"""Convolution of groups with channels last, as compiled: eight positions next to each other share a vector of weights.

A group of a few channels is too narrow for a product: packing its columns would take longer than multiplying them. So the
image is read in place. For each tap and channel of a group, a vector of its outputs' weights meets one number of each position.
Positions whose taps leave the image go one by one; the last eight of a row overlap those before.
"""

from __future__ import annotations

from typing import Any

from .conv_code import (
    _AT_OUTS,
    _C,
    _DEPTH,
    _G,
    _N,
    _O,
    _OD,
    _OH,
    _OW,
    _SW,
    _TAPS,
    _XC,
    _XN,
    _XW,
    _YD,
    _YH,
    _YN,
    _YO,
    _YW,
    finisher,
    get,
)
from .conv_depthwise_code import RELU, RELU6, bounds, extent, inside, inside_row, putter
from .engine.region import parallel
from .engine.simd import ELEMS, compute_elem, fma, inline, load, load_scalar, outline, spread

EIGHT = 8


def grouped(elem_name: str) -> Any:
    """Outputs of a group are whole vectors; weights in panels of one vector, k = (tap, channel)."""
    e = ELEMS[elem_name]
    p = compute_elem(e)
    lanes, size = p.lanes, e.size
    finish = finisher(e)
    put_vector = putter(p)

    @inline
    def number(address):
        return spread(p, load_scalar(e, address))

    @outline
    def eight(taps, table, more, channels, w, step, y, y_step, bias, res, act):
        """A vector of outputs at eight positions; ``more`` is their offset from the taps' addresses"""
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = spread(p, 0.0)
        three, five, seven = 3 * step, 5 * step, 7 * step
        for t in range(taps):
            at = table + t * 24
            s, f = get(at, 0) + more, w + get(at, 8) * channels * p.bytes
            for _ in range(channels):
                v = load(p, f)
                a0, a1 = fma(v, number(s), a0), fma(v, number(s + step), a1)
                a2, a3 = fma(v, number(s + 2 * step), a2), fma(v, number(s + three), a3)
                a4, a5 = fma(v, number(s + 4 * step), a4), fma(v, number(s + five), a5)
                a6, a7 = fma(v, number(s + 2 * three), a6), fma(v, number(s + seven), a7)
                s += size
                f += p.bytes
        r_step = y_step if res != 0 else 0
        put_vector(a0, y, bias, res, act)
        put_vector(a1, y + y_step, bias, res + r_step, act)
        put_vector(a2, y + 2 * y_step, bias, res + 2 * r_step, act)
        put_vector(a3, y + 3 * y_step, bias, res + 3 * r_step, act)
        put_vector(a4, y + 4 * y_step, bias, res + 4 * r_step, act)
        put_vector(a5, y + 5 * y_step, bias, res + 5 * r_step, act)
        put_vector(a6, y + 6 * y_step, bias, res + 6 * r_step, act)
        put_vector(a7, y + 7 * y_step, bias, res + 7 * r_step, act)

    @outline
    def one(taps, table, more, channels, w, y, bias, res, act):
        """A vector of outputs at one position"""
        a = b = spread(p, 0.0)
        for t in range(taps):
            at = table + t * 24
            s, f = get(at, 0) + more, w + get(at, 8) * channels * p.bytes
            for c in range(0, channels - 1, 2):
                a = fma(load(p, f + c * p.bytes), number(s + c * size), a)
                b = fma(load(p, f + (c + 1) * p.bytes), number(s + (c + 1) * size), b)
            if channels % 2 > 0:
                a = fma(load(p, f + (channels - 1) * p.bytes), number(s + (channels - 1) * size), a)
        put_vector(a + b, y, bias, res, act)

    @outline
    def row(geo, g, valid, here, lines, many, low, high, w, y, bias, res, act, p0, p1):
        """A row of positions, all outputs of group g"""
        ow, channels, outputs = get(geo, _OW), get(geo, _C), get(geo, _O)
        step, y_step = get(geo, _SW) * get(geo, _XW), get(geo, _YW)
        x_more = g * channels * get(geo, _XC)
        straight = p.size == size and act in (0, RELU, RELU6)
        i = 0
        while i < ow:
            whole = i >= low and i < high and high - low >= EIGHT
            count, table = many, valid
            if whole:
                i = min(i, high - EIGHT)
            else:
                count, table = inside_row(geo, i, valid, many, here), here
            positions = EIGHT if whole else 1
            for o in range(0, outputs, lanes):
                offset = i * y_step + o * size
                wo = w + o * channels * get(geo, _TAPS) * p.size
                b, r = bias + o * size if bias != 0 else 0, res + offset if res != 0 else 0
                to, to_step, b_now, r_now, act_now = y + offset, y_step, b, r, act
                if not straight:
                    to, to_step, b_now, r_now, act_now = lines, p.bytes, 0, 0, 0
                if whole:
                    eight(count, table, i * step + x_more, channels, wo, step, to, to_step, b_now, r_now, act_now)
                else:
                    one(count, table, i * step + x_more, channels, wo, to, b_now, r_now, act_now)
                if not straight:
                    for j in range(positions):
                        finish(lanes, lines + j * p.bytes, y + offset + j * y_step, size, b, size,
                               r + j * y_step if r != 0 else 0, act, p0, p1)
            i += positions

    @inline
    def body(t, nt, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size):
        groups, outputs, oh, od, taps = get(geo, _G), get(geo, _O), get(geo, _OH), get(geo, _OD), get(geo, _TAPS)
        valid = ws + t * ws_size
        here, lines = valid + taps * 24, valid + get(geo, _AT_OUTS)
        tw = extent(geo, 16, True)
        low, _ = bounds(geo, tw)
        _, high = bounds(geo, tw + extent(geo, 16, False) - 1)
        n = get(geo, _N) * od * oh
        first, end, each = n * t // nt, n * (t + 1) // nt, get(geo, _C) * taps * outputs * p.size
        for block in range(first, end, get(geo, _DEPTH)):  # rows that stay in L2
            for g in range(groups):
                for line in range(block, min(end, block + get(geo, _DEPTH))):
                    q = line // oh
                    h = line - q * oh
                    image = q // od
                    d = q - image * od
                    many = inside(geo, x + image * get(geo, _XN), d, h, valid)
                    more = image * get(geo, _YN) + d * get(geo, _YD) + h * get(geo, _YH) + g * outputs * get(geo, _YO)
                    row(geo, g, valid, here, lines, many, low, high, w + g * each, y + more,
                        bias + g * outputs * size if bias != 0 else 0, res + more if res != 0 else 0, act, p0, p1)

    def kernel(nt, geo, x, w, y, bias, res, act, ws, ws_size, p0, p1):
        parallel(nt, body, (geo, x, w, y, bias, res, act, p0, p1, ws, ws_size))
    return kernel
