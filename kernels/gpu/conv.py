"""Convolutions on the GPU: an implicit im2col. What the products read has its channels next to each other: other tensors are
packed first, weights and images alike, which costs a pass over them and gives whole vectors and tensor maps.

Everything is three-dimensional here: a missing dimension has size 1. A transposed convolution, which is also the gradient of the
input, falls into *phases*: outputs that are alike modulo the strides meet the same taps, so nothing is multiplied by zeros (Shi
et al. 2016, "Is the deconvolution layer the same as a convolutional layer?"). Either way output x of a dimension meets in tap
a what lies at x · move + base + a · delta. Where move is 1 a tile of positions can be a *box*, of images by depth by height by
width: what a tap meets is a box as well, which a copy engine (TMA) reads with zeros beyond the image. Depthwise convolutions are
sums of products without a matrix instruction.

``conv_columns`` is the plain path, with an explicit im2col or col2im. A tuner may find it faster; otherwise it is taken only
where PLAIN says so, and for filters of size 1, whose columns are the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn import backends

from ..layout import like, three
from . import conv_columns
from .engine import functions, launch, tune
from .engine.launch import power_of_two
from .matmul import precision

# The kernels --------------------------------------------------------------------------------------------------------------------
# A compiler that knows nothing of a size but that 16 does not divide it loads number by number. So what may be a multiple of 8 at
# best is passed as a multiple of a UNIT, which is a constant. Positions are rows: where it sees no neighbours in either
# dimension, Triton lays neighbouring threads along the first.


@triton.jit
def _taps(phase, k, s, p, d, g, inverse, TRANSPOSED: tl.constexpr):
    """(first tap, steps from one tap to the next, how many; move, base, delta): along one dimension, of outputs = phase modulo s.

    g is the greatest common divisor of stride and dilation, inverse that of d / g modulo s / g.
    """
    if TRANSPOSED:
        at = phase + p
        step = s // g
        first = at // g * inverse % step
        count = tl.where(at % g == 0, tl.maximum(0, (k - first + step - 1) // step), 0)
        move, base, delta = 1, (at - first * d) // s, -(d // g)  # without a remainder, where there is a tap
    else:
        first, step, count = 0, 1, k
        move, base, delta = s, -p, d
    return first, step, count, move, base, delta


@triton.jit
def _phase(at, o0, o1, o2, s0, s1, s2, TRANSPOSED: tl.constexpr):
    """(the rest of a program's number, its phase, how many outputs are of this phase), each but the first in three dimensions"""
    f0, f1, f2 = 0, 0, 0
    q0, q1, q2 = o0, o1, o2
    if TRANSPOSED:
        f2, at = at % s2, at // s2
        f1, at = at % s1, at // s1
        f0, at = at % s0, at // s0
        q0, q1, q2 = (o0 - f0 + s0 - 1) // s0, (o1 - f1 + s1 - 1) // s1, (o2 - f2 + s2 - 1) // s2
    return at, f0, f1, f2, q0, q1, q2


@triton.jit
def _positions(at, q0, q1, q2):
    """(image, place in three dimensions) of positions that are counted through"""
    q0, q1, q2 = tl.maximum(1, q0), tl.maximum(1, q1), tl.maximum(1, q2)
    z2, at = at % q2, at // q2
    z1, at = at % q1, at // q1
    return at // q0, at % q0, z1, z2


@triton.jit
def _inside(h0, h1, h2, i0, i1, i2):
    return (h0 >= 0) & (h0 < i0) & (h1 >= 0) & (h1 < i1) & (h2 >= 0) & (h2 < i2)


@triton.jit
def _finish(y, bias, r, sums, place, m_place, to, m_to, yc, ACT: tl.constexpr):
    """y = act(sums + bias + r), where the positions of sums' rows start at place and its columns are the outputs to"""
    at = place[:, None] + (to * yc)[None, :]
    inside = m_place[:, None] & m_to[None, :]
    if bias is not None:
        sums += tl.load(bias + to, mask=m_to, other=0.0).to(tl.float32)[None, :]
    if r is not None:
        sums += tl.load(r + at, mask=inside, other=0.0).to(tl.float32)
    sums = functions.activation(sums, ACT, 0.0, 0.0)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _halves(sums, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns"""
    return tl.split(tl.permute(tl.reshape(sums, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _finish_all(y, bias, r, sums, place, m_place, first, left, o, yc, ACT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                PIECE: tl.constexpr):  # fmt: skip
    """_finish, a PIECE of the columns at a time: addresses and residuals of all at once do not fit into the registers"""
    if N > PIECE:
        low, high = _halves(sums, M, N)
        _finish_all(y, bias, r, low, place, m_place, first, left, o, yc, ACT, M, N // 2, PIECE)
        _finish_all(y, bias, r, high, place, m_place, first, left + N // 2, o, yc, ACT, M, N // 2, PIECE)
    else:
        outputs = left + tl.arange(0, N)
        _finish(y, bias, r, sums, place, m_place, first + outputs, outputs < o, yc, ACT)


@triton.jit
def convolution(
    y, x, w, bias, r,  # output, input, weight; bias and residual or None; the residual lies as the output does
    tiles, tall, n, groups, c, o,  # all tiles, those of one phase above each other; batch; channels and outputs of a group
    i0, i1, i2, o0, o1, o2, k0, k1, k2,  # sizes of input, output and filter
    s0, s1, s2, p0, p1, p2, d0, d1, d2, g0, g1, g2, v0, v1, v2,  # stride, padding, dilation; as _taps has g and inverse
    xn, xc, x0, x1, x2, wo, wc, w0, w1, w2, yn, yc, y0, y1, y2,  # strides
    ACT: tl.constexpr, TRANSPOSED: tl.constexpr, FLAT: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, Y_UNIT: tl.constexpr,  # of c and its strides; of y's
    BOXES: tl.constexpr, B: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """M positions of N outputs, tile by tile. FLAT: channels are few, a step of the sum takes K of (tap, channel); else K
    channels of one tap."""
    c *= UNIT
    xn, x0, x1, x2 = functions.wide(xn) * UNIT, functions.wide(x0) * UNIT, functions.wide(x1) * UNIT, functions.wide(x2) * UNIT
    wo, w0, w1, w2 = functions.wide(wo) * UNIT, functions.wide(w0) * UNIT, functions.wide(w1) * UNIT, functions.wide(w2) * UNIT
    yn, y0, y1 = functions.wide(yn) * Y_UNIT, functions.wide(y0) * Y_UNIT, functions.wide(y1) * Y_UNIT
    if LAST:
        o, y2 = o * Y_UNIT, functions.wide(y2) * Y_UNIT
    else:
        o2, yc = o2 * Y_UNIT, functions.wide(yc) * Y_UNIT
    across = tl.cdiv(o, N)
    if BOXES:
        all_x = tl.make_tensor_descriptor(x, [n, i0, i1, i2, c], [xn, x0, x1, x2, 1], [B, B0, B1, B2, K])
        all_w = tl.make_tensor_descriptor(w, [o, k0 * k1 * k2, c], [wo, w2, 1], [N, 1, K])
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        left = tile % across * N
        at, f0, f1, f2, q0, q1, q2 = _phase(tile // across, o0, o1, o2, s0, s1, s2, TRANSPOSED)
        t0, e0, n0, m0, b0, j0 = _taps(f0, k0, s0, p0, d0, g0, v0, TRANSPOSED)
        t1, e1, n1, m1, b1, j1 = _taps(f1, k1, s1, p1, d1, g1, v1, TRANSPOSED)
        t2, e2, n2, m2, b2, j2 = _taps(f2, k2, s2, p2, d2, g2, v2, TRANSPOSED)
        group = (at // tall).to(tl.int64)
        at = at % tall
        if BOXES:
            first, top0, top1, top2 = _positions(at, tl.cdiv((o0 + s0 - 1) // s0 if TRANSPOSED else o0, B0),
                                                 tl.cdiv((o1 + s1 - 1) // s1 if TRANSPOSED else o1, B1),
                                                 tl.cdiv((o2 + s2 - 1) // s2 if TRANSPOSED else o2, B2))
            first, top0, top1, top2 = first * B, top0 * B0, top1 * B1, top2 * B2
            rows = tl.arange(0, M)
            z0, z1, z2 = top0 + rows // (B2 * B1) % B0, top1 + rows // B2 % B1, top2 + rows % B2
            image = first + rows // (B2 * B1 * B0)
        else:
            if WIDE:
                at = at.to(tl.int64)
            image, z0, z1, z2 = _positions(at * M + tl.arange(0, M), q0, q1, q2)
        m_rows = (image < n) & (z0 < q0) & (z1 < q1) & (z2 < q2)
        image = image.to(tl.int64)
        outputs = left + tl.arange(0, N)
        to = group * o + outputs
        if not BOXES:
            a0, a1, a2 = (z0 * m0 + b0)[:, None], (z1 * m1 + b1)[:, None], (z2 * m2 + b2)[:, None]  # what the first tap meets
            from_x = x + group * c * xc + (image * xn)[:, None] + a0 * x0 + a1 * x1 + a2 * x2
            from_w = w + (to * wo)[None, :] + t0 * w0 + t1 * w1 + t2 * w2
            a0, a1, a2 = a0.to(tl.int32), a1.to(tl.int32), a2.to(tl.int32)
        sums = tl.zeros((M, N), tl.float32)
        if FLAT:
            for begin in tl.range(0, n0 * n1 * n2 * c, K):
                k = begin + tl.arange(0, K)
                m_k = k < n0 * n1 * n2 * c
                channel = (k % c).to(tl.int64)
                _, u0, u1, u2 = _positions(k // c, n0, n1, n2)
                h0, h1, h2 = a0 + (u0 * j0)[None, :], a1 + (u1 * j1)[None, :], a2 + (u2 * j2)[None, :]
                inside = m_rows[:, None] & m_k[None, :] & _inside(h0, h1, h2, i0, i1, i2)
                u0, u1, u2 = u0.to(tl.int64), u1.to(tl.int64), u2.to(tl.int64)
                at_x = channel * xc + u0 * j0 * x0 + u1 * j1 * x1 + u2 * j2 * x2
                vx = tl.load(from_x + at_x[None, :], mask=inside, other=0.0)
                vw = tl.load(from_w + (channel * wc + u0 * e0 * w0 + u1 * e1 * w1 + u2 * e2 * w2)[:, None],
                             mask=m_k[:, None] & (outputs < o)[None, :], other=0.0)
                sums = tl.dot(vx, vw, sums, input_precision=PRECISION)
        else:
            channel, u0, u1, u2 = 0, 0, 0, 0  # counted up, as no step has the time to divide
            for _ in tl.range(0, n0 * n1 * n2 * tl.cdiv(c, K)):
                if BOXES:
                    vx = all_x.load([first, top0 + b0 + u0 * j0, top1 + b1 + u1 * j1, top2 + b2 + u2 * j2, channel]).reshape(M, K)
                    tap = ((t0 + u0 * e0) * k1 + t1 + u1 * e1) * k2 + t2 + u2 * e2
                    vw = all_w.load([left, tap, channel]).reshape(N, K).T
                else:
                    k = channel + tl.arange(0, K)
                    inside = m_rows[:, None] & _inside(a0 + u0 * j0, a1 + u1 * j1, a2 + u2 * j2, i0, i1, i2)
                    at_x = (u0 * j0) * x0 + (u1 * j1) * x1 + (u2 * j2) * x2
                    at_w = (u0 * e0) * w0 + (u1 * e1) * w1 + (u2 * e2) * w2
                    vx = tl.load(from_x + at_x + k.to(tl.int64)[None, :] * xc, mask=inside & (k < c)[None, :], other=0.0)
                    vw = tl.load(from_w + at_w + k.to(tl.int64)[:, None] * wc, mask=(k < c)[:, None] & (outputs < o)[None, :],
                                 other=0.0)
                sums = tl.dot(vx, vw, sums, input_precision=PRECISION)
                channel += K
                u2 += (channel >= c).to(tl.int32)
                channel = tl.where(channel >= c, 0, channel)
                u1 += (u2 >= n2).to(tl.int32)
                u2 = tl.where(u2 >= n2, 0, u2)
                u0 += (u1 >= n1).to(tl.int32)
                u1 = tl.where(u1 >= n1, 0, u1)
        if TRANSPOSED:
            z0, z1, z2 = z0 * s0 + f0, z1 * s1 + f1, z2 * s2 + f2
        place = image * yn + z0 * y0 + z1 * y1 + z2 * y2
        _finish_all(y, bias, r, sums, place, m_rows, group * o, left, o, yc, ACT, M, N, 32 if Y_UNIT > 1 else 16)


@triton.jit
def pack(y, x, c, room, p0, p1, p2, i2, edge, xn, xc, x0, x1, x2, C: tl.constexpr, P: tl.constexpr):
    """y[image, position, channel] = x[image, channel, position]; what is beyond c, and before and behind a row, are zeros"""
    positions = functions.wide(p0) * p1 * p2
    pid = tl.program_id(0)
    channel = pid % tl.cdiv(room, C) * C + tl.arange(0, C)
    pid = pid // tl.cdiv(room, C)
    tall = tl.cdiv(positions, P).to(tl.int32)
    image = (pid // tall).to(tl.int64)
    at = pid % tall * P + tl.arange(0, P)
    m_at = at < positions
    _, z0, z1, z2 = _positions(at, p0, p1, p2)
    z2 -= edge
    place = z0.to(tl.int64) * x0 + z1.to(tl.int64) * x1 + z2.to(tl.int64) * x2
    m_x = m_at & (z2 >= 0) & (z2 < i2)
    from_x = x + image * xn + place[:, None] + (channel.to(tl.int64) * xc)[None, :]
    v = tl.load(from_x, mask=m_x[:, None] & (channel < c)[None, :], other=0.0)
    to = (image * positions + at)[:, None] * room + channel[None, :]
    tl.store(y + to, v, mask=m_at[:, None] & (channel < room)[None, :])


@triton.jit
def _one_tap(sums, x, w, place, weights, a0, a1, a2, m_rows, m_columns, u0, u1, u2, e0, e1, e2, j0, j1, j2, i0, i1, i2,
             x0, x1, x2, w0, w1, w2):  # fmt: skip
    """sums + x · w of a depthwise convolution's tap"""
    inside = m_rows & m_columns & _inside(a0 + u0 * j0, a1 + u1 * j1, a2 + u2 * j2, i0, i1, i2)
    at_x = u0 * j0 * x0 + u1 * j1 * x1 + u2 * j2 * x2
    at_w = u0 * e0 * w0 + u1 * e1 * w1 + u2 * e2 * w2
    vx = tl.load(x + place + at_x, mask=inside, other=0.0).to(tl.float32)
    vw = tl.load(w + weights + at_w, mask=m_columns, other=0.0).to(tl.float32)
    return sums + vx * vw


@triton.jit
def depthwise(
    y, x, w, bias, r, n, o, i0, i1, i2, o0, o1, o2, k0, k1, k2,  # as convolution has them; o: outputs of all groups
    s0, s1, s2, p0, p1, p2, d0, d1, d2, g0, g1, g2, v0, v1, v2,
    xn, xc, x0, x1, x2, wo, w0, w1, w2, yn, yc, y0, y1, y2,
    EACH: tl.constexpr,  # outputs of a channel
    ROW: tl.constexpr,  # taps of a row, which are written out, or 0. (Of all taps too much would be loaded at once.)
    ACT: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M positions of N channels"""
    if WIDE:  # numbers of 32 bits save a third of the instructions, where they reach
        xn, xc, x0, x1, x2 = functions.wide(xn), functions.wide(xc), functions.wide(x0), functions.wide(x1), functions.wide(x2)
        yn, yc, y0, y1, y2 = functions.wide(yn), functions.wide(yc), functions.wide(y0), functions.wide(y1), functions.wide(y2)
        wo, w0, w1, w2 = functions.wide(wo), functions.wide(w0), functions.wide(w1), functions.wide(w2)
    o, xn, x0, x1, x2 = o * UNIT, xn * UNIT, x0 * UNIT, x1 * UNIT, x2 * UNIT
    w0, w1, w2, yn, y0, y1, y2 = w0 * UNIT, w1 * UNIT, w2 * UNIT, yn * UNIT, y0 * UNIT, y1 * UNIT, y2 * UNIT
    pid = tl.program_id(0)
    columns = pid % tl.cdiv(o, N) * N + tl.arange(0, N)
    at, f0, f1, f2, q0, q1, q2 = _phase(pid // tl.cdiv(o, N), o0, o1, o2, s0, s1, s2, TRANSPOSED)
    t0, e0, n0, m0, b0, j0 = _taps(f0, k0, s0, p0, d0, g0, v0, TRANSPOSED)
    t1, e1, n1, m1, b1, j1 = _taps(f1, k1, s1, p1, d1, g1, v1, TRANSPOSED)
    t2, e2, n2, m2, b2, j2 = _taps(f2, k2, s2, p2, d2, g2, v2, TRANSPOSED)
    if WIDE:
        at = at.to(tl.int64)
    image, z0, z1, z2 = _positions(at * M + tl.arange(0, M), q0, q1, q2)
    m_rows = (image < n) & (z0 < q0) & (z1 < q1) & (z2 < q2)
    a0, a1, a2 = z0 * m0 + b0, z1 * m1 + b1, z2 * m2 + b2
    place = (image * xn + a0 * x0 + a1 * x1 + a2 * x2)[:, None] + (columns // EACH * xc)[None, :]
    weights = (columns * wo + t0 * w0 + t1 * w1 + t2 * w2)[None, :]
    a0, a1, a2 = a0.to(tl.int32)[:, None], a1.to(tl.int32)[:, None], a2.to(tl.int32)[:, None]
    rows, m_columns = m_rows[:, None], (columns < o)[None, :]
    sums = tl.zeros((M, N), tl.float32)
    if ROW:
        for row in tl.range(0, n0 * n1):
            for u2 in tl.static_range(ROW):
                sums = _one_tap(sums, x, w, place, weights, a0, a1, a2, rows, m_columns, row // n1, row % n1, u2,
                                e0, e1, e2, j0, j1, j2, i0, i1, i2, x0, x1, x2, w0, w1, w2)  # fmt: skip
    else:
        for tap in tl.range(0, n0 * n1 * n2):
            u0, _, u1, u2 = _positions(tap, 1, n1, n2)
            sums = _one_tap(sums, x, w, place, weights, a0, a1, a2, rows, m_columns, u0, u1, u2,
                            e0, e1, e2, j0, j1, j2, i0, i1, i2, x0, x1, x2, w0, w1, w2)  # fmt: skip
    if TRANSPOSED:
        z0, z1, z2 = z0 * s0 + f0, z1 * s1 + f1, z2 * s2 + f2
    place = image * yn + z0 * y0 + z1 * y1 + z2 * y2
    _finish(y, bias, r, sums, place, m_rows, columns, columns < o, yc, ACT)


@triton.jit
def weight_gradient(
    parts, g, x,  # float32, (parts, outputs, taps · channels of a group); gradient of the output; input
    steps, chunk,  # of K positions: all, those of a part
    n, groups, c, o, i0, i1, i2, o0, o1, o2, k0, k1, k2, s0, s1, s2, p0, p1, p2, d0, d1, d2,
    gn, gc, q0, q1, q2, xn, xc, x0, x1, x2,  # strides
    FLAT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, G_UNIT: tl.constexpr,
    BOXES: tl.constexpr, B: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """M outputs by N channels of one tap, or if FLAT by N of (tap, channel): a sum over the positions of one part, K at a time"""
    c, o = c * UNIT, o * G_UNIT
    xn, x0, x1, x2 = functions.wide(xn) * UNIT, functions.wide(x0) * UNIT, functions.wide(x1) * UNIT, functions.wide(x2) * UNIT
    gn, q0 = functions.wide(gn) * G_UNIT, functions.wide(q0) * G_UNIT
    q1, q2 = functions.wide(q1) * G_UNIT, functions.wide(q2) * G_UNIT
    taps = k0 * k1 * k2
    pid = tl.program_id(0)
    if FLAT:
        across = tl.cdiv(c * taps, N)
        column = pid % across * N + tl.arange(0, N)
        m_columns = column < c * taps
        channel, tap = column % c, (column // c)[None, :]
    else:
        across = tl.cdiv(c, N) * taps
        left = pid % across // taps * N
        channel, tap = left + tl.arange(0, N), pid % taps
        m_columns = channel < c
        column = tap * c + channel
    pid = pid // across
    top = pid % tl.cdiv(o, M) * M
    row = top + tl.arange(0, M)
    pid = pid // tl.cdiv(o, M)
    group = (pid % groups).to(tl.int64)
    part = pid // groups
    t0, t1, t2 = tap // k2 // k1 * d0 - p0, tap // k2 % k1 * d1 - p1, tap % k2 * d2 - p2
    g += group * o * gc
    x += group * c * xc
    sums = tl.zeros((M, N), tl.float32)
    begin, end = part * chunk, tl.minimum(steps, (part + 1) * chunk)
    tl.assume(begin < end)
    if BOXES:
        # What no output meets counts as beside the image: it would be multiplied by zeros, but may be Inf.
        meets = (o0 + t0 > 0) & (o1 + t1 > 0) & (o2 + t2 > 0)
        all_g = tl.make_tensor_descriptor(g, [n, o0, o1, o2, o], [gn, q0, q1, q2, 1], [B, B0, B1, B2, M])
        all_x = tl.make_tensor_descriptor(
            x, [n, tl.minimum(i0, tl.maximum(o0 + t0, 1)), tl.minimum(i1, tl.maximum(o1 + t1, 1)),
                tl.minimum(i2, tl.maximum(o2 + t2, 1)), c], [xn, x0, x1, x2, 1], [B, B0, B1, B2, N])  # fmt: skip
        first, z0, z1, z2 = _positions(begin, tl.cdiv(o0, B0), tl.cdiv(o1, B1), tl.cdiv(o2, B2))
        first, z0, z1, z2 = first * B, z0 * B0, z1 * B1, z2 * B2
        for _ in tl.range(begin, end):
            vg = all_g.load([first, z0, z1, z2, top]).reshape(K, M).T
            vx = all_x.load([first, z0 + t0, z1 + t1, z2 + t2, left]).reshape(K, N)
            sums = tl.dot(vg, vx, sums, input_precision=PRECISION)
            z2 += B2
            z1 += tl.where(z2 >= o2, B1, 0)
            z2 = tl.where(z2 >= o2, 0, z2)
            z0 += tl.where(z1 >= o1, B0, 0)
            z1 = tl.where(z1 >= o1, 0, z1)
            first += tl.where(z0 >= o0, B, 0)
            z0 = tl.where(z0 >= o0, 0, z0)
        sums = tl.where(meets, sums, 0.0)
    else:
        from_x = x + (channel.to(tl.int64) * xc)[None, :] + t0.to(tl.int64) * x0 + t1.to(tl.int64) * x1 + t2.to(tl.int64) * x2
        for step in tl.range(begin, end):
            at = (step + tl.zeros((), tl.int32)).to(tl.int64) if WIDE else step
            image, z0, z1, z2 = _positions(at * K + tl.arange(0, K), o0, o1, o2)
            m_z = image < n
            image = image.to(tl.int64)
            z0, z1, z2 = z0.to(tl.int64), z1.to(tl.int64), z2.to(tl.int64)
            vg = tl.load(g + (image * gn + z0 * q0 + z1 * q1 + z2 * q2)[:, None] + (row.to(tl.int64) * gc)[None, :],
                         mask=m_z[:, None] & (row < o)[None, :], other=0.0)
            a0, a1, a2 = z0 * s0, z1 * s1, z2 * s2
            at_x = image * xn + a0 * x0 + a1 * x1 + a2 * x2
            a0, a1, a2 = a0.to(tl.int32)[:, None], a1.to(tl.int32)[:, None], a2.to(tl.int32)[:, None]
            inside = m_z[:, None] & _inside(a0 + t0, a1 + t1, a2 + t2, i0, i1, i2)
            vx = tl.load(from_x + at_x[:, None], mask=inside & m_columns[None, :], other=0.0)
            sums = tl.dot(vg.T, vx, sums, input_precision=PRECISION)
    to = parts + ((functions.wide(part) * groups + group) * o + row)[:, None] * taps * c + column[None, :]
    tl.store(to, sums, mask=(row < o)[:, None] & m_columns[None, :])


@triton.jit
def depthwise_weight_gradient(
    parts, g, x, steps, chunk, n, o, i0, i1, i2, o0, o1, o2, k0, k1, k2, s0, s1, s2, p0, p1, p2, d0, d1, d2,
    gn, gc, q0, q1, q2, xn, xc, x0, x1, x2,  # as weight_gradient has them; o: outputs of all groups
    EACH: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """M outputs, one tap: a sum over the positions of one part, K at a time."""
    if WIDE:
        xn, xc, x0, x1, x2 = functions.wide(xn), functions.wide(xc), functions.wide(x0), functions.wide(x1), functions.wide(x2)
        gn, gc, q0, q1, q2 = functions.wide(gn), functions.wide(gc), functions.wide(q0), functions.wide(q1), functions.wide(q2)
    o, xn, x0, x1, x2 = o * UNIT, xn * UNIT, x0 * UNIT, x1 * UNIT, x2 * UNIT
    gn, q0, q1, q2 = gn * UNIT, q0 * UNIT, q1 * UNIT, q2 * UNIT
    taps = k0 * k1 * k2
    pid = tl.program_id(0)
    tap = pid % taps
    pid = pid // taps
    row = pid % tl.cdiv(o, M) * M + tl.arange(0, M)
    part = pid // tl.cdiv(o, M)
    t0, t1, t2 = tap // k2 // k1 * d0 - p0, tap // k2 % k1 * d1 - p1, tap % k2 * d2 - p2
    from_g = g + (row * gc)[None, :]
    from_x = x + (row // EACH * xc)[None, :]
    from_x += t0 * x0 + t1 * x1 + t2 * x2
    m_row = (row < o)[None, :]
    sums = tl.zeros((K, M), tl.float32)
    for step in tl.range(part * chunk, tl.minimum(steps, (part + 1) * chunk)):
        at = (step + tl.zeros((), tl.int32)).to(tl.int64) if WIDE else step
        image, z0, z1, z2 = _positions(at * K + tl.arange(0, K), o0, o1, o2)
        m_z = image < n
        vg = tl.load(from_g + (image * gn + z0 * q0 + z1 * q1 + z2 * q2)[:, None],
                     mask=m_z[:, None] & m_row, other=0.0)
        a0, a1, a2 = z0 * s0, z1 * s1, z2 * s2
        inside = m_z & _inside(a0 + t0, a1 + t1, a2 + t2, i0, i1, i2)
        vx = tl.load(from_x + (image * xn + a0 * x0 + a1 * x1 + a2 * x2)[:, None],
                     mask=inside[:, None] & m_row, other=0.0)
        sums += vg.to(tl.float32) * vx.to(tl.float32)
    tl.store(parts + (functions.wide(part) * o + row) * taps + tap, tl.sum(sums, 0), mask=row < o)


# The host -----------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A program's positions (or outputs), its outputs (or channels), the depth of a step, and what Triton is told."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


Tiles = dict[tuple[str, str], tuple[Tile, ...]]
#: For each kind of arithmetic the tiles of a chip. Which of them a call gets depends on how many programs there are.
_TILES: Tiles = {
    ("half", "sm_90"): (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 4)),
    ("half", "sm_80"): (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4)),
    ("half", "gfx"): (Tile(128, 128, 32, 8, 2), Tile(64, 64, 64, 4, 2)),
    ("tf32", "sm_90"): (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4)),
    ("tf32", "sm_80"): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("tf32", "gfx"): (Tile(64, 64, 32, 4, 2),),
    ("ieee", "sm_90"): (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
    ("ieee", "sm_80"): (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
    ("ieee", "gfx"): (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
}
_WEIGHT_TILES: Tiles = {
    ("half", "sm_90"): (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    ("half", "sm_80"): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("half", "gfx"): (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    ("tf32", "sm_90"): (Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
    ("tf32", "sm_80"): (Tile(64, 64, 32, 4, 3),),
    ("tf32", "gfx"): (Tile(64, 64, 32, 4, 2),),
    ("ieee", "sm_90"): (Tile(32, 32, 16, 4, 2),),
    ("ieee", "sm_80"): (Tile(32, 32, 16, 4, 2),),
    ("ieee", "gfx"): (Tile(32, 32, 16, 4, 2),),
}
_COLUMNS = Tile(0, 0, 0, 0, 0)  # stands for the plain path
PLAIN = False
_FEW = 16  # channels below which a step takes several taps
_PARTS = 64  # parts of a sum over positions at most
_UNROLLED = 7  # taps of a row of a depthwise convolution at most that are written out
_SMALL = 1 << 30  # positions below which their numbers have 32 bits


def _kind(t: Tensor) -> str:
    return "half" if t.itemsize == 2 else "ieee" if precision(t, backends.tf32("conv")) == "ieee" else "tf32"


def _tiles(tiles: Tiles, t: Tensor) -> tuple[Tile, ...]:
    chip = launch.chip(t.device)
    if chip is launch.STAND_IN:
        return (Tile(32, 32, 32, 4, 1),)
    return tiles[_kind(t), "sm_90" if chip.nvidia >= 90 else "sm_80" if chip.nvidia else "gfx"]


def _fitting(tiles: Sequence[Tile], m: int, n: int) -> list[Tile]:
    """Those of which there is a whole one, or the last of them, cut down to what the matrix instruction takes"""
    most = power_of_two(m, 16), power_of_two(n, 16)
    few = [t for t in tiles if t.m <= most[0] and t.n <= most[1]]
    return few or [tiles[-1]._replace(m=min(tiles[-1].m, most[0]), n=min(tiles[-1].n, most[1]))]


def _cheapest(few: Sequence[Tile], count: Callable[[Tile], int], processors: int) -> Tile:
    """The one of the least time, as whole rounds of all processors; a small tile reads more for each product."""
    return min(few, key=lambda t: -(-count(t) // processors) * (t.m * t.n + 32 * (t.m + t.n)))


def _strides(t: Tensor, unit: int = 1, but: int | None = None) -> list[int]:
    """Of the batch, the channels and three dimensions: in units, but for one dimension. Where the size is 1, any will do: 16."""
    steps = [(s if n > 1 else 16) // (1 if d == but else unit) for d, (n, s) in enumerate(zip(t.shape, t.stride()))]
    return [*steps[:2], *three(steps[2:], 16 // unit)]


def _unit(t: Tensor, dim: int, *more: int) -> int:
    """How many numbers that lie next to each other along a dimension can be written at once, of a 16 bytes' at most"""
    steps = [s for d, (n, s) in enumerate(zip(t.shape, t.stride())) if n > 1 and d != dim]
    return math.gcd(16 // t.itemsize, t.shape[dim], *steps, *more) if t.stride(dim) == 1 else 1


def _far(*tensors: Tensor) -> bool:
    """Whether 32 bits do not reach all that may be multiplied, taps beside the image too"""
    return any(sum(n * abs(s) for n, s in zip(t.shape, t.stride())) >= _SMALL for t in tensors)


def _packed(t: Tensor, room: int, unit: int, dense: bool = False) -> Tensor:
    """With room for so many channels next to each other, and all else a multiple of unit apart. dense: nor may there be gaps."""
    steps = _strides(t)
    apart = all(s > 0 and s % unit == 0 for d, s in enumerate(steps) if d != 1)
    lies = t.stride(1) == 1 and apart and t.data_ptr() % 16 == 0
    if t.shape[1] == room and lies and (not dense or t.movedim(1, -1).is_contiguous()):
        return t
    return _copied(t, room, t.shape[-1], 0)


def _copied(t: Tensor, room: int, width: int, edge: int) -> Tensor:
    """With room for so many channels next to each other and rows of this width, which begin behind an edge; zeros around"""
    out = t.new_empty(t.shape[0], *t.shape[2:-1], width, room)
    size, steps, held = three(out.shape[1:-1], 1), _strides(t), t.shape[-1]
    longer = [(n, step) for n, step in zip(size, steps[2:]) if n > 1]  # dimensions of size 1 have no step of their own
    if width == held and all(step == n * inner for (_, step), (n, inner) in pairwise(longer)):
        held = math.prod(size)  # planes without gaps
        size, steps = [1, 1, held], [*steps[:2], 0, 0, longer[-1][1] if longer else 16]
    wide = power_of_two(room, 1, max(64, 2048 // power_of_two(math.prod(size))))
    high = power_of_two(math.prod(size), 1, 4096 // wide)
    programs = t.shape[0] * -(-math.prod(size) // high) * -(-room // wide)
    launch.run(pack, programs, t.device, out, t, t.shape[1], room, *size, held, edge, *steps, C=wide, P=high, num_warps=4)
    return out.movedim(-1, 1)


def _fuses(c: int, groups: int, kernel: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a row of the filter meets few channels that can lie next to each other"""
    return groups == 1 and c < _FEW <= c * kernel[-1] and dilation[-1] == 1 and not PLAIN


def _fused(input: Tensor, k: int, stride: int, padding: int, width: int) -> tuple[Tensor, int]:
    """The windows of each row as the channels of one position, which overlap in memory; and the room that a pixel has

    A convolution of few channels is one of k times as many, with filters of width 1.
    """
    whole, c = 16 // input.itemsize, input.shape[1]
    room = next((r for r in range(c, 2 * c + 2) if stride * r % whole == 0), power_of_two(c))
    step = whole // math.gcd(room, whole)
    x = _copied(input, room, -(-(input.shape[-1] + 2 * padding) // step) * step, padding)
    shape, steps = list(x.shape), list(x.stride())
    shape[1], shape[-1], steps[-1] = k * room, width, stride * room
    return x.as_strided(shape, steps), room


@lru_cache(1024)
def _box(m: int, *size: int) -> tuple[int, ...]:
    """m positions as a box, so that few boxes cover all images; the widest of those"""
    boxes = [(m >> a + b + c, 1 << a, 1 << b, 1 << c) for a in range(9) for b in range(9) for c in range(9) if m >> a + b + c]
    return min(boxes, key=lambda box: (_boxes(box, size), [-n for n in reversed(box)]))


def _boxes(box: Sequence[int], size: Sequence[int]) -> int:
    return math.prod(-(-n // b) for n, b in zip(size, box))


def conv(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
         padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
         activation: str | None) -> None:  # fmt: skip
    """activation(convolution(input, weight) + bias + residual)"""
    if not out.numel():
        return
    bias = None if bias is None else bias.contiguous()
    c, o = input.shape[1] // groups, out.shape[1] // groups
    last = out.stride(1) == 1
    alone = math.prod(weight.shape[2:]) == math.prod(stride) == groups == 1 and not any(padding)
    if alone and c > 1 and (last or bias is None or residual is None):
        window = conv_columns.Window(weight.shape[2:], stride, padding, dilation)
        conv_columns.conv(out, input, weight.transpose(0, 1) if transposed else weight, bias, residual, window, False, activation)
        return
    fused = not transposed and (c > 1 or o > 4) and _fuses(c, groups, weight.shape[2:], dilation)
    if fused:
        input, room = _fused(input, weight.shape[-1], stride[-1], padding[-1], out.shape[-1])
        whole = 16 // input.itemsize
        rows = weight.new_zeros(o, *weight.shape[2:-1], 1, -(-input.shape[1] // whole) * whole)
        rows[..., : input.shape[1]].unflatten(-1, (-1, room))[..., :c].copy_(weight.movedim(1, -1).unsqueeze(-3))
        weight, stride, padding = rows.movedim(-1, 1), [*stride[:-1], 1], [*padding[:-1], 0]
    _conv(out, input, weight, bias, residual, stride, padding, dilation, transposed, groups, activation, fused)


def _conv(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
          padding: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int, activation: str | None,
          fused: bool) -> None:  # fmt: skip
    """fused: the channels are those of several pixels"""
    s, p, d = three(stride, 1), three(padding, 0), three(dilation, 1)
    c, o = input.shape[1] // groups, out.shape[1] // groups
    kernel, size = three(weight.shape[2:], 1), three(out.shape[2:], 1)
    window = conv_columns.Window(weight.shape[2:], stride, padding, dilation)
    both = bias is not None and residual is not None
    last = out.stride(1) == 1
    if residual is not None and _strides(residual) != _strides(out):
        residual = like(out, residual)
    chip = launch.chip(out.device)
    phases = math.prod(s) if transposed else 1
    each = [out.shape[0], *(-(-n // step) if transposed else n for n, step in zip(size, s))]  # images and positions of a phase
    positions = math.prod(each)
    common = [math.gcd(a, b) for a, b in zip(s, d)]
    inverse = [pow(b // g, -1, a // g) if a > g else 0 for a, b, g in zip(s, d, common)]
    numbers = (*three(input.shape[2:], 1), *size, *kernel, *s, *p, *d, *common, *inverse)
    wide = positions >= _SMALL
    how = precision(input, backends.tf32("conv"))
    if c == 1 and o <= 4:
        _depthwise(out, input, weight, bias, residual, numbers, each, phases, last, wide, transposed, activation)
        return
    w = weight
    if transposed:  # outputs first
        w = w.transpose(0, 1) if groups == 1 else w.unflatten(0, (groups, c)).transpose(1, 2).flatten(0, 1)
    flat = c < _FEW
    unit, whole, room = 1, 16 // input.itemsize, c
    w_steps = _strides(w)
    if not flat:
        room = -(-c // whole) * whole if groups == 1 else c
        c = c if fused else room
        unit = math.gcd(c, whole, *_strides(input)[4:] if fused else [])
        w_steps = [math.prod(kernel) * room // unit, 1, *(math.prod(kernel[d:]) * room // unit for d in (1, 2, 3))]
    dense = 1 if last else out.dim() - 1
    y_unit = _unit(out, dense, o) if last else _unit(out, dense)
    boxes = chip.descriptors and groups == 1 and not flat and _kind(input) != "ieee" and (transposed or math.prod(s) == 1)
    boxes = boxes and not (fused and _strides(input)[4] % whole)
    if boxes:
        launch.allow_descriptors()
    few = [t._replace(k=t.k if flat else power_of_two(c, 16, t.k)) for t in _fitting(_tiles(_TILES, input), positions, o)]

    def counts(tile: Tile) -> tuple[int, int]:
        """Tiles in all, and those of a phase above each other"""
        tall = _boxes(_box(tile.m, *each), each) if boxes else -(-positions // tile.m)
        return -(-o // tile.n) * phases * tall * groups, tall

    def run(tile: Tile, out: Tensor) -> None:
        if tile is _COLUMNS:
            conv_columns.conv(out, input, weight, bias, residual, window, transposed, activation)
            return
        tiles, tall = counts(tile)
        a, b = (input, w) if flat else (_packed(input, c * groups, unit), _packed(w, room, unit, dense=True))
        held = (tile.stages - 1) * (tile.m + tile.n) * tile.k * input.itemsize + 128 * tile.m  # and where the sums change hands
        resident = max(1, min(4, chip.shared // held))
        launch.run(
            convolution, min(tiles, chip.processors * resident) if boxes else tiles, out.device, out, a, b, bias, residual, tiles,
            tall, out.shape[0], groups, c // unit, o // y_unit if last else o, *three(input.shape[2:], 1), *size[:2],
            size[2] if last else size[2] // y_unit, *numbers[6:], *_strides(a, unit, 1), *w_steps, *_strides(out, y_unit, dense),
            ACT=activation, TRANSPOSED=transposed, FLAT=flat, LAST=last, PRECISION=how, WIDE=wide, UNIT=unit, Y_UNIT=y_unit,
            BOXES=boxes, **dict(zip(("B", "B0", "B1", "B2"), _box(tile.m, *each) if boxes else (1, 1, 1, 1))), M=tile.m, N=tile.n,
            K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    tile = _cheapest(few, lambda t: counts(t)[0], chip.processors)
    if (PLAIN or tune.ON) and not fused and conv_columns.refuses(out, input, window.kernel, groups, transposed, both) is None:
        few.append(_COLUMNS)
        tile = _COLUMNS if PLAIN else tile
    if tune.ON:
        options = (input.dtype, how, transposed, flat, activation, weight.shape[2:], stride, dilation, last)
        sizes = positions, o, c, groups
        tile = tune.choose("convolution", chip, options, sizes, tile, few, lambda t: run(t, torch.empty_like(out)))
    run(tile, out)


def _depthwise(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, numbers: Sequence[int],
               each: Sequence[int], phases: int, last: bool, wide: bool, transposed: bool, activation: str | None) -> None:
    """numbers: sizes and the rest, as the kernel has them; each: images and positions of a phase"""
    wide = wide or _far(out, input, weight)
    o, kernel = out.shape[1], numbers[6:9]
    w = weight.reshape(o, -1)
    last = last and input.stride(1) == 1
    if last:
        w = w.t().contiguous().t()
    unit = math.gcd(_unit(out, 1), _unit(input, 1)) if last and input.shape[1] == o else 1
    steps = [w.stride(1) * math.prod(kernel[d:]) // unit for d in (1, 2, 3)]
    m, n = (64, power_of_two(o, 1, 64)) if last else (256, power_of_two(o, 1, 8))
    programs = -(-o // n) * phases * -(-math.prod(each) // m)
    launch.run(
        depthwise, programs, out.device, out, input, w, bias, residual, out.shape[0], o // unit, *numbers,
        *_strides(input, unit, 1), w.stride(0), *steps, *_strides(out, unit, 1), EACH=o // input.shape[1],
        ROW=kernel[2] if phases == 1 and kernel[2] <= _UNROLLED else 0, ACT=activation, TRANSPOSED=transposed, WIDE=wide,
        UNIT=unit, M=m, N=n, num_warps=4,
    )  # fmt: skip


def conv_weight(out: Tensor, grad: Tensor, input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:  # fmt: skip
    """The gradient of the weight: parts of the sum over positions, added up in their order"""
    if not out.numel():
        return
    if not grad.numel():
        out.zero_()
        return
    c, o = input.shape[1] // groups, grad.shape[1] // groups
    if not (c > 1 or o > 4) or not _fuses(c, groups, kernel_size, dilation):
        _conv_weight(out, grad, input, kernel_size, stride, padding, dilation, groups, False)
        return
    x, room = _fused(input, kernel_size[-1], stride[-1], padding[-1], grad.shape[-1])
    rows = out.new_empty(o, x.shape[1], *kernel_size[:-1], 1)
    _conv_weight(rows, grad, x, rows.shape[2:], [*stride[:-1], 1], [*padding[:-1], 0], dilation, 1, True)
    out.copy_(rows.unflatten(1, (-1, room))[:, :, :c].squeeze(-1).movedim(1, -1))


def _conv_weight(out: Tensor, grad: Tensor, input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int], groups: int, fused: bool) -> None:  # fmt: skip
    """fused: the channels are those of several pixels"""
    kernel, size, s = three(kernel_size, 1), three(grad.shape[2:], 1), three(stride, 1)
    c, o, taps = input.shape[1] // groups, grad.shape[1] // groups, math.prod(kernel)
    each = [grad.shape[0], *size]
    positions = math.prod(each)
    how = precision(input, backends.tf32("conv"))
    chip = launch.chip(out.device)
    window = conv_columns.Window(kernel_size, stride, padding, dilation)
    numbers = (*three(input.shape[2:], 1), *size, *kernel, *s, *three(padding, 0), *three(dilation, 1))
    wide = positions >= _SMALL

    def parts(tiles: int, steps: int) -> tuple[int, int]:
        """How many parts there are for each tile, and the steps of one"""
        few = max(1, min(_PARTS, 2 * chip.processors // tiles, steps // 4))
        chunk = -(-steps // few)
        return -(-steps // chunk), chunk

    if c == 1 and o <= 4:
        wide = wide or _far(grad, input)
        o *= groups
        last = grad.stride(1) == input.stride(1) == 1
        unit = math.gcd(_unit(grad, 1), _unit(input, 1)) if last and o == groups else 1
        m, k = (64, 32) if last else (8, 256)
        m, k = power_of_two(o, 1, m), power_of_two(positions, 16, k)
        tiles, steps = -(-o // m) * taps, -(-positions // k)
        count, chunk = parts(tiles, steps)
        sums = torch.empty(count, o, taps, dtype=torch.float32, device=out.device)
        launch.run(
            depthwise_weight_gradient, tiles * count, out.device, sums, grad, input, steps, chunk, grad.shape[0], o // unit,
            *numbers, *_strides(grad, unit, 1), *_strides(input, unit, 1), EACH=o // groups, WIDE=wide, UNIT=unit, M=m, K=k,
            num_warps=4,
        )  # fmt: skip
        out.copy_((sums[0] if count == 1 else sums.sum(0)).view(out.shape))
        return

    flat = c < _FEW
    whole = 16 // grad.itemsize
    g_room = -(-o // whole) * whole if groups == 1 else o
    room = -(-c // whole) * whole if groups == 1 and not flat and not fused else c
    g_unit, unit = math.gcd(g_room, whole), 1 if flat else math.gcd(room, whole, *_strides(input)[4:] if fused else [])
    boxes = chip.descriptors and not flat and _kind(input) != "ieee" and math.prod(s) == 1 and g_unit == whole
    boxes = boxes and (unit == whole or (fused and _strides(input)[4] % whole == 0))
    if boxes:
        launch.allow_descriptors()
    few = _fitting(_tiles(_WEIGHT_TILES, input), g_room, room * taps if flat else room)

    def run(tile: Tile) -> Tensor:
        """The sum's parts: outputs, taps and channels, with the room that the packed tensors have"""
        if tile is _COLUMNS:
            return conv_columns.conv_weight(grad, input, window).view(1, o, c, taps).mT
        tiles = -(-g_room // tile.m) * groups * (-(-c * taps // tile.n) if flat else -(-room // tile.n) * taps)
        steps = _boxes(_box(tile.k, *each), each) if boxes else -(-positions // tile.k)
        count, chunk = parts(tiles, steps)
        g, x = _packed(grad, g_room * groups, g_unit), input if flat else _packed(input, room * groups, unit)
        sums = torch.empty(count, g_room * groups, taps, room, dtype=torch.float32, device=out.device)
        launch.run(
            weight_gradient, tiles * count, out.device, sums, g, x, steps, chunk, grad.shape[0], groups, room // unit,
            g_room // g_unit, *numbers, *_strides(g, g_unit, 1), *_strides(x, unit, 1), FLAT=flat, PRECISION=how, WIDE=wide,
            UNIT=unit, G_UNIT=g_unit, BOXES=boxes,
            **dict(zip(("B", "B0", "B1", "B2"), _box(tile.k, *each) if boxes else (1, 1, 1, 1))), M=tile.m, N=tile.n, K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return sums

    tile = few[0]
    if (PLAIN or tune.ON) and not fused and conv_columns.refuses(grad, input, kernel_size, groups, False, False) is None:
        few.append(_COLUMNS)
        tile = _COLUMNS if PLAIN else tile
    if tune.ON:
        options = (input.dtype, how, kernel, stride, dilation, input.stride(1) == 1, grad.stride(1) == 1)
        tile = tune.choose("weight_gradient", chip, options, (positions, o, c, groups), tile, few, run)
    sums = run(tile)
    total = (sums[0] if len(sums) == 1 else sums.sum(0))[: out.shape[0], :, :c]
    out.copy_(total.unflatten(1, tuple(kernel_size)).movedim(-1, 1))


def supports(op: str, *args: Any) -> str | None:
    """Why not, in a sentence"""
    return launch.refuses(*(a for a in args[:4] if isinstance(a, Tensor)))


KERNELS: dict[str, Callable[..., None]] = {"conv": conv, "conv_weight": conv_weight}
