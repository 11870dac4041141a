"""Convolutions in Triton: the products with tiles of positions, packing, depthwise sums, and the weights' gradients. Who calls
them, and how a convolution falls into phases, taps and boxes: conv.

A compiler that knows nothing of a size but that 16 does not divide it loads number by number. So what may be a multiple of 8 at
best is passed as a multiple of a UNIT, which is a constant. Positions are rows: where it sees no neighbours in either
dimension, Triton lays neighbouring threads along the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .engine import functions


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
