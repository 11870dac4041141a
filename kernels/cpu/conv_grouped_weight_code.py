"""The gradient of the weight of small groups in planes, as compiled: each element is the product of two planes, one shifted.

The image is padded as in ``conv_direct_code``, and the gradient's rows lie as far apart as the padded ones, with zeros between:
then a tap is an offset, and a band of rows, margins and all, is one row of whole vectors. Four outputs' planes meet three taps'
at a time, and the lanes of a sum are added up at the band's end. An Inf or NaN that meets a margin's zeros would appear where it
does not belong, so the kernel says where a sum is not finite and the caller starts anew in the plain way.
"""

from __future__ import annotations

from typing import Any

from .conv_code import copier, get
from .conv_direct_code import padder
from .conv_fields import DIRECT
from .engine.region import parallel_tasks
from .engine.simd import FLOAT32, INT64, fma, inline, load, load_scalar, outline, reduce_add, spread, store_scalar

(_N, _G, _C, _O, _H, _W, _OH, _OW, _UH, _UW, _XN, _XC, _XH, _YN, _YO, _YH, _TAPS, _TABLE, _BAND, _BANDS, _SEG, _SEGS, _PITCH,
 _PLANE, _SUMS, _DEEP, _WIDE, _AT_SUMS) = (8 * DIRECT.index(name) for name in (
    "images", "groups", "channels", "outputs", "h", "w", "oh", "ow", "uh", "uw", "xn", "xc", "xh", "yn", "yo", "yh", "taps",
    "table", "band", "bands", "seg", "segs", "pitch", "plane", "sums", "deep", "wide", "at_sums"))
OUTPUTS, TAPS = 4, 3  # at a time


def grouped_weight(elem_name: str) -> Any:
    """``conv_fields.DIRECT`` lists what ``geo`` points to, where the output is the gradient; the weight's gradient is dense. What
    ``flag`` points to becomes 1 where a sum is not finite."""
    e = FLOAT32
    lanes, size = e.lanes, e.size
    zeros, _ = copier(e)
    place, pad = padder(e)

    @inline
    def put(more, at, sums, flag):
        total = reduce_add(sums)
        if more:
            total += load_scalar(e, at)
        store_scalar(e, at, total)
        if total - total != 0:
            store_scalar(INT64, flag, 1)

    @outline
    def products(more, table, k, image, grads, g_row, outputs, vectors, dst, flag):
        """The sums of all taps of a group, k an output, over so many vectors, added to what is there if ``more``"""
        for o in range(0, outputs, OUTPUTS):
            last = outputs - 1 - o
            g0, g1 = grads + o * g_row, grads + (o + min(1, last)) * g_row
            g2, g3 = grads + (o + min(2, last)) * g_row, grads + (o + min(3, last)) * g_row
            for i in range(0, k, TAPS):
                i1, i2 = min(i + 1, k - 1), min(i + 2, k - 1)
                x0 = image + load_scalar(INT64, table + i * 8)
                x1, x2 = image + load_scalar(INT64, table + i1 * 8), image + load_scalar(INT64, table + i2 * 8)
                a00 = a01 = a02 = a10 = a11 = a12 = a20 = a21 = a22 = a30 = a31 = a32 = spread(e, 0.0)
                for at in range(0, vectors * e.bytes, e.bytes):
                    b0, b1, b2 = load(e, x0 + at), load(e, x1 + at), load(e, x2 + at)
                    v = load(e, g0 + at)
                    a00, a01, a02 = fma(v, b0, a00), fma(v, b1, a01), fma(v, b2, a02)
                    v = load(e, g1 + at)
                    a10, a11, a12 = fma(v, b0, a10), fma(v, b1, a11), fma(v, b2, a12)
                    v = load(e, g2 + at)
                    a20, a21, a22 = fma(v, b0, a20), fma(v, b1, a21), fma(v, b2, a22)
                    v = load(e, g3 + at)
                    a30, a31, a32 = fma(v, b0, a30), fma(v, b1, a31), fma(v, b2, a32)
                to = dst + o * k * size
                for q in range(min(OUTPUTS, last + 1)):
                    if q == 0:
                        b0, b1, b2 = a00, a01, a02
                    elif q == 1:
                        b0, b1, b2 = a10, a11, a12
                    elif q == 2:
                        b0, b1, b2 = a20, a21, a22
                    else:
                        b0, b1, b2 = a30, a31, a32
                    put(more, to + i * size, b0, flag)
                    if i1 > i:
                        put(more, to + i1 * size, b1, flag)
                    if i2 > i1:
                        put(more, to + i2 * size, b2, flag)
                    to += k * size

    @inline
    def body(t, task, parts, geo, x, out, grad, flag, ws, ws_size):
        channels, taps, pitch = get(geo, _C), get(geo, _TAPS), get(geo, _PITCH)
        g = task // parts
        part = task - g * parts
        o0 = g * get(geo, _O) + get(geo, _O) * part // parts
        outputs = g * get(geo, _O) + get(geo, _O) * (part + 1) // parts - o0
        image = ws + t * ws_size
        grads = image + get(geo, _AT_SUMS)
        ends = (get(geo, _N) - 1) * get(geo, _XN) + (get(geo, _G) * channels - 1) * get(geo, _XC)
        end = x + ends + (get(geo, _H) - 1) * get(geo, _XH) + get(geo, _W) * size
        g_end = (grad + (get(geo, _N) - 1) * get(geo, _YN) + (get(geo, _G) * get(geo, _O) - 1) * get(geo, _YO)
                 + (get(geo, _OH) - 1) * get(geo, _YH) + get(geo, _OW) * size)
        more = False
        for i in range(get(geo, _N)):
            for band in range(get(geo, _BANDS)):
                for seg in range(get(geo, _SEGS)):
                    row0, col0 = band * get(geo, _BAND), seg * get(geo, _SEG)
                    rows, cols = min(get(geo, _BAND), get(geo, _OH) - row0), min(get(geo, _SEG), get(geo, _OW) - col0)
                    # What the last vectors hold beyond the planes is to be zeros on both sides. Of the image the next plane's
                    # beginning may be among them, so this comes first.
                    n = rows * pitch
                    for c in range(channels * get(geo, _UH) * get(geo, _UW)):
                        zeros(image + c * get(geo, _PLANE) + (rows + get(geo, _DEEP)) * pitch * size, get(geo, _WIDE) + lanes)
                    pad(geo, x + i * get(geo, _XN) + g * channels * get(geo, _XC), end, channels, row0, rows + get(geo, _DEEP),
                        col0, pitch, image)
                    from_ = grad + i * get(geo, _YN) + o0 * get(geo, _YO) + row0 * get(geo, _YH) + col0 * size
                    place(grads, pitch * size, from_, get(geo, _YH), rows, 0, cols, pitch - cols, 1, outputs, get(geo, _SUMS),
                          get(geo, _YO), g_end)
                    for o in range(outputs):
                        zeros(grads + o * get(geo, _SUMS) + n * size, lanes)
                    products(more, get(geo, _TABLE), channels * taps, image, grads, get(geo, _SUMS), outputs,
                             (n + lanes - 1) // lanes, out + o0 * channels * taps * size, flag)
                    more = True

    def kernel(nt, parts, geo, x, out, grad, flag, ws, ws_size):
        store_scalar(INT64, flag, 0)
        parallel_tasks(nt, get(geo, _G) * parts, body, (parts, geo, x, out, grad, flag, ws, ws_size))
    return kernel
