"""Convolution, as compiled: products by the register tile, one operand packed tap by tap from the image (implicit im2col).

Imported only when a kernel has to be built. Sizes are in elements, strides in bytes, addresses are int64.

A convolution is a product over k = (channel, tap). Output positions are numbered through, over images, planes and rows; a *run*
is a stretch of them within one row. For each run and tap it is computed once which of the tap's elements lie within the image
(a *meeting*: zeros, elements, zeros); packing then only copies. Nothing but one block a thread is ever packed, so the columns of
the explicit im2col do not exist anywhere (Anderson et al. 2020 survey such schemes; cuDNN's is Chetlur et al. 2014, section 3).

* ``planes`` (channels first): rows of the tile are output channels, columns are positions; weights are read as they are.
  ``shallow``: the same for few channels, where what counts is not the products but packing and writing.
* ``pixels`` (channels last): rows are positions, columns are output channels; weights are packed in panels.
* ``weights``: rows are k, columns are output channels, summed over positions: the gradient of the weight.

A stride-1 problem with a list of taps is also what each phase of a transposed convolution is: see ``conv.py``.
"""

from __future__ import annotations

from typing import Any

from .conv_fields import FIELDS
from .engine.activations import apply
from .engine.pack import _transpose_part, packer
from .engine.region import parallel
from .engine.simd import (
    ELEMS,
    INT64,
    compute_elem,
    even_lanes,
    inline,
    load,
    load_n,
    load_scalar,
    outline,
    spread,
    store,
    store_n,
    store_scalar,
)
from .engine.tile import multiply_blocks, tile_size
from .matmul_code import tiles

ROWS, VECS = tile_size()
(_N, _C, _O, _G, _OD, _OH, _OW, _D, _H, _W, _SD, _SH, _SW, _XN, _XC, _XD, _XH, _XW, _YN, _YO, _YD, _YH, _YW, _WG, _WR, _WK,
 _TAPS, _TAP, _SPAN, _PARTS, _CUTS, _WIDTH, _DEPTH, _PANELS, _DIRECT, _AT_RUNS, _AT_OUTS, _AT_MEET, _MEET, _AT_BIAS,
 _AT_SUMS, _SUMS, _AT_PACK) = (8 * i for i in range(len(FIELDS)))
RUN, MEETING, OUT = 48, 32, 24  # bytes of an entry of each table


@inline
def get(address, field):
    return load_scalar(INT64, address + field)


@inline
def put(address, field, value):
    store_scalar(INT64, address + field, value)


@outline
def find_runs(geo, p, n, runs):
    """The runs of positions p … p + n, each (image's offset, first d, h and w in the input before the tap, length, output's
    offset); returns their number."""
    od, oh, ow = get(geo, _OD), get(geo, _OH), get(geo, _OW)
    count = 0
    while n > 0:
        r = p // ow
        w = p - r * ow
        q = r // oh
        h = r - q * oh
        i = q // od
        d = q - i * od
        length = min(n, ow - w)
        at = runs + count * RUN
        put(at, 0, i * get(geo, _XN))
        put(at, 8, d * get(geo, _SD))
        put(at, 16, h * get(geo, _SH))
        put(at, 24, w * get(geo, _SW))
        put(at, 32, length)
        put(at, 40, i * get(geo, _YN) + d * get(geo, _YD) + h * get(geo, _YH) + w * get(geo, _YW))
        p += length
        n -= length
        count += 1
    return count


@outline
def find_outputs(geo, runs, count, outs):
    """The runs as the output sees them, (first column, length, offset): those that continue one another are one."""
    step = get(geo, _YW)
    number, column, following = 0, 0, -1
    for r in range(count):
        length, offset = get(runs + r * RUN, 32), get(runs + r * RUN, 40)
        if number > 0 and offset == following:
            last = outs + (number - 1) * OUT
            put(last, 8, get(last, 8) + length)
        else:
            at = outs + number * OUT
            put(at, 0, column)
            put(at, 8, length)
            put(at, 16, offset)
            number += 1
        column += length
        following = offset + length * step
    return number


@outline
def find_meetings(geo, runs, count, table):
    """For each tap and run: (offset of the first element within the image, zeros before, elements, zeros after)."""
    sw, xd, xh, xw = get(geo, _SW), get(geo, _XD), get(geo, _XH), get(geo, _XW)
    taps, at = get(geo, _TAP), table
    for t in range(get(geo, _TAPS)):
        tap = taps + t * 24
        td, th, tw = get(tap, 0), get(tap, 8), get(tap, 16)
        for r in range(count):
            run = runs + r * RUN
            d, h, w, n = get(run, 8) + td, get(run, 16) + th, get(run, 24) + tw, get(run, 32)
            before, upto = 0, 0
            if d >= 0 and d < get(geo, _D) and h >= 0 and h < get(geo, _H):
                before = min(n, (sw - 1 - w) // sw) if w < 0 else 0
                left = get(geo, _W) - w
                upto = max(before, min(n, (left + sw - 1) // sw)) if left > 0 else before
            put(at, 0, get(run, 0) + d * xd + h * xh + (w + before * sw) * xw)
            put(at, 8, before)
            put(at, 16, upto - before)
            put(at, 24, n - upto)
            at += MEETING


def copier(e: Any) -> Any:
    """Helpers that fill stretches of packed rows. Whole vectors are written: what they write past a stretch's end is written
    again by the next one."""
    p = compute_elem(e)
    lanes, size, ps = e.lanes, e.size, p.size

    @inline
    def zeros(d, n):
        for j in range(0, n, lanes):
            store(p, d + j * ps, spread(p, 0.0))

    @inline
    def copy(d, s, n):
        whole = n - n % lanes
        for j in range(0, whole, lanes):
            store(p, d + j * ps, load(e, s + j * size))
        if whole < n:
            store(p, d + whole * ps, load_n(e, s + whole * size, n - whole))

    @inline
    def copy_stepped(d, s, n, step):
        if step == size:
            copy(d, s, n)
        elif step == 2 * size:
            j = 0
            while j < n:
                left = 2 * (n - j) - 1  # elements up to the last that is wanted
                at = s + j * step
                if left >= 2 * lanes:
                    v = even_lanes(load(e, at), load(e, at + e.bytes))
                else:
                    v = even_lanes(load_n(e, at, min(lanes, left)), load_n(e, at + e.bytes, max(0, left - lanes)))
                store(p, d + j * ps, v)
                j += lanes
        else:
            for j in range(n):
                store_scalar(p, d + j * ps, load_scalar(e, s + j * step))
    return zeros, copy_stepped


def _packers(e: Any) -> Any:
    """(pack_columns, pack_rows): a block of the image as rows of k, each of positions; as rows of positions, each of k."""
    p = compute_elem(e)
    lanes, size, ps = e.lanes, e.size, p.size

    @outline
    def clear(d, n, many, d_step, exact):
        """n zeros in each of many rows; unless ``exact``, whole vectors"""
        whole = n - n % lanes
        for _ in range(many):
            for j in range(0, whole, lanes):
                store(p, d + j * ps, spread(p, 0.0))
            if whole < n:
                if exact:
                    store_n(p, d + whole * ps, spread(p, 0.0), n - whole)
                else:
                    store(p, d + whole * ps, spread(p, 0.0))
            d += d_step

    @outline
    def move(d, s, n, step, many, d_step, s_step, exact):
        """n elements to each of many rows, from sources s_step apart"""
        whole = n - n % lanes
        rest = n - whole
        if step == size:
            for _ in range(many):
                for j in range(0, whole, lanes):
                    store(p, d + j * ps, load(e, s + j * size))
                if rest > 0:
                    v = load_n(e, s + whole * size, rest)
                    if exact:
                        store_n(p, d + whole * ps, v, rest)
                    else:
                        store(p, d + whole * ps, v)
                d += d_step
                s += s_step
        elif step == 2 * size:
            left = 2 * (n - whole) - 1  # elements up to the last that is wanted, in the last vector
            if rest == 0:  # the last vector's last pair is half a pair
                whole, rest, left = whole - lanes, lanes, 2 * lanes - 1
            for _ in range(many):
                for j in range(0, whole, lanes):
                    store(p, d + j * ps, even_lanes(load(e, s + j * step), load(e, s + j * step + e.bytes)))
                at = s + whole * step
                v = even_lanes(load_n(e, at, min(lanes, left)), load_n(e, at + e.bytes, max(0, left - lanes)))
                if exact:
                    store_n(p, d + whole * ps, v, rest)
                else:
                    store(p, d + whole * ps, v)
                d += d_step
                s += s_step
        else:
            for _ in range(many):
                for j in range(n):
                    store_scalar(p, d + j * ps, load_scalar(e, s + j * step))
                d += d_step
                s += s_step

    @outline
    def pack_columns(geo, x, table, count, k0, k, dst, row):
        """k = (channel, tap) from k0 on, positions as the meetings have them; rows ``row`` bytes apart.

        For each tap and run all channels at once. What is written past the end of a row, of at least one vector, is the next
        tap's, which comes later; only behind the last tap the next row is already there.
        """
        taps, x_c, step = max(1, get(geo, _TAPS)), get(geo, _XC), get(geo, _SW) * get(geo, _XW)
        for t in range(taps):
            c = (k0 - t + taps - 1) // taps
            many = (k0 + k - t + taps - 1) // taps - c
            if many > 0:
                d, d_step = dst + (c * taps + t - k0) * row, taps * row
                end = d + row
                for r in range(count):
                    at = table + (t * count + r) * MEETING
                    before, n, after = get(at, 8), get(at, 16), get(at, 24)
                    exact = t == taps - 1 and d + (before + n + after + lanes) * ps > end
                    if before > 0:
                        clear(d, before, many, d_step, exact)
                    d += before * ps
                    if n > 0:
                        move(d, x + c * x_c + get(at, 0), n, step, many, d_step, x_c, exact)
                    d += n * ps
                    if after > 0:
                        clear(d, after, many, d_step, exact)
                    d += after * ps

    @outline
    def pack_rows(geo, x, runs, count, k0, k, dst, row):
        """positions of the runs, k = (tap, channel) from k0 on; a tap spans SPAN neighbouring taps of the filter.

        For each run and tap all positions at once, first those whose tap leaves the image; the order is as in pack_columns.
        """
        channels, span, taps = get(geo, _C), get(geo, _SPAN), get(geo, _TAP)
        width, sw, xw = get(geo, _W), get(geo, _SW), get(geo, _XW)
        length = max(1, channels * span)
        for r in range(count):
            run = runs + r * RUN
            many = get(run, 32)
            for t in range(k0 // length, (k0 + k + length - 1) // length):
                tap = taps + t * 24
                first, end = max(0, k0 - t * length), min(length, k0 + k - t * length)
                to, n = dst + (t * length + first - k0) * ps, end - first
                exact = t * length + end + lanes > k0 + k
                d, h, w = get(run, 8) + get(tap, 0), get(run, 16) + get(tap, 8), get(run, 24) + get(tap, 16)
                if d < 0 or d >= get(geo, _D) or h < 0 or h >= get(geo, _H):
                    clear(to, n, many, row, exact)
                else:
                    s = x + get(run, 0) + d * get(geo, _XD) + h * get(geo, _XH) + w * xw
                    j0 = min(many, (sw - 1 - w) // sw) if w < 0 else 0
                    j1 = max(j0, min(many, (width - span - w) // sw + 1)) if width - span - w >= 0 else j0
                    for j in range(many):
                        if j < j0 or j >= j1:
                            place = w + j * sw
                            low = min(end, max(first, min(span, max(0, -place)) * channels))
                            high = max(low, min(end, max(0, min(span, width - place)) * channels))
                            clear(to + j * row, low - first, 1, row, True)
                            move(to + j * row + (low - first) * ps, s + j * sw * xw + low * size, high - low, size, 1, row, 0,
                                 True)
                            clear(to + j * row + (high - first) * ps, end - high, 1, row, True)
                    if j1 > j0:
                        move(to + j0 * row, s + j0 * sw * xw + first * size, n, size, j1 - j0, row, sw * xw, exact)
            dst += many * row
    return pack_columns, pack_rows


def finisher(e: Any) -> Any:
    """finish(…): the last step, from sums to the output."""
    p = compute_elem(e)
    lanes, ps, size = p.lanes, p.size, e.size

    @outline
    def finish(n, src, dst, step, bias, bias_step, res, act, p0, p1):
        """n sums at src, with bias, residual and activation, to dst; the residual lies as the output does"""
        if res != 0 and step != size:
            for j in range(n):
                store_scalar(p, src + j * ps, load_scalar(p, src + j * ps) + load_scalar(e, res + j * step))
        for place in range(0, n, lanes):  # the last vector overlaps the one before: storing with a mask takes 20 cycles (Zen 3)
            j = min(place, n - lanes) if n >= lanes and step == size else place
            m = min(lanes, n - j)
            v = load(p, src + j * ps)
            if bias != 0:
                v = v + (load_n(e, bias + j * size, m) if bias_step != 0 else spread(p, load_scalar(e, bias)))
            if res != 0 and step == size:
                v = v + load_n(e, res + j * size, m)
            if act != 0:
                v = apply(act, v, p0, p1)
            if step != size:
                store_n(p, src + j * ps, v, m)
            elif m == lanes:
                store(e, dst + j * size, v)
            else:
                store_n(e, dst + j * size, v, m)
        if step != size:
            for j in range(n):
                store_scalar(e, dst + j * step, load_scalar(p, src + j * ps))
    return finish


def by_width(t1: Any, t2: Any, t3: Any) -> Any:
    """run(vecs, …): multiply_blocks by that of three tiles which has so many vectors"""
    @inline
    def run(vecs, blocks, k, stretch, a, a_row, a_k, a_step, b, b_k, init, init_row, init_step, c, c_row, c_step, last, ahead,
            ahead_k):
        rest = (blocks, k, stretch, a, a_row, a_k, a_step, b, b_k, init, init_row, init_step, c, c_row, c_step, last, ahead,
                ahead_k)
        if vecs == 3:
            multiply_blocks(t3, *rest)
        elif vecs == 2:
            multiply_blocks(t2, *rest)
        else:
            multiply_blocks(t1, *rest)
    return run


def convolution(elem_name: str) -> Any:
    """All three kinds in one kernel, because they share the tiles; ``conv_fields`` lists what ``geo`` points to."""
    e = ELEMS[elem_name]
    p = compute_elem(e)
    lanes, ps, size = p.lanes, p.size, e.size
    run_tiles = tiles(p, False, False)
    pack = packer(e)
    pack_columns, pack_rows = _packers(e)
    finish = finisher(e)

    @inline
    def tile_rows(left):
        return 8 if ROWS == 8 and left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1

    @outline
    def planes(geo, m0, m1, v0, v1, x, w, y, bias, res, act, p0, p1, ws):
        """Output channels m0 … m1 of a group at vectors v0 … v1 of positions"""
        total = get(geo, _N) * get(geo, _OD) * get(geo, _OH) * get(geo, _OW)
        k, depth, width = get(geo, _C) * get(geo, _TAPS), get(geo, _DEPTH), get(geo, _WIDTH)
        wr, wk = get(geo, _WR), get(geo, _WK)
        runs, outs, table, table_size = ws + get(geo, _AT_RUNS), ws + get(geo, _AT_OUTS), ws + get(geo, _AT_MEET), get(geo, _MEET)
        sums, sums_row, packed = ws + get(geo, _AT_SUMS), get(geo, _SUMS), ws + get(geo, _AT_PACK)
        for v in range(v0, v1, width):
            vectors = min(width, v1 - v)
            panels = (vectors + VECS - 1) // VECS
            first, n = v * lanes, min(vectors * lanes, total - v * lanes)
            outputs = find_outputs(geo, runs, find_runs(geo, first, n, runs), outs)
            for q in range(panels):
                c0, c1 = vectors * q // panels * lanes, vectors * (q + 1) // panels * lanes
                count = find_runs(geo, first + c0, min(c1, n) - c0, runs)
                put(ws, 8 * q, count)
                find_meetings(geo, runs, count, table + q * table_size)
            k0 = 0
            while True:
                kn = min(depth, k - k0)
                final = k0 + kn >= k
                for q in range(panels):
                    c0, c1 = vectors * q // panels * lanes, vectors * (q + 1) // panels * lanes
                    pack_columns(geo, x, table + q * table_size, get(ws, 8 * q), k0, kn, packed + c0 * kn * ps, (c1 - c0) * ps)
                i = m0
                while i < m1:
                    rows = tile_rows(m1 - i)
                    at = sums + ((i - m0) * sums_row if k > depth else 0)
                    for q in range(panels):
                        c0, c1 = vectors * q // panels * lanes, vectors * (q + 1) // panels * lanes
                        c = at + c0 * ps
                        b = packed + c0 * kn * ps
                        run_tiles(rows, (c1 - c0) // lanes, 0, 1, kn, w + i * wr + k0 * wk, wr, wk, b, (c1 - c0) * ps,
                                  c if k0 > 0 else 0, sums_row if k0 > 0 else 0, c, sums_row, b, 0)
                    if final:
                        for r in range(rows):
                            o = (i + r) * get(geo, _YO)
                            b = bias + (i + r) * size if bias != 0 else 0
                            for out in range(outputs):
                                run = outs + out * OUT
                                offset = o + get(run, 16)
                                finish(get(run, 8), at + r * sums_row + get(run, 0) * ps, y + offset, get(geo, _YW), b, 0,
                                       res + offset if res != 0 else 0, act, p0, p1)
                    i += rows
                k0 += kn
                if final:
                    break

    @outline
    def shallow(geo, m0, m1, v0, v1, x, w, y, bias, res, act, p0, p1, ws):
        """As planes, k undivided: a block's positions are packed at once, a row of k in one piece, and where the output's lie
        next to each other too the tiles write them there, starting from the bias"""
        total = get(geo, _N) * get(geo, _OD) * get(geo, _OH) * get(geo, _OW)
        k, width = get(geo, _C) * get(geo, _TAPS), get(geo, _WIDTH)
        wr, wk, yo, yw = get(geo, _WR), get(geo, _WK), get(geo, _YO), get(geo, _YW)
        runs, outs, table = ws + get(geo, _AT_RUNS), ws + get(geo, _AT_OUTS), ws + get(geo, _AT_MEET)
        sums, row, packed = ws + get(geo, _AT_SUMS), get(geo, _SUMS), ws + get(geo, _AT_PACK)
        biases, bias_row = ws + get(geo, _AT_BIAS), VECS * lanes * ps
        for i in range(m1 - m0 if bias != 0 else 0):
            for j in range(VECS):
                store(p, biases + i * bias_row + j * p.bytes, spread(p, load_scalar(p, bias + (m0 + i) * ps)))
        for v in range(v0, v1, width):
            vectors = min(width, v1 - v)
            panels = (vectors + VECS - 1) // VECS
            n = min(vectors * lanes, total - v * lanes)
            count = find_runs(geo, v * lanes, n, runs)
            outputs = find_outputs(geo, runs, count, outs)
            find_meetings(geo, runs, count, table)
            pack_columns(geo, x, table, count, 0, k, packed, row)
            whole = outputs == 1 and yw == size and n == vectors * lanes
            i = m0
            while i < m1:
                rows = tile_rows(m1 - i)
                at, at_row = (y + i * yo + get(outs, 16), yo) if whole else (sums, row)
                for q in range(panels):
                    c0, c1 = vectors * q // panels * lanes, vectors * (q + 1) // panels * lanes
                    run_tiles(rows, (c1 - c0) // lanes, 0, 1, k, w + i * wr, wr, wk, packed + c0 * ps, row,
                              biases + (i - m0) * bias_row if bias != 0 else 0, bias_row, at + c0 * ps, at_row, packed, 0)
                for r in range(rows if not whole or act != 0 or res != 0 else 0):
                    for out in range(outputs):
                        run = outs + out * OUT
                        offset = (i + r) * yo + get(run, 16)
                        finish(get(run, 8), at + r * at_row + get(run, 0) * ps, y + offset, yw, 0, 0,
                               res + offset if res != 0 else 0, act, p0, p1)
                i += rows

    @outline
    def pixels(geo, p_first, p_end, q0, q1, x, w, y, bias, res, act, p0, p1, ws):
        """Panels q0 … q1 of a group's output channels at positions p_first … p_end"""
        k, depth, width, channels = get(geo, _C) * get(geo, _TAPS), get(geo, _DEPTH), get(geo, _WIDTH), get(geo, _O)
        k *= get(geo, _SPAN)
        vectors, cut, direct = (channels + lanes - 1) // lanes, get(geo, _PANELS), get(geo, _DIRECT)
        v0 = q0 * vectors // cut
        o0, o1 = v0 * lanes, min(channels, q1 * vectors // cut * lanes)
        runs, sums, sums_row, packed = ws + get(geo, _AT_RUNS), ws + get(geo, _AT_SUMS), get(geo, _SUMS), ws + get(geo, _AT_PACK)
        for first in range(p_first, p_end, width):
            n = min(width, p_end - first)
            count = find_runs(geo, first, n, runs)
            k0 = 0
            while True:
                kn = min(depth, k - k0)
                if direct:
                    a, a_row, a_k = x + first * get(geo, _XW) + k0 * size, get(geo, _XW), size
                else:
                    pack_rows(geo, x, runs, count, k0, kn, packed, kn * ps)
                    a, a_row, a_k = packed, kn * ps, ps
                for q in range(q0, q1):
                    v = q * vectors // cut
                    vecs = (q + 1) * vectors // cut - v
                    b = w + (v * lanes * k + k0 * vecs * lanes) * ps
                    i = 0
                    while i < n:
                        rows = tile_rows(n - i)
                        blocks = (n - i) // ROWS if rows == ROWS else 1
                        c = sums + i * sums_row + (v - v0) * lanes * ps
                        run_tiles(rows, vecs, 0, blocks, kn, a + i * a_row, a_row, a_k, b, vecs * lanes * ps,
                                  c if k0 > 0 else 0, sums_row if k0 > 0 else 0, c, sums_row, b, 0)
                        i += rows * blocks
                k0 += kn
                if k0 >= k:
                    break
            i = 0
            for r in range(count):
                run = runs + r * RUN
                for j in range(get(run, 32)):
                    offset = get(run, 40) + j * get(geo, _YW) + o0 * size
                    finish(o1 - o0, sums + i * sums_row, y + offset, size, bias + o0 * size if bias != 0 else 0, size,
                           res + offset if res != 0 else 0, act, p0, p1)
                    i += 1

    @outline
    def weights(geo, r0, r1, x, grad, out, last, ws):
        """Rows r0 … r1 of k of a group's weight gradient. ``last``: channels are last in the image"""
        k_all = get(geo, _C) * get(geo, _TAPS) * get(geo, _SPAN)
        channels, width, depth = get(geo, _O), get(geo, _WIDTH), get(geo, _DEPTH)
        yn, yo, yw = get(geo, _YN), get(geo, _YO), get(geo, _YW)
        vectors = (channels + lanes - 1) // lanes
        panels = (vectors + VECS - 1) // VECS
        images = get(geo, _N)
        each = get(geo, _OD) * get(geo, _OH) * get(geo, _OW)
        if yn == each * yw:
            images, each = 1, images * each
        runs, table, sums, sums_row = ws + get(geo, _AT_RUNS), ws + get(geo, _AT_MEET), ws + get(geo, _AT_SUMS), get(geo, _SUMS)
        columns = ws + get(geo, _AT_PACK)
        gradients = ws + get(geo, _AT_OUTS)
        begun = False
        for image in range(images):
            for p_first in range(0, each, width):
                n = min(width, each - p_first)
                count = find_runs(geo, image * each + p_first, n, runs)
                if not last:
                    find_meetings(geo, runs, count, table)
                for q in range(panels):
                    v = q * vectors // panels
                    vecs = (q + 1) * vectors // panels - v
                    pack(grad + image * yn + p_first * yw + v * lanes * yo, yo, yw, min(vecs * lanes, channels - v * lanes), n,
                         gradients + v * lanes * n * ps, vecs * lanes)
                for row in range(r0, r1, depth):
                    rn = min(depth, r1 - row)
                    if last:
                        pack_rows(geo, x, runs, count, row, rn, columns, rn * ps)
                        a_row, a_k = ps, rn * ps
                    else:
                        a_row, a_k = (n + lanes - 1) // lanes * lanes * ps, ps
                        pack_columns(geo, x, table, count, row, rn, columns, a_row)
                    for q in range(panels):
                        v = q * vectors // panels
                        vecs = (q + 1) * vectors // panels - v
                        i = 0
                        while i < rn:
                            rows = tile_rows(rn - i)
                            blocks = (rn - i) // ROWS if rows == ROWS else 1
                            c = sums + (row - r0 + i) * sums_row + v * lanes * ps
                            b = gradients + v * lanes * n * ps
                            run_tiles(rows, vecs, 0, blocks, n, columns + i * a_row, a_row, a_k, b, vecs * lanes * ps,
                                      c if begun else 0, sums_row if begun else 0, c, sums_row, b, 0)
                            i += rows * blocks
                begun = True
        square = columns
        for i in range(r0, r1, lanes):
            m = min(lanes, r1 - i)
            for o in range(0, channels, lanes):
                on = min(lanes, channels - o)
                _transpose_part(p, sums + (i - r0) * sums_row + o * ps, sums_row, square, p.bytes, m, on)
                for j in range(on):
                    store_n(e, out + (o + j) * k_all * size + i * size, load(p, square + j * p.bytes), m)

    @inline
    def body(t, nt, kind, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size):
        parts, cuts = get(geo, _PARTS), get(geo, _CUTS)
        groups, channels = get(geo, _G), get(geo, _O)
        total = get(geo, _N) * get(geo, _OD) * get(geo, _OH) * get(geo, _OW)
        k = get(geo, _C) * get(geo, _TAPS) * get(geo, _SPAN)
        tasks = groups * parts * cuts
        mine = ws + t * ws_size
        for task in range(tasks * t // nt, tasks * (t + 1) // nt):
            g = task // (parts * cuts)
            rest = task - g * (parts * cuts)
            i = rest // cuts
            j = rest - i * cuts
            xg, wg, yg = x + g * get(geo, _C) * get(geo, _XC), w + g * get(geo, _WG), y + g * channels * get(geo, _YO)
            bg = bias + g * channels * size if bias != 0 else 0
            rg = res + g * channels * get(geo, _YO) if res != 0 else 0
            if kind == 0:
                units, vectors = (channels + ROWS - 1) // ROWS, (total + lanes - 1) // lanes
                m0, m1 = units * i // parts * ROWS, min(channels, units * (i + 1) // parts * ROWS)
                v0, v1 = vectors * j // cuts, vectors * (j + 1) // cuts
                if ps == size and get(geo, _AT_BIAS) < get(geo, _AT_SUMS):  # there is room for biases
                    shallow(geo, m0, m1, v0, v1, xg, wg, yg, bg, rg, act, p0, p1, mine)
                else:
                    planes(geo, m0, m1, v0, v1, xg, wg, yg, bg, rg, act, p0, p1, mine)
            elif kind == 1:
                units, panels = (total + ROWS - 1) // ROWS, get(geo, _PANELS)
                pixels(geo, units * i // parts * ROWS, min(total, units * (i + 1) // parts * ROWS),
                       panels * j // cuts, panels * (j + 1) // cuts, xg, wg, yg, bg, rg, act, p0, p1, mine)
            else:
                units = (k + ROWS - 1) // ROWS
                weights(geo, units * i // parts * ROWS, min(k, units * (i + 1) // parts * ROWS), xg, yg,
                        w + g * channels * k * size, kind == 3, mine)

    def kernel(nt, kind, geo, x, w, y, bias, res, act, ws, ws_size, p0, p1):
        parallel(nt, body, (kind, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size))
    return kernel


def arrange(elem_name: str) -> Any:
    """A weight in the compute type: rows of k = (channel, tap) as ``planes`` reads them; with ``panels``, as ``pixels`` does.

    Element (group g, output o, channel c, tap t) lies at ``src + g·s_g + o·s_o + c·s_c + offsets[t]``.
    """
    e = ELEMS[elem_name]
    p = compute_elem(e)
    lanes = p.lanes
    pack = packer(e)

    @inline
    def body(t, nt, groups, outputs, channels, taps, panels, src, s_g, s_o, s_c, offsets, dst):
        k = channels * taps
        if panels > 0:
            vectors = (outputs + lanes - 1) // lanes
            for task in range(groups * panels * t // nt, groups * panels * (t + 1) // nt):
                g = task // panels
                q = task - g * panels
                v = q * vectors // panels
                vecs = (q + 1) * vectors // panels - v
                at = dst + (g * vectors + v) * lanes * k * p.size
                for tap in range(taps):
                    pack(src + g * s_g + v * lanes * s_o + load_scalar(INT64, offsets + tap * 8), s_o, s_c,
                         min(vecs * lanes, outputs - v * lanes), channels, at + tap * channels * vecs * lanes * p.size,
                         vecs * lanes)
        else:
            rows = groups * outputs
            for row in range(rows * t // nt, rows * (t + 1) // nt):
                g = row // outputs
                s = src + g * s_g + (row - g * outputs) * s_o
                d = dst + row * k * p.size
                for _ in range(channels):
                    for tap in range(taps):
                        store_scalar(p, d, load_scalar(e, s + load_scalar(INT64, offsets + tap * 8)))
                        d += p.size
                    s += s_c

    def kernel(nt, groups, outputs, channels, taps, panels, src, s_g, s_o, s_c, offsets, dst):
        parallel(nt, body, (groups, outputs, channels, taps, panels, src, s_g, s_o, s_c, offsets, dst))
    return kernel
