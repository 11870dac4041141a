"""Convolutions the plain way: an explicit im2col and a matrix product, or a product and col2im, its adjoint.

Columns are (images · positions, channels · taps), a row for what each position of the filter sees. They are written out, so a
call takes as much memory as that; in exchange the product is the one of ``matmul``, with its tiles and tensor maps. col2im
gathers: each pixel asks the positions that see it. No atomics. Sizes are three-dimensional, as in ``conv``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import three
from . import matmul
from .engine import functions, launch

_BLOCK = 1024
_MOST = 1 << 30  # bytes of columns


@triton.jit
def im2col(
    columns, x, rows, c, i0, i1, i2, o0, o1, o2, k0, k1, k2, s0, s1, s2, p0, p1, p2, d0, d1, d2, xn, xc, x0, x1, x2,
    C: tl.constexpr,
):  # fmt: skip
    """columns[image, position; channel, tap] = x[image, channel, position · s - p + tap · d], or 0 beside the image"""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    taps = functions.wide(k0) * k1 * k2
    row, tap = at // (c * taps), at % taps
    channel = at // taps % c
    z2, z1, z0 = row % o2, row // o2 % o1, row // o2 // o1 % o0
    h0 = z0 * s0 - p0 + tap // k2 // k1 * d0
    h1 = z1 * s1 - p1 + tap // k2 % k1 * d1
    h2 = z2 * s2 - p2 + tap % k2 * d2
    inside = (row < rows) & (h0 >= 0) & (h0 < i0) & (h1 >= 0) & (h1 < i1) & (h2 >= 0) & (h2 < i2)
    image = row // o2 // o1 // o0
    v = tl.load(x + image * xn + channel * xc + h0 * x0 + h1 * x1 + h2 * x2, mask=inside, other=0.0)
    tl.store(columns + at, v, mask=row < rows)


@triton.jit
def col2im(
    y, columns, bias, r, n, c, i0, i1, i2, o0, o1, o2, k0, k1, k2, s0, s1, s2, p0, p1, p2, d0, d1, d2,
    yn, yc, y0, y1, y2, rn, rc, r0, r1, r2, ACT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y[image, channel, h] = act(Σ columns[image, position; channel, tap] + bias + r), where position · s - p + tap · d = h"""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    channel, h2, h1, h0 = at % c, at // c % i2, at // c // i2 % i1, at // c // i2 // i1 % i0
    image = at // c // i2 // i1 // i0
    there = image < n
    taps = functions.wide(k0) * k1 * k2
    sums = tl.zeros((C,), tl.float32)
    for tap in tl.range(0, k0 * k1 * k2):
        t0, t1, t2 = h0 + p0 - tap // k2 // k1 * d0, h1 + p1 - tap // k2 % k1 * d1, h2 + p2 - tap % k2 * d2
        inside = there & (t0 >= 0) & (t1 >= 0) & (t2 >= 0) & (t0 % s0 == 0) & (t1 % s1 == 0) & (t2 % s2 == 0)
        z0, z1, z2 = t0 // s0, t1 // s1, t2 // s2
        inside = inside & (z0 < o0) & (z1 < o1) & (z2 < o2)
        row = ((image * o0 + z0) * o1 + z1) * o2 + z2
        sums += tl.load(columns + (row * c + channel) * taps + tap, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        sums += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    if r is not None:
        sums += tl.load(r + image * rn + channel * rc + h0 * r0 + h1 * r1 + h2 * r2, mask=there, other=0.0).to(tl.float32)
    sums = functions.activation(sums, ACT, 0.0, 0.0)
    tl.store(y + image * yn + channel * yc + h0 * y0 + h1 * y1 + h2 * y2, sums.to(y.dtype.element_ty), mask=there)


class Window(NamedTuple):
    """How a filter goes over an image"""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def numbers(self) -> list[int]:
        return [n for numbers, one in zip(self, (1, 1, 0, 1)) for n in three(numbers, one)]


def _strides(t: Tensor | None) -> list[int]:
    return [0] * 5 if t is None else [*t.stride()[:2], *three(t.stride()[2:], 0)]


def refuses(out: Tensor, input: Tensor, kernel: Sequence[int], groups: int, transposed: bool, both: bool) -> str | None:
    """Why not, in a sentence; both: a bias and a residual."""
    if groups > 1:
        return "columns are for one group"
    small, channels = (input, out.shape[1]) if transposed else (out, input.shape[1])
    if small.numel() // small.shape[1] * channels * math.prod(kernel) * (4 if transposed else out.itemsize) > _MOST:
        return "the columns would be too large"
    if not transposed and not out.movedim(1, -1).is_contiguous() and (both or not out.is_contiguous()):
        return "an image that is channels first has room for a bias or for a residual"
    return None


def columns(x: Tensor, positions: Sequence[int], window: Window) -> Tensor:
    """im2col: (images · positions, channels · taps)"""
    if math.prod(window.kernel) == math.prod(window.stride) == 1 and not any(window.padding):
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    rows, width = x.shape[0] * math.prod(positions), x.shape[1] * math.prod(window.kernel)
    out = x.new_empty(rows, width)
    launch.run(im2col, -(-rows * width // _BLOCK), x.device, out, x, rows, x.shape[1], *three(x.shape[2:], 1),
               *three(positions, 1), *window.numbers(), *_strides(x), C=_BLOCK, num_warps=4)  # fmt: skip
    return out


def conv(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    window: Window,
    transposed: bool,
    activation: str | None,
) -> None:
    """activation(convolution(input, weight) + bias + residual), of one group; the bias is contiguous"""
    if transposed:
        rows = input.movedim(1, -1).reshape(-1, input.shape[1])
        made = rows.new_empty(len(rows), weight[0].numel(), dtype=torch.float32)  # to be added up: rounded once, then
        matmul.multiply(made, rows, weight.reshape(len(weight), -1))
        launch.run(col2im, -(-out.numel() // _BLOCK), out.device, out, made, bias, residual, out.shape[0], out.shape[1],
                   *three(out.shape[2:], 1), *three(input.shape[2:], 1), *window.numbers(), *_strides(out), *_strides(residual),
                   ACT=activation, C=_BLOCK, num_warps=4)  # fmt: skip
        return
    seen, filters = columns(input, out.shape[2:], window), weight.reshape(len(weight), -1)
    if out.movedim(1, -1).is_contiguous():
        rest = None if residual is None else residual.movedim(1, -1).reshape(len(seen), -1)
        e = matmul.Epilogue(bias, rest, act=activation)
        matmul.multiply(out.movedim(1, -1).view(len(seen), -1), seen, filters.t(), e)
    else:
        images = out.view(*out.shape[:2], -1)
        rest = bias[:, None].expand(images.shape) if bias is not None else residual
        e = matmul.Epilogue(None, None if rest is None else rest.reshape(images.shape), act=activation)
        seen = seen.view(len(out), -1, seen.shape[1]).mT
        matmul.multiply(images, filters.expand(len(out), *filters.shape), seen, e)


def conv_weight(grad: Tensor, input: Tensor, window: Window) -> Tensor:
    """The gradient of the weight, in float32: one part, (1, outputs, channels · taps)"""
    seen = columns(input, grad.shape[2:], window)
    sums = grad.new_empty(1, grad.shape[1], seen.shape[1], dtype=torch.float32)
    matmul.multiply(sums[0], grad.movedim(1, -1).reshape(len(seen), -1).t(), seen)
    return sums
