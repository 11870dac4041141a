"""Convolutions on the GPU: an implicit im2col. Both operands of a product are read where they lie, in either memory format.

Everything is three-dimensional here: a missing dimension has size 1. A transposed convolution, which is also the gradient of the
input, falls into *phases*: outputs that are alike modulo the strides meet the same taps, so nothing is multiplied by zeros (Shi
et al. 2016, "Is the deconvolution layer the same as a convolutional layer?"). Either way output x of a dimension meets in tap
a what lies at x · move + base + a · delta. Depthwise convolutions are sums of products without a matrix instruction.

``conv_columns`` is the plain path, with an explicit im2col or col2im. A tuner may find it faster; otherwise it is taken only
where PLAIN says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn import backends

from ..layout import three
from . import conv_columns
from .engine import functions, launch, tune
from .engine.launch import power_of_two
from .matmul import precision

# The kernels --------------------------------------------------------------------------------------------------------------------


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
def convolution(
    y, x, w, bias, r,  # output, input, weight; bias and residual or None
    n, groups, c, o,  # batch; channels and outputs of a group
    i0, i1, i2, o0, o1, o2, k0, k1, k2,  # sizes of input, output and filter
    s0, s1, s2, p0, p1, p2, d0, d1, d2, g0, g1, g2, v0, v1, v2,  # stride, padding, dilation; as _taps has g and inverse
    xn, xc, x0, x1, x2, wg, wo, wc, w0, w1, w2, yn, yc, y0, y1, y2, rn, rc, r0, r1, r2,  # strides
    ACT: tl.constexpr, TRANSPOSED: tl.constexpr, DEPTHWISE: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """M positions of N outputs. FLAT: channels are few, a step of the sum takes K of (tap, channel); else K channels of one
    tap."""
    across = tl.cdiv(o, N)
    pid = tl.program_id(0)
    column = pid % across
    pid = pid // across
    f0, f1, f2 = 0, 0, 0  # the phase
    if TRANSPOSED:
        f2 = pid % s2
        pid = pid // s2
        f1 = pid % s1
        pid = pid // s1
        f0 = pid % s0
        pid = pid // s0
        q0, q1, q2 = (o0 - f0 + s0 - 1) // s0, (o1 - f1 + s1 - 1) // s1, (o2 - f2 + s2 - 1) // s2
        tall = tl.cdiv(functions.wide(n) * ((o0 + s0 - 1) // s0) * ((o1 + s1 - 1) // s1) * ((o2 + s2 - 1) // s2), M)
    else:
        q0, q1, q2 = o0, o1, o2
        tall = tl.cdiv(functions.wide(n) * o0 * o1 * o2, M)
    rows = pid % tall * M + tl.arange(0, M)
    group = (pid // tall).to(tl.int64)
    t0, e0, n0, m0, b0, j0 = _taps(f0, k0, s0, p0, d0, g0, v0, TRANSPOSED)
    t1, e1, n1, m1, b1, j1 = _taps(f1, k1, s1, p1, d1, g1, v1, TRANSPOSED)
    t2, e2, n2, m2, b2, j2 = _taps(f2, k2, s2, p2, d2, g2, v2, TRANSPOSED)
    z2 = rows % tl.maximum(1, q2)
    rows = rows // tl.maximum(1, q2)
    z1 = rows % tl.maximum(1, q1)
    rows = rows // tl.maximum(1, q1)
    z0 = rows % tl.maximum(1, q0)
    image = rows // tl.maximum(1, q0)
    m_rows = (image < n) & (q0 > 0) & (q1 > 0) & (q2 > 0)
    a0, a1, a2 = (z0 * m0 + b0)[:, None], (z1 * m1 + b1)[:, None], (z2 * m2 + b2)[:, None]  # what the first tap meets
    outputs = (column * N + tl.arange(0, N))[None, :]
    m_outputs = outputs < o
    from_x = x + (image * xn)[:, None] + a0 * x0 + a1 * x1 + a2 * x2
    a0, a1, a2 = a0.to(tl.int32), a1.to(tl.int32), a2.to(tl.int32)
    from_w = w + group * wg + outputs.to(tl.int64) * wo + t0 * w0 + t1 * w1 + t2 * w2
    sums = tl.zeros((M, N), tl.float32)
    if DEPTHWISE:  # c is 1: a group's outputs are a column each, the groups themselves go along the columns
        every = column * N + tl.arange(0, N)[None, :]
        m_outputs = every < o
        each = every.to(tl.int64)
        from_x += each // (o // groups) * xc
        from_w = w + each // (o // groups) * wg + each % (o // groups) * wo + t0 * w0 + t1 * w1 + t2 * w2
        for tap in tl.range(0, n0 * n1 * n2):
            u2 = tap % tl.maximum(1, n2)
            u1 = tap // tl.maximum(1, n2) % tl.maximum(1, n1)
            u0 = tap // tl.maximum(1, n2 * n1)
            h0, h1, h2 = a0 + u0 * j0, a1 + u1 * j1, a2 + u2 * j2
            inside = m_rows[:, None] & (h0 >= 0) & (h0 < i0) & (h1 >= 0) & (h1 < i1) & (h2 >= 0) & (h2 < i2)
            at_x = functions.wide(u0 * j0) * x0 + functions.wide(u1 * j1) * x1 + functions.wide(u2 * j2) * x2
            at_w = functions.wide(u0 * e0) * w0 + functions.wide(u1 * e1) * w1 + functions.wide(u2 * e2) * w2
            vx = tl.load(from_x + at_x, mask=inside & m_outputs, other=0.0).to(tl.float32)
            vw = tl.load(from_w + at_w, mask=m_outputs, other=0.0).to(tl.float32)
            sums += vx * vw
        outputs = every
    elif FLAT:
        from_x += group * c * xc
        for begin in tl.range(0, n0 * n1 * n2 * c, K):
            k = begin + tl.arange(0, K)
            m_k = k < n0 * n1 * n2 * c
            channel, tap = (k % c).to(tl.int64), k // c
            u2 = tap % tl.maximum(1, n2)
            u1 = tap // tl.maximum(1, n2) % tl.maximum(1, n1)
            u0 = tap // tl.maximum(1, n2 * n1)
            h0, h1, h2 = a0 + (u0 * j0)[None, :], a1 + (u1 * j1)[None, :], a2 + (u2 * j2)[None, :]
            inside = m_rows[:, None] & (h0 >= 0) & (h0 < i0) & (h1 >= 0) & (h1 < i1) & (h2 >= 0) & (h2 < i2)
            u0, u1, u2 = u0.to(tl.int64), u1.to(tl.int64), u2.to(tl.int64)
            vx = tl.load(from_x + (channel * xc + u0 * j0 * x0 + u1 * j1 * x1 + u2 * j2 * x2)[None, :],
                         mask=inside & m_k[None, :], other=0.0)
            vw = tl.load(from_w + (channel * wc + u0 * e0 * w0 + u1 * e1 * w1 + u2 * e2 * w2)[:, None],
                         mask=m_k[:, None] & m_outputs, other=0.0)
            sums = tl.dot(vx, vw, sums, input_precision=PRECISION)
    else:
        from_x += group * c * xc
        steps = tl.cdiv(c, K)
        for step in tl.range(0, n0 * n1 * n2 * steps):
            tap = step // steps
            channel = step % steps * K + tl.arange(0, K)
            u2 = tap % tl.maximum(1, n2)
            u1 = tap // tl.maximum(1, n2) % tl.maximum(1, n1)
            u0 = tap // tl.maximum(1, n2 * n1)
            h0, h1, h2 = a0 + u0 * j0, a1 + u1 * j1, a2 + u2 * j2
            inside = m_rows[:, None] & (h0 >= 0) & (h0 < i0) & (h1 >= 0) & (h1 < i1) & (h2 >= 0) & (h2 < i2)
            at_x = functions.wide(u0 * j0) * x0 + functions.wide(u1 * j1) * x1 + functions.wide(u2 * j2) * x2
            at_w = functions.wide(u0 * e0) * w0 + functions.wide(u1 * e1) * w1 + functions.wide(u2 * e2) * w2
            vx = tl.load(from_x + at_x + channel.to(tl.int64)[None, :] * xc, mask=inside & (channel < c)[None, :], other=0.0)
            vw = tl.load(from_w + at_w + channel.to(tl.int64)[:, None] * wc, mask=(channel < c)[:, None] & m_outputs, other=0.0)
            sums = tl.dot(vx, vw, sums, input_precision=PRECISION)
    if TRANSPOSED:
        z0, z1, z2 = z0 * s0 + f0, z1 * s1 + f1, z2 * s2 + f2
    z0, z1, z2 = z0[:, None], z1[:, None], z2[:, None]
    to = outputs.to(tl.int64) if DEPTHWISE else group * o + outputs
    inside = m_rows[:, None] & m_outputs
    if bias is not None:
        sums += tl.load(bias + to, mask=m_outputs, other=0.0).to(tl.float32)
    if r is not None:
        sums += tl.load(r + image[:, None] * rn + to * rc + z0 * r0 + z1 * r1 + z2 * r2, mask=inside, other=0.0).to(tl.float32)
    sums = functions.activation(sums, ACT, 0.0, 0.0)
    tl.store(y + image[:, None] * yn + to * yc + z0 * y0 + z1 * y1 + z2 * y2, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient(
    parts, g, x,  # float32, (parts, outputs, channels of a group · taps); gradient of the output; input
    n, groups, c, o, chunk,  # batch; channels and outputs of a group; positions of a part
    i0, i1, i2, o0, o1, o2, k0, k1, k2, s0, s1, s2, p0, p1, p2, d0, d1, d2,
    gn, gc, q0, q1, q2, xn, xc, x0, x1, x2,  # strides
    DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """M outputs by N of (channel, tap), a sum over the positions of one part, K at a time. DEPTHWISE: M outputs, one tap."""
    taps = k0 * k1 * k2
    width = c * taps
    pid = tl.program_id(0)
    across = tl.cdiv(width, N)
    column = pid % across * N + tl.arange(0, N)
    pid = pid // across
    down = tl.cdiv(o, M)
    row = (pid % down * M + tl.arange(0, M)).to(tl.int64)
    pid = pid // down
    group = (pid % groups).to(tl.int64)
    part = (pid // groups).to(tl.int64)
    if DEPTHWISE:  # groups are passed as 1, o counts all outputs and the channels are those of x
        pid = tl.program_id(0)
        column = pid % taps + tl.zeros((1,), tl.int32)
        pid = pid // taps
        row = (pid % down * M + tl.arange(0, M)).to(tl.int64)
        part = (pid // down).to(tl.int64)
    channel, tap = (column // taps).to(tl.int64), column % taps
    t0, t1, t2 = tap // (k2 * k1) * d0 - p0, tap // k2 % k1 * d1 - p1, tap % k2 * d2 - p2
    from_g = g + (group * o + row)[:, None] * gc
    from_x = x + t0.to(tl.int64) * x0 + t1.to(tl.int64) * x1 + t2.to(tl.int64) * x2
    if not DEPTHWISE:
        from_x += (group * c + channel) * xc
    positions = functions.wide(n) * o0 * o1 * o2
    if DEPTHWISE:
        sums = tl.zeros((M, K), tl.float32)
    else:
        sums = tl.zeros((M, N), tl.float32)
    for begin in tl.range(part * chunk, tl.minimum(positions, (part + 1) * chunk), K):
        z = (begin + tl.arange(0, K)).to(tl.int64)
        m_z = z < positions
        z2 = z % o2
        z = z // o2
        z1 = z % o1
        z = z // o1
        z0 = z % o0
        image = z // o0
        vg = tl.load(from_g + (image * gn + z0 * q0 + z1 * q1 + z2 * q2)[None, :], mask=(row < o)[:, None] & m_z[None, :],
                     other=0.0)
        at = image * xn + z0 * s0 * x0 + z1 * s1 * x1 + z2 * s2 * x2
        z0, z1, z2 = (z0 * s0).to(tl.int32), (z1 * s1).to(tl.int32), (z2 * s2).to(tl.int32)
        if DEPTHWISE:
            h0, h1, h2 = (z0 + t0)[None, :], (z1 + t1)[None, :], (z2 + t2)[None, :]
            inside = m_z[None, :] & (h0 >= 0) & (h0 < i0) & (h1 >= 0) & (h1 < i1) & (h2 >= 0) & (h2 < i2) & (row < o)[:, None]
            vx = tl.load(from_x + at[None, :] + (row // (o // c))[:, None] * xc, mask=inside, other=0.0)
            sums += vg.to(tl.float32) * vx.to(tl.float32)
        else:
            h0, h1, h2 = z0[:, None] + t0[None, :], z1[:, None] + t1[None, :], z2[:, None] + t2[None, :]
            inside = (h0 >= 0) & (h0 < i0) & (h1 >= 0) & (h1 < i1) & (h2 >= 0) & (h2 < i2)
            inside = inside & m_z[:, None] & (column < width)[None, :]
            vx = tl.load(from_x[None, :] + at[:, None], mask=inside, other=0.0)
            sums = tl.dot(vg, vx, sums, input_precision=PRECISION)
    if DEPTHWISE:
        to = parts + (part * o + row) * taps + column
        tl.store(to, tl.sum(sums, 1), mask=row < o)
    else:
        to = parts + ((part * groups + group) * o + row)[:, None] * width + column[None, :]
        tl.store(to, sums, mask=(row < o)[:, None] & (column < width)[None, :])


# The host -----------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A program's positions (or outputs), its outputs (or taps), the depth of a step, and what Triton is told."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


#: By the bytes of a number. The first is what a call gets; the others are what a tuner may find better.
_TILES = {2: (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
          4: (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2))}
_WEIGHT_TILES = {2: (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)), 4: (Tile(32, 32, 16, 4, 2),)}
_DEPTHWISE = Tile(64, 32, 1, 4, 1)
_COLUMNS = Tile(0, 0, 0, 0, 0)  # stands for the plain path
PLAIN = False
_FEW = 16  # channels below which a step takes several taps
_PARTS = 64  # parts of a sum over positions at most


def _tiles(tiles: Mapping[int, tuple[Tile, ...]], t: Tensor) -> tuple[Tile, ...]:
    return (Tile(32, 32, 32, 4, 1),) if launch.chip(t.device) is launch.STAND_IN else tiles[t.itemsize]


def _strides(t: Tensor) -> list[int]:
    """Of the batch, the channels and three dimensions"""
    return [*t.stride()[:2], *three(t.stride()[2:], 0)]


def conv(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
         padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
         activation: str | None) -> None:
    """activation(convolution(input, weight) + bias + residual)"""
    if not out.numel():
        return
    bias = None if bias is None else bias.contiguous()
    s, p, d = three(stride, 1), three(padding, 0), three(dilation, 1)
    c, o = input.shape[1] // groups, out.shape[1] // groups
    w = weight.stride()
    wg, wo, wc = (c * w[0], w[1], w[0]) if transposed else (o * w[0], w[0], w[1])
    depthwise = c == 1 and o <= 4
    flat = c < _FEW
    size = three(out.shape[2:], 1)
    phases = math.prod(s) if transposed else 1
    positions = out.shape[0] * math.prod(-(-n // step) if transposed else n for n, step in zip(size, s))
    columns = o * groups if depthwise else o
    few = [
        t._replace(n=power_of_two(columns, 1 if depthwise else 16, t.n),
                   m=power_of_two(positions, 16, min(t.m, 64) if flat else t.m))
        for t in ((_DEPTHWISE,) if depthwise else _tiles(_TILES, input))
    ]  # fmt: skip
    common = [math.gcd(a, b) for a, b in zip(s, d)]
    inverse = [pow(b // g, -1, a // g) if a > g else 0 for a, b, g in zip(s, d, common)]
    how = precision(input, backends.tf32("conv"))

    window = conv_columns.Window(weight.shape[2:], stride, padding, dilation)

    def run(tile: Tile, out: Tensor) -> None:
        if tile is _COLUMNS:
            conv_columns.conv(out, input, weight, bias, residual, window, transposed, activation)
            return
        programs = -(-columns // tile.n) * phases * -(-positions // tile.m) * (1 if depthwise else groups)
        launch.run(
            convolution, programs, out.device, out, input, weight, bias, residual, out.shape[0], groups, c, columns,
            *three(input.shape[2:], 1), *size, *three(weight.shape[2:], 1), *s, *p, *d, *common, *inverse,
            *_strides(input), wg, wo, wc, *three(w[2:], 0), *_strides(out),
            *(_strides(residual) if residual is not None else [0] * 5),
            ACT=activation, TRANSPOSED=transposed, DEPTHWISE=depthwise, FLAT=flat, PRECISION=how, M=tile.m,
            N=tile.n, K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    tile = few[0]
    both = bias is not None and residual is not None
    if (PLAIN or tune.ON) and conv_columns.refuses(out, input, window.kernel, groups, transposed, both) is None:
        few.append(_COLUMNS)
        tile = _COLUMNS if PLAIN else tile
    if tune.ON:
        options = (input.dtype, how, transposed, flat, activation, weight.shape[2:], stride, dilation, input.stride(1) == 1)
        tile = tune.choose("convolution", launch.chip(out.device), options, (positions, columns, c, groups), tile, few,
                           lambda t: run(t, torch.empty_like(out)))  # fmt: skip
    run(tile, out)


def conv_weight(out: Tensor, grad: Tensor, input: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
    """The gradient of the weight: parts of the sum over positions, added up in their order"""
    if not out.numel():
        return
    if not grad.numel():
        out.zero_()
        return
    kernel, size = three(kernel_size, 1), three(grad.shape[2:], 1)
    c, o, taps = input.shape[1] // groups, grad.shape[1] // groups, math.prod(kernel)
    positions = grad.shape[0] * math.prod(size)
    depthwise = c == 1 and o <= 4
    rows = o * groups if depthwise else o
    how = precision(input, backends.tf32("conv"))
    few = [
        t._replace(k=power_of_two(positions, 16, 64) if depthwise else t.k, m=power_of_two(rows, 16, 32 if depthwise else t.m),
                   n=power_of_two(c * taps, 16, t.n))
        for t in _tiles(_WEIGHT_TILES, input)[: 1 if depthwise else None]
    ]  # fmt: skip

    window = conv_columns.Window(kernel_size, stride, padding, dilation)

    def run(tile: Tile) -> Tensor:
        """The sum's parts"""
        if tile is _COLUMNS:
            return conv_columns.conv_weight(grad, input, window)
        tiles = -(-rows // tile.m) * (taps if depthwise else -(-c * taps // tile.n) * groups)
        parts = max(1, min(_PARTS, 2 * launch.chip(out.device).processors // tiles, positions // (4 * tile.k)))
        chunk = -(-positions // parts // tile.k) * tile.k if parts > 1 else positions
        parts = -(-positions // chunk)
        sums = torch.empty(parts, out.shape[0], c * taps, dtype=torch.float32, device=out.device)
        launch.run(
            weight_gradient, tiles * parts, out.device, sums, grad, input, grad.shape[0], 1 if depthwise else groups,
            groups if depthwise else c, rows, chunk, *three(input.shape[2:], 1), *size, *kernel, *three(stride, 1),
            *three(padding, 0), *three(dilation, 1), *_strides(grad), *_strides(input), DEPTHWISE=depthwise,
            PRECISION=how, M=tile.m, N=tile.n, K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return sums

    tile = few[0]
    if (PLAIN or tune.ON) and conv_columns.refuses(grad, input, kernel_size, groups, False, False) is None:
        few.append(_COLUMNS)
        tile = _COLUMNS if PLAIN else tile
    if tune.ON:
        options = (input.dtype, how, kernel, stride, dilation, input.stride(1) == 1, grad.stride(1) == 1)
        tile = tune.choose("weight_gradient", launch.chip(out.device), options, (positions, rows, c, groups), tile, few, run)
    sums = run(tile)
    out.copy_((sums[0] if len(sums) == 1 else sums.sum(0)).view(out.shape))


def supports(op: str, *args: Any) -> str | None:
    """Why not, in a sentence"""
    return launch.refuses(*(a for a in args[:4] if isinstance(a, Tensor)))


KERNELS: dict[str, Callable[..., None]] = {"conv": conv, "conv_weight": conv_weight}
