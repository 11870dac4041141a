"""Winograd's convolution of 3 × 3 filters, as compiled: 30 multiplications for 3 × 4 outputs where the plain sum takes 108, or 24
for 2 × 4. Of a filter with several such planes, as in three dimensions, each meets the input's transformed planes. One row of
taps is as many planes of three, each of which meets the input further along: 6 multiplications for 4 outputs and 12 products.

Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A for each 5 × 6 tile d of the image (Lavin & Gray 2016, "Fast algorithms for convolutional neural
networks", section 4). Over the channels, each of the 30 *places* of a transformed tile is a product of matrices: rows are tiles,
columns are output channels, and the register tile computes it. A block of tiles at a time is transformed into a thread's own
memory, multiplied, and transformed back.

A dilated convolution of step d falls apart into d · d dense ones, of every d-th row and pixel, which share nothing: their tiles
are numbered so that neighbours begin at neighbouring pixels, and a row is still read and written in one piece.

What is lost to rounding, and how it is kept as low as the plain sum's (Barabasz et al. 2020, "Error analysis and improving the
accuracy of Winograd convolution for deep neural networks"): the points of evaluation are those where Σ Aᵢ² |Bᵢ|² |Gᵢ|², by which
variances grow, is least: 7.1 for four outputs, 3.2 for three, 1.7 for two; with the textbook's 0, ±1, ±2 it is 31 for four. Both
sides' multiply. The filter is transformed in float64. A chain of sums is short, for the sums' own rounding is most of the error.

An Inf or NaN, or an overflow on the way, would reach all outputs of its tile. The kernel says so and the caller starts anew in
the plain way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .conv_code import by_width, finisher, get
from .conv_fields import WINOGRAD
from .engine.region import parallel, parallel_tasks
from .engine.simd import (
    FLOAT32,
    INT64,
    any_lane,
    i32,
    i64,
    inline,
    load_scalar,
    load_vector,
    multiply_add,
    outline,
    spread,
    store,
    store_scalar,
    store_vector,
)
from .engine.tile import Tile, tile_size

ROWS, VECS = tile_size()
(_N, _C, _O, _D, _H, _W, _OD, _OH, _OW, _PD, _PH, _PW, _DH, _DW, _TAPS, _SHIFT, _XN, _XC, _XD, _XH, _XW, _YN, _YO, _YD, _YH,
 _YW, _TH, _TW, _BLOCK, _BAND, _SLOTS, _STRETCH, _CUTS, _PANELS, _GROUPS, _SETS, _SET, _CHAIN, _X_LAST, _Y_LAST, _WIDTH,
 _PLACE, _M_PLACE, _M_GROUP, _AT_SEGMENTS, _AT_ZEROS, _AT_LINES, _AT_V, _AT_M) = (8 * i for i in range(len(WINOGRAD)))
PAD = 320  # bytes between the places of a transformed weight: no two of 30 streams in one set of L1
SEGMENT = 120  # bytes: first and end of what is within the image, the line, six addresses, six steps to the next channel


class Side:
    """F(n, size) along one dimension, by Cook and Toom: interpolation through the points and infinity. Every point but 0 is
    followed by its negative.

    Attributes:
        n, taps, size: outputs and inputs of a tile, taps of the filter.
        a_t, g, b_t: the matrices Aᵀ, G and Bᵀ.
    """

    def __init__(self, size: int, *points: Fraction) -> None:
        self.size, self.taps = size, len(points) + 1
        self.n = self.taps - size + 1
        self.g, self.b_t = [], []
        for i, p in enumerate(points):
            others = points[:i] + points[i + 1 :]
            scale = math.prod(p - q for q in others)
            self.b_t.append(self._polynomial(others))
            self.g.append([p**k / scale for k in range(size)])
        self.b_t.append(self._polynomial(points))
        self.g.append([Fraction(k == size - 1) for k in range(size)])
        self.a_t = [[p**k for p in points] + [Fraction(k == self.n - 1)] for k in range(self.n)]
        self.pairs = [i for i, p in enumerate(points) if p > 0]

    def _polynomial(self, roots: Sequence[Fraction]) -> list[Fraction]:
        c = [Fraction(1)]
        for root in roots:
            c = [a - root * b for a, b in zip([Fraction(0), *c], [*c, Fraction(0)], strict=True)]
        return c + [Fraction(0)] * (self.taps - len(c))

    def into(self, builder: ir.IRBuilder, d: list[Any]) -> list[Any]:
        """Bᵀ d. The rows of points p and -p share what is even and what is odd in p."""
        out = {}
        for i, row in enumerate(self.b_t):
            if i in self.pairs:
                degree = self.taps - 2
                even = _sum(builder, [(row[j], d[j]) for j in range(degree, -1, -2)])
                odd = _sum(builder, [(row[j] / row[degree - 1], d[j]) for j in range(degree - 1, -1, -2)])
                for k, sign in enumerate((1, -1)):
                    factor = ir.Constant(odd.type, [float(sign * row[degree - 1])] * odd.type.count)
                    out[i + k] = multiply_add(builder, odd, factor, even)
            elif i not in out:
                out[i] = _sum(builder, list(zip(row, d, strict=True)))
        return [out[i] for i in range(self.taps)]

    def back(self, builder: ir.IRBuilder, m: list[Any]) -> list[Any]:
        """Aᵀ m, by sums and differences of what belongs to p and -p"""
        sums = {i: (builder.fadd(m[i], m[i + 1]), builder.fsub(m[i], m[i + 1])) for i in self.pairs}
        single = [i for i in range(self.taps) if i not in sums and i - 1 not in sums]
        return [_sum(builder, [(row[i], m[i]) for i in single] + [(row[i], sums[i][k % 2]) for i in self.pairs])
                for k, row in enumerate(self.a_t)]


ONE, A, B, C, D = Fraction(1), Fraction(11, 16), Fraction(23, 16), Fraction(13, 32), Fraction(5, 4)
_FOUR = Side(3, Fraction(0), A, -A, B, -B)
#: Down and along. With two rows errors are less by a third, with one there is one row of taps; the last is for 2 × 2 taps.
TILES = {"1x4": (Side(1), _FOUR), "2x4": (Side(3, Fraction(0), ONE, -ONE), _FOUR), "3x4": (Side(3, C, -C, D, -D), _FOUR),
         "2x2_of_4": (Side(2, ONE, -ONE), Side(2, ONE, -ONE))}


# Transforms ----------------------------------------------------------------------------------------------------------


def _sum(builder: ir.IRBuilder, terms: list[tuple[Fraction, Any]]) -> Any:
    """Σ c·v, the terms with a factor of 1 first"""
    terms = sorted((t for t in terms if t[0] != 0), key=lambda t: t[0] != 1)
    total = None
    for c, v in terms:
        factor = ir.Constant(v.type, [float(c)] * v.type.count)
        if total is None:
            total = v if c == 1 else builder.fmul(v, factor)
        elif c == 1:
            total = builder.fadd(total, v)
        else:
            total = multiply_add(builder, v, factor, total)
    return total


def _quads(builder: ir.IRBuilder, tiles: list[Any], offset: int) -> list[Any]:
    """Lane t of vector j is float j behind tiles[t] + offset, for j < 4: four floats a load, transposed four by four."""
    rows = []
    for t in range(4):
        quads = []
        for tile in tiles[t::4]:
            place = builder.add(tile, i64(offset))
            quads.append(builder.load(builder.inttoptr(place, ir.VectorType(ir.FloatType(), 4).as_pointer())))
            quads[-1].align = 4
        while len(quads) > 1:
            count = 2 * quads[0].type.count
            index = ir.Constant(ir.VectorType(i32, count), list(range(count)))
            quads = [builder.shuffle_vector(a, b, index) for a, b in zip(quads[::2], quads[1::2], strict=True)]
        rows.append(quads[0])
    return _transpose_quads(builder, rows)


def _gathered(builder: ir.IRBuilder, tiles: list[Any], offset: Any) -> Any:
    """Lane t is the float at tiles[t] + offset."""
    v = ir.Constant(FLOAT32.vector.llvm, ir.Undefined)
    for k, tile in enumerate(tiles):
        address = builder.inttoptr(builder.add(tile, offset), FLOAT32.memory.as_pointer())
        v = builder.insert_element(v, builder.load(address), i32(k))
    return v


def _transpose_quads(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """4 × 4 squares of four vectors, each square transposed"""
    lanes = rows[0].type.count

    def shuffle(a: Any, b: Any, pick: list[int]) -> Any:  # of each square's (a0 a1 a2 a3 b0 b1 b2 b3)
        index = [q + p if p < 4 else lanes + q + p - 4 for q in range(0, lanes, 4) for p in pick]
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, lanes), index))
    low, high = [0, 4, 1, 5], [2, 6, 3, 7]
    a, b, c, d = rows
    t = [shuffle(a, b, low), shuffle(c, d, low), shuffle(a, b, high), shuffle(c, d, high)]
    return [shuffle(t[k], t[k + 1], pick) for k in (0, 2) for pick in ([0, 1, 4, 5], [2, 3, 6, 7])]


def _interleave(builder: ir.IRBuilder, a: Any, b: Any) -> list[Any]:
    """Both vectors' lanes by turns, in two vectors"""
    n = a.type.count
    return [builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, n), [k // 2 + n * (k % 2) for k in range(s, s + n)]))
            for s in (0, n)]


def _store_parts(builder: ir.IRBuilder, address: Any, value: Any, width: int, step: Any) -> None:
    """The vector's stretches of ``width`` lanes, ``step`` bytes apart"""
    if value.type.count <= width:
        store_vector(builder, FLOAT32, address, value)
        return
    for k in range(value.type.count // width):
        index = ir.Constant(ir.VectorType(i32, width), list(range(k * width, (k + 1) * width)))
        part = builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), index)
        place = builder.inttoptr(builder.add(address, builder.mul(step, i64(k))), part.type.as_pointer())
        builder.store(part, place).align = 4


def _transform_rows(down: Side) -> tuple[Any, Any]:
    def transform(builder: ir.IRBuilder, rows: Any, offset: Any, n: Any, dst: Any, dst_row: Any) -> None:
        first = builder.inttoptr(rows, i64.as_pointer())
        each = [builder.add(builder.load(builder.gep(first, [i64(i)])), offset) for i in range(down.taps)]
        for i, v in enumerate(down.into(builder, [load_vector(builder, FLOAT32, row, n) for row in each])):
            store_vector(builder, FLOAT32, builder.add(dst, builder.mul(dst_row, i64(i))), v)

    def whole(typingctx, rows, offset, dst, dst_row):
        """transform_rows(rows, offset, dst, dst_row): Bᵀ along a tile's rows, their addresses at ``rows``; one vector of each"""
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            rows, offset, dst, dst_row = args
            transform(builder, rows, offset, None, dst, dst_row)
            return context.get_dummy_value()
        return types.none(*(types.int64,) * 4), codegen

    def some(typingctx, rows, offset, n, dst, dst_row):
        """transform_rows_n(rows, offset, n, dst, dst_row): the same of a vector's first n lanes, zeros in the others"""
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            transform(builder, *args)
            return context.get_dummy_value()
        return types.none(*(types.int64,) * 5), codegen
    return intrinsic(whole), intrinsic(some)


def _transform_columns(side: Side, dense: bool) -> Any:
    def fn(typingctx, line, tiles, step, dst, dst_place, dst_group):
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            line, tiles, step, dst, dst_place, dst_group = args
            first = builder.inttoptr(tiles, i64.as_pointer())
            each = [builder.add(line, builder.load(builder.gep(first, [i64(t)]))) for t in range(FLOAT32.lanes)]
            if dense:
                d = [v for k in range(0, side.taps, 4) for v in _quads(builder, each, 4 * k)][: side.taps]
            else:
                d = [_gathered(builder, each, builder.mul(step, i64(j))) for j in range(side.taps)]
            for j, v in enumerate(side.into(builder, d)):
                _store_parts(builder, builder.add(dst, builder.mul(dst_place, i64(j))), v, ROWS, dst_group)
            return context.get_dummy_value()
        return types.none(*(types.int64,) * 6), codegen
    fn.__doc__ = """transform_columns(line, tiles, step, dst, dst_place, dst_group): Bᵀ along a row, for as many tiles as
    lanes, whose offsets are at ``tiles``, their pixels ``step`` bytes apart; place j goes to dst + j · dst_place, in groups of
    the register tile's rows, dst_group apart"""
    return intrinsic(fn)


def _transform_pixels(down: Side, side: Side) -> Any:
    def fn(typingctx, pixels, offset, dst, dst_place):
        """transform_pixels(pixels, offset, dst, dst_place): Bᵀ d B of a vector of channels of a tile's pixels, their addresses at
        ``pixels``"""
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            pixels, offset, dst, dst_place = args
            first = builder.inttoptr(pixels, i64.as_pointer())
            columns = [down.into(builder, [
                load_vector(builder, FLOAT32, builder.add(builder.load(builder.gep(first, [i64(i * side.taps + j)])), offset))
                for i in range(down.taps)]) for j in range(side.taps)]
            for i in range(down.taps):
                for j, v in enumerate(side.into(builder, [column[i] for column in columns])):
                    place = builder.mul(dst_place, i64(i * side.taps + j))
                    store_vector(builder, FLOAT32, builder.add(dst, place), v)
            return context.get_dummy_value()
        return types.none(*(types.int64,) * 4), codegen
    return intrinsic(fn)


def _transform_back(down: Side, side: Side, last: bool, dense: bool) -> Any:
    def fn(typingctx, seen, src, src_place, dst, dst_row, dst_pixel, dst_channel):
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            seen, src, src_place, dst, dst_row, dst_pixel, dst_channel = args
            places = [[builder.add(src, builder.mul(src_place, i64(i * side.taps + j))) for i in range(down.taps)]
                      for j in range(side.taps)]
            columns = [down.back(builder, [load_vector(builder, FLOAT32, place) for place in column]) for column in places]
            zero = ir.Constant(seen.type, [0.0] * FLOAT32.lanes)
            for r in range(down.n):
                row = side.back(builder, [column[r] for column in columns])
                for v in row:
                    seen = multiply_add(builder, v, zero, seen)
                if dense and not last:
                    row = _transpose_quads(builder, row) if side.n == 4 else _interleave(builder, *row)
                at = builder.add(dst, builder.mul(dst_row, i64(r)))
                for j, v in enumerate(row):
                    if last:
                        store_vector(builder, FLOAT32, builder.add(at, builder.mul(dst_pixel, i64(j))), v)
                    elif dense and side.n == 4:
                        place = builder.add(at, builder.mul(dst_channel, i64(j)))
                        _store_parts(builder, place, v, 4, builder.mul(dst_channel, i64(4)))
                    elif dense:
                        place = builder.add(at, builder.mul(dst_channel, i64(j * FLOAT32.lanes // 2)))
                        _store_parts(builder, place, v, 2, dst_channel)
                    else:
                        place = builder.add(at, builder.mul(dst_pixel, i64(j)))
                        _store_parts(builder, place, v, 1, dst_channel)
            return seen
        return FLOAT32.vector(FLOAT32.vector, *(types.int64,) * 6), codegen
    fn.__doc__ = """transform_back(seen, src, src_place, dst, dst_row, dst_pixel, dst_channel) -> seen, NaN where an output was
    not finite.

    Aᵀ m A of a vector of channels of one tile. Row r goes to dst + r · dst_row; for channels last as a vector for each of four
    pixels (or two, as many as the tile has), dst_pixel apart; else as four floats of each channel, dst_channel apart, which are
    neighbours if ``dense``."""
    return intrinsic(fn)


def _transform_filter(down: Side, side: Side) -> Any:
    def fn(typingctx, src, o, last, s_o, taps, along, dst, dst_place):
        """transform_filter(src, o, last, s_o, taps, along, dst, dst_place): G g Gᵀ for a vector of outputs from o on (after
        ``last``, that one again), in float64; taps from ``along`` on along a row are zeros."""
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            src, o, last, s_o, taps, along, dst, dst_place = args
            lanes = FLOAT32.lanes
            wide = ir.VectorType(ir.DoubleType(), lanes)
            offsets = builder.inttoptr(taps, i64.as_pointer())
            starts = []
            for k in range(lanes):
                n = builder.add(o, i64(k))
                n = builder.select(builder.icmp_signed("<", n, last), n, last)
                starts.append(builder.add(src, builder.mul(n, s_o)))
            g = []
            for tap in range(down.size * side.size):
                offset = builder.load(builder.gep(offsets, [i64(tap)]))
                exists = builder.icmp_signed("<", i64(tap % side.size), along)
                v = builder.fpext(_gathered(builder, starts, builder.select(exists, offset, i64(0))), wide)
                g.append(builder.select(exists, v, ir.Constant(wide, [0.0] * lanes)))
            columns = [[_sum(builder, list(zip(row, g[j :: side.size], strict=True))) for row in down.g]
                       for j in range(side.size)]
            for i in range(down.taps):
                for j, row in enumerate(side.g):
                    v = _sum(builder, [(c, column[i]) for c, column in zip(row, columns, strict=True)])
                    place = builder.mul(dst_place, i64(i * side.taps + j))
                    store_vector(builder, FLOAT32, builder.add(dst, place), builder.fptrunc(v, FLOAT32.vector.llvm))
            return context.get_dummy_value()
        return types.none(*(types.int64,) * 8), codegen
    return intrinsic(fn)


# Kernels -------------------------------------------------------------------------------------------------------------


@inline
def start(tile, n, d):
    """The first output of a tile of n outputs, d apart: d tiles next to each other fill a stretch of n · d"""
    return tile * n if d == 1 else tile // d * (n * d) + tile % d


def winograd(tile: str) -> Any:
    """A convolution of stride 1 by these tiles; ``conv_fields.WINOGRAD`` lists what ``geo`` points to. What
    ``flag`` points to becomes 1 where an output is not finite."""
    e, (down, side) = FLOAT32, TILES[tile]
    down_n, down_taps, along_n, along_taps, places = down.n, down.taps, side.n, side.taps, down.taps * side.taps
    transform_rows, transform_rows_n, transform_pixels = *_transform_rows(down), _transform_pixels(down, side)
    transform_columns, transform_columns_stepped = _transform_columns(side, True), _transform_columns(side, False)
    transform_back, transform_back_stepped, transform_back_last = (
        _transform_back(down, side, last, dense) for last, dense in ((False, True), (False, False), (True, True)))
    lanes, size, unit = e.lanes, e.size, ROWS * e.size
    finish = finisher(e)
    multiply = by_width(*(Tile(e, ROWS, v) for v in (1, 2, 3)))

    @inline
    def clear(dst, count):
        for j in range(0, count, lanes):
            store(e, dst + j * size, spread(e, 0.0))

    @outline
    def into_planes(geo, x, shift, slot, t0, n, v, ws):
        """Tiles t0 … t0 + n of an image whose rows are dense, as V[place][ROWS tiles][slot][channel][tile].

        A *segment* is a stretch of tiles next to each other: their rows are transformed into lines, with the padding, and
        the tiles found there.
        """
        tw, th, channels, w, dh, dw = (
            get(geo, _TW), get(geo, _TH), get(geo, _C), get(geo, _W), get(geo, _DH), get(geo, _DW))
        width, group, place = get(geo, _WIDTH), get(geo, _SLOTS) * channels * unit, get(geo, _PLACE)
        v += slot * channels * unit
        tiles, segments = ws, ws + get(geo, _AT_SEGMENTS)
        zeros, lines = ws + get(geo, _AT_ZEROS), ws + get(geo, _AT_LINES)
        clear(zeros, width)
        clear(lines, down_taps * width)
        count, done, column = 0, 0, 0
        while done < n:
            line = (t0 + done) // tw
            j = t0 + done - line * tw
            i = line // th
            y, left = start(line - i * th, down_n, dh) - get(geo, _PH), start(j, along_n, dw) - get(geo, _PW) + shift
            many = min(n - done, tw - j)
            length = along_n * many + (along_taps - along_n) * dw
            at = segments + count * SEGMENT
            store_scalar(INT64, at, max(0, -left))
            store_scalar(INT64, at + 8, max(max(0, -left), min(length, w - left)))
            store_scalar(INT64, at + 16, lines + column * size)
            for r in range(down_taps):
                row = y + r * dh
                inside = row >= 0 and row < get(geo, _H)
                from_ = x + i * get(geo, _XN) + row * get(geo, _XH) + left * size
                store_scalar(INT64, at + 24 + 8 * r, from_ if inside else zeros)
                store_scalar(INT64, at + 72 + 8 * r, get(geo, _XC) if inside else 0)
            for t in range(many):
                store_scalar(INT64, tiles + (done + t) * 8, (column + start(t, along_n, dw)) * size)
            column += length + lanes
            done += many
            count += 1
        for t in range(n, n + lanes):
            store_scalar(INT64, tiles + t * 8, 0)
        for k in range(channels):
            for segment in range(count):
                at = segments + segment * SEGMENT
                s, end, line, rows = load_scalar(INT64, at), load_scalar(INT64, at + 8), load_scalar(INT64, at + 16), at + 24
                if end - s >= lanes:
                    while s < end:
                        s = min(s, end - lanes)
                        transform_rows(rows, s * size, line + s * size, width * size)
                        s += lanes
                elif end > s:
                    transform_rows_n(rows, s * size, end - s, line + s * size, width * size)
                for r in range(0, 8 * down_taps, 8):
                    store_scalar(INT64, rows + r, load_scalar(INT64, rows + r) + load_scalar(INT64, rows + 48 + r))
            for t in range(0, n, lanes):
                to = v + t // ROWS * group + k * unit + t % ROWS * size
                for r in range(down_taps):
                    rest = lines + r * width * size, tiles + t * 8, dw * size, to + r * along_taps * place, place, group
                    if dw == 1:
                        transform_columns(*rest)
                    else:
                        transform_columns_stepped(*rest)

    @outline
    def into_pixels(geo, x, shift, slot, t0, n, v, ws):
        """Tiles t0 … t0 + n of an image whose channels are dense, as V[place][tile][slot][channel]"""
        tw, th, channels, place, dh, dw = (
            get(geo, _TW), get(geo, _TH), get(geo, _C), get(geo, _PLACE), get(geo, _DH), get(geo, _DW))
        zeros, slots = ws + get(geo, _AT_ZEROS), get(geo, _SLOTS)
        clear(zeros, channels)
        for t in range(n):
            line = (t0 + t) // tw
            i = line // th
            top = start(line - i * th, down_n, dh) - get(geo, _PH)
            left = start(t0 + t - line * tw, along_n, dw) - get(geo, _PW) + shift
            for r in range(down_taps):
                for s in range(along_taps):
                    h, w = top + r * dh, left + s * dw
                    inside = h >= 0 and h < get(geo, _H) and w >= 0 and w < get(geo, _W)
                    store_scalar(INT64, ws + (r * along_taps + s) * 8,
                                 x + i * get(geo, _XN) + h * get(geo, _XH) + w * get(geo, _XW) if inside else zeros)
            k = 0
            while k < channels:
                k = min(k, channels - lanes)
                transform_pixels(ws, k * size, v + ((t * slots + slot) * channels + k) * size, place)
                k += lanes

    @outline
    def products(geo, q0, q1, f0, f1, z0, a0, a1, blocks, v, w, m, row):
        """M = V U for each place, planes f0 … f1 of the output, or M += V U if a0 > 0: the tiles by the outputs of panels
        q0 … q1, of the filter's planes a0 … a1. The input's planes in V begin with z0, and those that the filter meets follow
        each other as its own do."""
        channels, panels, place = get(geo, _C), get(geo, _PANELS), get(geo, _PLACE)
        vectors, depth = (get(geo, _O) + lanes - 1) // lanes, get(geo, _TAPS) * channels
        a_row, a_k, a_step, a_plane = size, unit, get(geo, _SLOTS) * channels * unit, channels * unit
        if get(geo, _X_LAST):
            a_row, a_k, a_plane = get(geo, _SLOTS) * channels * size, size, channels * size
        for at in range(places):
            c, u = m + at * get(geo, _M_PLACE), w + at * (row * depth + PAD)
            for q in range(q0, q1):
                vecs = vectors * (q + 1) // panels - vectors * q // panels
                b_k = vecs * lanes * size
                ahead, ahead_k = u + (depth + a0 * channels) * b_k, b_k // (blocks * (f1 - f0))
                for f in range(f0, f1):
                    z, to = f - get(geo, _PD), c + (f - f0) * blocks * ROWS * row
                    first, end = max(a0, -z), min(a1, get(geo, _D) - z)
                    init, init_step = (to, ROWS * row) if a0 > 0 else (0, 0)
                    multiply(vecs, blocks, (end - first) * channels, get(geo, _CHAIN),
                             v + at * place + (z + first - z0) * a_plane, a_row, a_k, a_step, u + first * channels * b_k, b_k,
                             init, row, init_step, to, row, ROWS * row, lanes, ahead, ahead_k)
                    ahead += blocks * (a1 - a0) * channels * ahead_k
                u += depth * b_k
                c += b_k

    @outline
    def out_of_planes(geo, f, t0, n, o0, o1, m, row, y, bias, res, act, p0, p1, strip):
        """From M to an output whose rows are dense; whether all that came was finite"""
        tw, th, h, w, dh, dw = get(geo, _TW), get(geo, _TH), get(geo, _OH), get(geo, _OW), get(geo, _DH), get(geo, _DW)
        place, step = get(geo, _M_PLACE), get(geo, _YW)
        seen = spread(e, 0.0)
        done = 0
        while done < n:
            line = (t0 + done) // tw
            j = t0 + done - line * tw
            i = line // th
            many, first = min(n - done, tw - j), start(line - i * th, down_n, dh)
            length = along_n * many * size
            rows, columns = min(down_n, (h - first + dh - 1) // dh), min(along_n * many, w - j * along_n)
            # a short row may be written with a whole vector where the next one, which follows it in memory, comes after
            spills = (columns == w and 2 * w >= lanes and w < lanes <= length // size and dh == 1 and get(geo, _YH) == w * size
                      and step == size)
            at = i * get(geo, _YN) + f * get(geo, _YD) + first * get(geo, _YH) + j * along_n * step
            for o in range(o0, o1, lanes):
                for t in range(many):
                    rest = (m + (done + t) * row + (o - o0) * size, place, strip + start(t, along_n, dw) * size, length,
                            dw * size, down_n * length)
                    if dw == 1:
                        seen = transform_back(seen, *rest)
                    else:
                        seen = transform_back_stepped(seen, *rest)
                for k in range(min(lanes, o1 - o)):
                    for r in range(rows):
                        to = at + (o + k) * get(geo, _YO) + r * dh * get(geo, _YH)
                        finish(lanes if spills and r + 1 < rows else columns, strip + (k * down_n + r) * length, y + to, step,
                               bias + (o + k) * size if bias != 0 else 0, 0, res + to if res != 0 else 0, act, p0, p1)
            done += many
        return any_lane(seen != seen)

    @outline
    def out_of_pixels(geo, f, t0, n, o0, o1, m, row, y, bias, res, act, p0, p1, strip):
        """From M to an output whose channels are dense"""
        tw, th, h, w, dh, dw = get(geo, _TW), get(geo, _TH), get(geo, _OH), get(geo, _OW), get(geo, _DH), get(geo, _DW)
        place = get(geo, _M_PLACE)
        seen = spread(e, 0.0)
        for t in range(n):
            line = (t0 + t) // tw
            i = line // th
            first, left = start(line - i * th, down_n, dh), start(t0 + t - line * tw, along_n, dw)
            for o in range(0, o1 - o0, lanes):
                seen = transform_back_last(seen, m + t * row + o * size, place, strip + o * size,
                                           along_n * row, row, 0)
            for r in range(min(down_n, (h - first + dh - 1) // dh)):
                for s in range(min(along_n, (w - left + dw - 1) // dw)):
                    to = (i * get(geo, _YN) + f * get(geo, _YD) + (first + r * dh) * get(geo, _YH)
                          + (left + s * dw) * get(geo, _YW) + o0 * size)
                    finish(o1 - o0, strip + (r * along_n + s) * row, y + to, size, bias + o0 * size if bias != 0 else 0, size,
                           res + to if res != 0 else 0, act, p0, p1)
        return any_lane(seen != seen)

    @inline
    def body(t, task, geo, x, w, y, bias, res, act, p0, p1, ws, ws_size, flag):
        cuts, groups, panels = get(geo, _CUTS), get(geo, _GROUPS), get(geo, _PANELS)
        block, band = get(geo, _BLOCK), get(geo, _BAND)
        channels, outputs, taps = get(geo, _C), get(geo, _O), get(geo, _TAPS)
        total, vectors = get(geo, _N) * get(geo, _TH) * get(geo, _TW), (outputs + lanes - 1) // lanes
        mine = ws + t * ws_size
        v, m = mine + get(geo, _AT_V), mine + get(geo, _AT_M)
        number = task // cuts
        cut = task - number * cuts
        blocks, bands = (total + block - 1) // block, (get(geo, _OD) + band - 1) // band
        own = number // (blocks * bands)  # which set of channels
        number -= own * blocks * bands
        t0, f0 = number % blocks * block, number // blocks * band
        n, f1 = min(block, total - t0), min(f0 + band, get(geo, _OD))
        rows = (n + ROWS - 1) // ROWS
        x, w, y = x + own * channels * get(geo, _XC), w + own * get(geo, _SET), y + own * outputs * get(geo, _YO)
        bias = bias + own * outputs * size if bias != 0 else 0
        res = res + own * outputs * get(geo, _YO) if res != 0 else 0
        for a0 in range(0, taps, get(geo, _STRETCH)):
            a1 = min(taps, a0 + get(geo, _STRETCH))
            z0, z1 = max(0, f0 - get(geo, _PD) + a0), min(get(geo, _D), f1 - 1 - get(geo, _PD) + a1)
            for z in range(z0, z1):
                if get(geo, _X_LAST):
                    into_pixels(geo, x + z * get(geo, _XD), z * get(geo, _SHIFT), z - z0, t0, n, v, mine)
                else:
                    into_planes(geo, x + z * get(geo, _XD), z * get(geo, _SHIFT), z - z0, t0, n, v, mine)
            for g in range(groups * cut // cuts, groups * (cut + 1) // cuts):
                q0, q1 = panels * g // groups, panels * (g + 1) // groups
                v0, v1 = vectors * q0 // panels, vectors * q1 // panels
                row, sums = (v1 - v0) * lanes * size, m + (g - groups * cut // cuts) * get(geo, _M_GROUP)
                products(geo, q0, q1, f0, f1, z0, a0, a1, rows, v,
                         w + places * (v0 * lanes * taps * channels * size + g * PAD), sums, row)
                if a1 < taps:
                    continue
                for f in range(f0, f1):
                    rest = (f, t0, n, v0 * lanes, min(outputs, v1 * lanes), sums + (f - f0) * rows * ROWS * row, row, y, bias,
                            res, act, p0, p1, mine)
                    if out_of_pixels(geo, *rest) if get(geo, _Y_LAST) else out_of_planes(geo, *rest):
                        store_scalar(INT64, flag, 1)

    def kernel(nt, geo, x, w, y, bias, res, act, ws, ws_size, flag, p0, p1):
        store_scalar(INT64, flag, 0)
        tiles, block, band = get(geo, _N) * get(geo, _TH) * get(geo, _TW), get(geo, _BLOCK), get(geo, _BAND)
        tasks = (tiles + block - 1) // block * ((get(geo, _OD) + band - 1) // band)
        parallel_tasks(nt, get(geo, _SETS) * tasks * get(geo, _CUTS), body,
                       (geo, x, w, y, bias, res, act, p0, p1, ws, ws_size, flag))
    return kernel


def winograd_weight(tile: str) -> Any:
    """A weight, transformed: [set][group of panels][place][panel][plane of the filter][channel][output]. Element (output o,
    plane a, channel c, tap t) of a set lies at ``src + set·s_set + o·s_o + a·s_a + c·s_c + taps[t]``; sets are ``dst_set`` bytes
    apart. Planes have three taps along a row, of ``along`` in all."""
    down, side = TILES[tile]
    lanes, size, places = FLOAT32.lanes, FLOAT32.size, down.taps * side.taps
    transform_filter = _transform_filter(down, side)

    @inline
    def body(t, nt, sets, outputs, planes, channels, panels, groups, src0, s_set, s_o, s_a, s_c, taps, along, dst0, dst_set):
        vectors, depth = (outputs + lanes - 1) // lanes, planes * channels
        for task in range(sets * panels * t // nt, sets * panels * (t + 1) // nt):
            own = task // panels
            q, src, dst = task - own * panels, src0 + own * s_set, dst0 + own * dst_set
            g = ((q + 1) * groups - 1) // panels
            v0, v1 = vectors * (panels * g // groups) // panels, vectors * (panels * (g + 1) // groups) // panels
            first = vectors * q // panels
            vecs = vectors * (q + 1) // panels - first
            to = dst + (v0 * places + first - v0) * lanes * depth * size + g * places * PAD
            place = (v1 - v0) * lanes * depth * size + PAD
            for a in range(planes):
                for c in range(channels):
                    for v in range(vecs):
                        transform_filter(src + a * s_a + c * s_c, (first + v) * lanes, outputs - 1, s_o, taps, along - 3 * a,
                                         to + ((a * channels + c) * vecs + v) * lanes * size, place)

    def kernel(nt, sets, outputs, planes, channels, panels, groups, src, s_set, s_o, s_a, s_c, taps, along, dst, dst_set):
        parallel(nt, body,
                 (sets, outputs, planes, channels, panels, groups, src, s_set, s_o, s_a, s_c, taps, along, dst, dst_set))
    return kernel
