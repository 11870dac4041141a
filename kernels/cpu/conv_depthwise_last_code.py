"""Depthwise convolution with channels last, as compiled: two rows of four positions at once, a vector of channels each.

Neighbouring positions meet mostly the same pixels: of s + K rows of 3s + K, s the stride, each is loaded once for all the
positions that it is for, a third of the loads that position by position would take. Rows and columns beyond the image are passed
over; nothing is copied.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .conv_code import get
from .conv_depthwise_code import part_putter
from .conv_fields import LAST
from .engine.region import parallel
from .engine.simd import (
    FLOAT32,
    Elem,
    first_lanes,
    i64,
    inline,
    load_n,
    load_vector,
    multiply_add,
    outline,
    spread,
)

HIGH, WIDE = 2, 4  # positions at once
(_N, _C, _H, _W, _OH, _OW, _PH, _PW, _XN, _XH, _XW, _YN, _YH, _YW, _SIZE, _STRIDE, _BLOCK, _PART) = (
    8 * i for i in range(len(LAST)))


def _met(size: int, stride: int, row: int) -> Any:
    def fn(typingctx, elem, there, x, step, column, width, w, sums):
        e: Elem = elem.value

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            _, there, x, step, column, width, w, packed = args
            sums = cgutils.unpack_tuple(builder, packed)
            taps = {(i, j): load_vector(builder, e, builder.add(w, i64((i * size + j) * e.bytes)))
                    for i in sorted({row - o * stride for o in range(HIGH)} & set(range(size))) for j in range(size)}
            for j in range((WIDE - 1) * stride + size):
                at = builder.add(column, i64(j))
                before, inside, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
                builder.cbranch(builder.icmp_unsigned("<", at, width), inside, after)
                builder.position_at_end(inside)
                v = load_vector(builder, e, builder.add(x, builder.mul(step, i64(j))), there)
                new = list(sums)
                for o in range(HIGH):
                    for p in range(WIDE):
                        tap = taps.get((row - o * stride, j - p * stride))
                        if tap is not None:
                            new[o * WIDE + p] = multiply_add(builder, tap, v, new[o * WIDE + p])
                builder.branch(after)
                builder.position_at_end(after)
                for k, (old, value) in enumerate(zip(sums, new, strict=True)):
                    if old is not value:
                        sums[k] = builder.phi(old.type)
                        sums[k].add_incoming(old, before)
                        sums[k].add_incoming(value, inside)
            return cgutils.pack_array(builder, sums)
        return sums(elem, there, *(types.int64,) * 5, sums), codegen
    fn.__doc__ = """met(elem, there, x, step, column, width, w, sums) -> the positions' sums with what they meet in that row"""
    return intrinsic(fn)


def last(elem_name: str) -> Any:
    """``conv_fields.LAST`` lists what ``geo`` points to; weights in panels of one vector."""
    e = FLOAT32
    lanes, put = e.lanes, part_putter(e)

    def filters(size: int, stride: int) -> Any:
        several = (HIGH - 1) * stride + size

        def row(number: int) -> Any:
            if number == several:
                @inline
                def end(there, x, xh, xw, y, h, column, width, w, sums):
                    return sums
                return end
            met, following = _met(size, stride, number), row(number + 1)

            @inline
            def run(there, x, xh, xw, y, h, column, width, w, sums):
                if y >= 0 and y < h:
                    sums = met(e, there, x, xw, column, width, w, sums)
                return following(there, x + xh, xh, xw, y + 1, h, column, width, w, sums)
            return run
        first = row(0)

        @outline
        def pair(geo, x, top, w, bias, y, res, act, c0, c1):
            """Channels c0 … c1 of two rows of positions, which begin at y; x is the image"""
            ow, h, width = get(geo, _OW), get(geo, _H), get(geo, _W)
            xh, xw, yh, yw = get(geo, _XH), get(geo, _XW), get(geo, _YH), get(geo, _YW)
            step = yw if res != 0 else 0
            block = get(geo, _BLOCK)
            for b in range(c0, c1, block):
                for q in range(0, ow, WIDE):
                    i = min(q, ow - WIDE)  # the last ones overlap those before
                    column = i * stride - get(geo, _PW)
                    for c in range(b, min(c1, b + block), lanes):
                        n = min(lanes, c1 - c)
                        at = c * e.size
                        a = load_n(e, bias + at, n) if bias != 0 else spread(e, 0.0)
                        sums = first(first_lanes(e, n), x + top * xh + column * xw + at, xh, xw, top, h, column, width,
                                     w + c * size * size * e.size, (a, a, a, a, a, a, a, a))
                        at += i * yw
                        to, more = y + at, res + at if res != 0 else 0
                        put(sums[0], to, more, act, n)
                        put(sums[1], to + yw, more + step, act, n)
                        put(sums[2], to + 2 * yw, more + 2 * step, act, n)
                        put(sums[3], to + 3 * yw, more + 3 * step, act, n)
                        to += yh
                        more += yh if res != 0 else 0
                        put(sums[4], to, more, act, n)
                        put(sums[5], to + yw, more + step, act, n)
                        put(sums[6], to + 2 * yw, more + 2 * step, act, n)
                        put(sums[7], to + 3 * yw, more + 3 * step, act, n)
        return pair

    pair31, pair51, pair71, pair32, pair52 = (filters(*each) for each in ((3, 1), (5, 1), (7, 1), (3, 2), (5, 2)))

    @inline
    def body(t, nt, geo, x, w, y, bias, res, act):
        oh, size, stride, channels, part = get(geo, _OH), get(geo, _SIZE), get(geo, _STRIDE), get(geo, _C), get(geo, _PART)
        pairs, parts = (oh + HIGH - 1) // HIGH, (channels + part - 1) // part
        units = get(geo, _N) * pairs * parts
        for unit in range(units * t // nt, units * (t + 1) // nt):
            n = unit // parts // pairs
            c = unit % parts * part
            r = min(unit // parts % pairs * HIGH, oh - HIGH)
            at = n * get(geo, _YN) + r * get(geo, _YH)
            rest = (geo, x + n * get(geo, _XN), r * stride - get(geo, _PH), w, bias, y + at, res + at if res != 0 else 0, act,
                    c, min(c + part, channels))
            if stride == 2:
                if size == 3:
                    pair32(*rest)
                else:
                    pair52(*rest)
            elif size == 3:
                pair31(*rest)
            elif size == 5:
                pair51(*rest)
            else:
                pair71(*rest)

    def kernel(nt, geo, x, w, y, bias, res, act):
        parallel(nt, body, (geo, x, w, y, bias, res, act))
    return kernel
