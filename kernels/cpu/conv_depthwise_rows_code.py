"""Depthwise convolution of planes, as compiled: four rows of outputs at once, straight from the image.

What a filter of K × K meets for four rows of a vector each is 3s + K rows of the image, s the stride. Of each of them K
vectors are loaded, one a tap of the filter's row, and each goes to all the output rows that it is for: a load that does not
begin where a cache line does takes as long as one and a half products. Masks leave out columns beyond the image; rows beyond it
are passed over; nothing is copied. With stride 2 two vectors are loaded and their even and odd lanes are two taps.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .conv_code import get
from .conv_depthwise_code import part_putter
from .conv_fields import ROWS
from .engine.region import parallel
from .engine.simd import (
    FLOAT32,
    Elem,
    Vector,
    i64,
    inline,
    load_scalar,
    load_vector,
    mask_bytes,
    mask_from,
    multiply_add,
    outline,
    prefetch,
    splat,
    spread,
)

MANY = 4  # rows at once
(_N, _C, _O, _H, _OH, _OW, _PH, _XN, _XC, _XH, _YN, _YC, _YH, _W_STEP, _W_FIRST, _W_ROW, _W_TAP, _SIZE, _STRIDE, _BLOCKS,
 _COLUMNS, _MASKS) = (8 * i for i in range(len(ROWS)))


def _met(size: int, stride: int, row: int) -> Any:
    def fn(typingctx, elem, x, there, w, w_row, w_tap, a0, a1, a2, a3):
        e: Elem = elem.value

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            _, x, there, w, w_row, w_tap, *sums = args

            def part(j: int, number: int) -> Any:
                return load_vector(builder, e, builder.add(x, i64(j * e.size)), builder.extract_value(there, number))

            taps: list[Any] = []
            if stride == 1:
                taps = [part(j, j) for j in range(size)]
            for j in range(0, size if stride == 2 else 0, 2):
                both = part(j, j), part(j + e.lanes, j + 1)
                for odd in range(min(2, size - j)):
                    index = ir.Constant(ir.VectorType(ir.IntType(32), e.lanes), list(range(odd, 2 * e.lanes, 2)))
                    taps.append(builder.shuffle_vector(*both, index))
            for j, v in enumerate(taps):
                for o in range(MANY):
                    i = row - o * stride
                    if 0 <= i < size:
                        at = builder.add(w, builder.add(builder.mul(w_row, i64(i)), builder.mul(w_tap, i64(j))))
                        f = builder.load(builder.inttoptr(at, e.memory.as_pointer()))
                        sums[o] = multiply_add(builder, splat(builder, f, e.lanes), v, sums[o])
            return cgutils.pack_array(builder, sums)
        return types.containers.UniTuple(a0, MANY)(elem, types.int64, there, *(types.int64,) * 3, *(a0,) * MANY), codegen
    fn.__doc__ = """met(elem, x, there, w, w_row, w_tap, a0, a1, a2, a3) -> the four rows' sums with what they meet in that row"""
    return intrinsic(fn)


def _masks(count: int) -> Any:
    def fn(typingctx, elem, address):
        e: Elem = elem.value

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            return cgutils.pack_array(builder, [mask_from(builder, e, builder.add(args[1], i64(i * mask_bytes(e))))
                                                for i in range(count)])
        return types.containers.UniTuple(Vector(types.boolean, e.lanes), count)(elem, types.int64), codegen
    fn.__doc__ = """masks(elem, address) -> masks that lie in memory one behind the other"""
    return intrinsic(fn)


def rows(elem_name: str) -> Any:
    """``conv_fields.ROWS`` lists what ``geo`` points to."""
    e = FLOAT32
    lanes, bits, put = e.lanes, mask_bytes(e), part_putter(e)

    def filters(size: int, stride: int) -> Any:
        several = (MANY - 1) * stride + size

        def row(number: int) -> Any:
            if number == several:
                @inline
                def last(x, xh, y, h, there, w, w_row, w_tap, a0, a1, a2, a3):
                    return a0, a1, a2, a3
                return last
            met, following = _met(size, stride, number), row(number + 1)

            @inline
            def run(x, xh, y, h, there, w, w_row, w_tap, a0, a1, a2, a3):
                if y >= 0 and y < h:
                    a0, a1, a2, a3 = met(e, x, there, w, w_row, w_tap, a0, a1, a2, a3)
                return following(x + xh, xh, y + 1, h, there, w, w_row, w_tap, a0, a1, a2, a3)
            return run
        first = row(0)
        loads = size if stride == 1 else (size + 1) // 2 * 2
        masks = _masks(loads)

        @outline
        def plane(geo, x, w, start, y, res, act):
            oh, ow, h, xh, yh = get(geo, _OH), get(geo, _OW), get(geo, _H), get(geo, _XH), get(geo, _YH)
            w_row, w_tap = get(geo, _W_ROW), get(geo, _W_TAP)
            for r0 in range(0, oh, MANY):
                r = min(r0, oh - MANY)  # the last rows overlap those before
                top = r * stride - get(geo, _PH)
                mask, columns = get(geo, _MASKS), get(geo, _COLUMNS)
                for _ in range(get(geo, _BLOCKS)):
                    ahead = x + (top + several) * xh + get(columns, 0)
                    for _ in range(MANY * stride):
                        prefetch(ahead)
                        ahead += xh
                    a0 = a1 = a2 = a3 = spread(e, start)
                    a0, a1, a2, a3 = first(x + top * xh + get(columns, 0), xh, top, h, masks(e, mask), w, w_row, w_tap, a0, a1,
                                           a2, a3)
                    to = r * yh + get(columns, 8)
                    n = min(lanes, ow)
                    # What a whole vector writes past a short row's end is the next row's.
                    whole = n if yh != ow * e.size else lanes
                    for i in range(MANY):
                        fits = (oh - r - i) * ow >= lanes
                        put(a0, y + to, res + to if res != 0 else 0, act, whole if fits else n)
                        a0, a1, a2 = a1, a2, a3
                        to += yh
                    mask += loads * bits
                    columns += 16
        return plane

    plane31, plane51, plane71, plane32, plane52 = (filters(*each) for each in ((3, 1), (5, 1), (7, 1), (3, 2), (5, 2)))

    @inline
    def body(t, nt, geo, x, w, y, bias, res, act):
        channels, outputs, size, stride = get(geo, _C), get(geo, _O), get(geo, _SIZE), get(geo, _STRIDE)
        planes = get(geo, _N) * channels
        for plane in range(planes * t // nt, planes * (t + 1) // nt):
            n = plane // channels
            c = plane - n * channels
            at = n * get(geo, _YN) + c * get(geo, _YC)
            rest = (geo, x + n * get(geo, _XN) + c // outputs * get(geo, _XC), w + c * get(geo, _W_STEP) + get(geo, _W_FIRST),
                    load_scalar(e, bias + c * e.size) if bias != 0 else 0.0, y + at, res + at if res != 0 else 0, act)
            if stride == 2:
                if size == 3:
                    plane32(*rest)
                else:
                    plane52(*rest)
            elif size == 3:
                plane31(*rest)
            elif size == 5:
                plane51(*rest)
            else:
                plane71(*rest)

    def kernel(nt, geo, x, w, y, bias, res, act):
        parallel(nt, body, (geo, x, w, y, bias, res, act))
    return kernel
