"""Normalisation on the GPU.

Layer and root-mean-square norms take rows: a program keeps whole ones in its registers; of longer ones it takes a block, whose
moments or sums are joined with those of the others in their order. Their parameters' gradients are summed by each program for the
rows that it takes, and then over programs: no atomics.

Batch and group norms take lines: all of a channel's numbers in the batch, or a group's in an image. ``moments`` joins a line's
blocks in float64; where lines are few they are cut into parts, which ``join_moments`` joins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import functions, launch
from .engine.launch import power_of_two

# Rows: the kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _step(stride, UNIT: tl.constexpr):
    """A stride that was given in units, so that the compiler knows that it is a multiple"""
    return functions.wide(stride) * UNIT


@triton.jit
def _row_tile(x, residual, row, there, j, n, x_r, r_r):
    """(R, C) numbers of rows, or of a sum of rows, rounded as it is stored"""
    inside = there[:, None] & (j < n)[None, :]
    v = tl.load(x + row[:, None] * x_r + j[None, :], mask=inside, other=0.0)
    if residual is not None:
        r = tl.load(residual + row[:, None] * r_r + j[None, :], mask=inside, other=0.0)
        v = (v.to(tl.float32) + r.to(tl.float32)).to(x.dtype.element_ty)
    return v.to(tl.float32), inside


@triton.jit
def _store_normalised(y, r, weight, bias, row, j, n, inside):
    if weight is not None:
        r *= tl.load(weight + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        r += tl.load(bias + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * n + j[None, :], r.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _row_stats(stats, rows, row, there, CENTRED: tl.constexpr):
    """(mean, 1 / deviation), as columns"""
    if CENTRED:
        mean = tl.load(stats + row, mask=there, other=0.0).to(tl.float32)[:, None]
        rstd = tl.load(stats + rows + row, mask=there, other=0.0).to(tl.float32)[:, None]
    else:
        rstd = tl.load(stats + row, mask=there, other=0.0).to(tl.float32)[:, None]
        mean = rstd * 0.0
    return mean, rstd


@triton.jit
def norm_rows(
    y, total, stats, x, residual, weight, bias, rows, n, x_r, r_r, eps,
    CENTRED: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) / deviation · weight + bias; total = x + residual if there is one"""
    n, x_r, r_r = n * UNIT, _step(x_r, UNIT), _step(r_r, UNIT)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    j = tl.arange(0, C).to(tl.int64)
    v, inside = _row_tile(x, residual, row, there, j, n, x_r, r_r)
    if total is not None:
        tl.store(total + row[:, None] * n + j[None, :], v.to(total.dtype.element_ty), mask=inside)
    mean = tl.zeros((R,), tl.float32)
    if CENTRED:
        mean = tl.sum(v, 1) / n
    d = tl.where(inside, v - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(d * d, 1) / n + eps)
    if CENTRED:
        tl.store(stats + row, mean.to(tl.float64), mask=there)
        tl.store(stats + rows + row, rstd.to(tl.float64), mask=there)
    else:
        tl.store(stats + row, rstd.to(tl.float64), mask=there)
    _store_normalised(y, d * rstd[:, None], weight, bias, row, j, n, inside)


@triton.jit
def _gradient_tile(g, x, weight, row, there, j, n, g_r, x_r, mean, rstd):
    """(g, g · weight, the normalised x, which of them are there)"""
    inside = there[:, None] & (j < n)[None, :]
    vg = tl.load(g + row[:, None] * g_r + j[None, :], mask=inside, other=0.0).to(tl.float32)
    unit = (tl.load(x + row[:, None] * x_r + j[None, :], mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    unit = tl.where(inside, unit, 0.0)
    gw = vg
    if weight is not None:
        gw = vg * tl.load(weight + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
    return vg, gw, unit, inside


@triton.jit
def _store_gradient(y, r, more, row, j, n, m_r, inside):
    if more is not None:
        r += tl.load(more + row[:, None] * m_r + j[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * n + j[None, :], r.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_rows_backward(
    y, sums, g, x, weight, stats, more, rows, n, g_r, x_r, m_r, each,
    CENTRED: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of x, of `each` blocks of R rows; sums, (2, programs, n): those of weight and bias"""
    n, g_r, x_r, m_r = n * UNIT, _step(g_r, UNIT), _step(x_r, UNIT), _step(m_r, UNIT)
    pid = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, C).to(tl.int64)
    by_weight = tl.zeros((R, C), tl.float32)
    by_bias = tl.zeros((R, C), tl.float32)
    for block in tl.range(pid * each, (pid + 1) * each, num_stages=2):
        row = (block * R + tl.arange(0, R)).to(tl.int64)
        there = row < rows
        mean, rstd = _row_stats(stats, rows, row, there, CENTRED)
        vg, gw, unit, inside = _gradient_tile(g, x, weight, row, there, j, n, g_r, x_r, mean, rstd)
        by_weight += vg * unit
        by_bias += vg
        a = (tl.sum(gw, 1) / n)[:, None] if CENTRED else tl.zeros((R, 1), tl.float32)
        b = (tl.sum(gw * unit, 1) / n)[:, None]
        _store_gradient(y, rstd * (gw - a - unit * b), more, row, j, n, m_r, inside)
    tl.store(sums + pid * n + j, tl.sum(by_weight, 0), mask=j < n)
    tl.store(sums + (tl.num_programs(0) + pid) * n + j, tl.sum(by_bias, 0), mask=j < n)


# Rows of which a program takes a block


@triton.jit
def row_moments(means, squares, x, n, x_r, parts, CENTRED: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr):
    """means, squares, (rows, parts), float64: of C numbers of a row the mean, or 0, and Σ (x - mean)² over their number"""
    n, x_r = n * UNIT, _step(x_r, UNIT)
    pid = tl.program_id(0).to(tl.int64)
    first = pid % parts * C
    j = first + tl.arange(0, C)
    v = tl.load(x + pid // parts * x_r + j, mask=j < n, other=0.0).to(tl.float32)
    count = tl.minimum(C, n - first).to(tl.float32)
    d = v
    mean = tl.zeros((), tl.float64)
    if CENTRED:
        m = tl.sum(v, 0) / count
        d = tl.where(j < n, v - m, 0.0)
        mean += m.to(tl.float64) + (tl.sum(d, 0) / count).to(tl.float64)  # what the mean's rounding has left
    tl.store(means + pid, mean)
    tl.store(squares + pid, (tl.sum(d * d, 0) / count).to(tl.float64))


@triton.jit
def norm_blocks(
    y, x, weight, bias, stats, rows, n, x_r, parts, CENTRED: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr
):
    """norm_rows, where the statistics are known"""
    n, x_r = n * UNIT, _step(x_r, UNIT)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // parts + tl.arange(0, 1)
    j = pid % parts * C + tl.arange(0, C)
    mean, rstd = _row_stats(stats, rows, row, row < rows, CENTRED)
    v, inside = _row_tile(x, None, row, row < rows, j, n, x_r, 0)
    _store_normalised(y, (v - mean) * rstd, weight, bias, row, j, n, inside)


@triton.jit
def row_products(
    sums, g, x, weight, stats, rows, n, g_r, x_r, parts, CENTRED: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr
):
    """sums, (2, rows, parts): Σ g · weight and Σ g · weight · the normalised x of C numbers of a row"""
    n, g_r, x_r = n * UNIT, _step(g_r, UNIT), _step(x_r, UNIT)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // parts + tl.arange(0, 1)
    j = pid % parts * C + tl.arange(0, C)
    mean, rstd = _row_stats(stats, rows, row, row < rows, CENTRED)
    _, gw, unit, _ = _gradient_tile(g, x, weight, row, row < rows, j, n, g_r, x_r, mean, rstd)
    to = sums + pid + tl.arange(0, 1)
    tl.store(to, tl.sum(gw, 1))
    tl.store(to + functions.wide(rows) * parts, tl.sum(gw * unit, 1))


@triton.jit
def norm_blocks_backward(
    y, by_column, g, x, weight, stats, ab, more, rows, n, g_r, x_r, m_r, each, parts,
    CENTRED: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """norm_rows_backward of C columns of `each` rows; ab, (2, rows): the means of row_products' sums"""
    n, g_r, x_r, m_r = n * UNIT, _step(g_r, UNIT), _step(x_r, UNIT), _step(m_r, UNIT)
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n, C)
    part = pid // blocks
    j = pid % blocks * C + tl.arange(0, C)
    by_weight = tl.zeros((1, C), tl.float32)
    by_bias = tl.zeros((1, C), tl.float32)
    for at in tl.range(part * each, tl.minimum(rows, (part + 1) * each), num_stages=2):
        row = at + tl.arange(0, 1).to(tl.int64)
        mean, rstd = _row_stats(stats, rows, row, row < rows, CENTRED)
        vg, gw, unit, inside = _gradient_tile(g, x, weight, row, row < rows, j, n, g_r, x_r, mean, rstd)
        by_weight += vg * unit
        by_bias += vg
        r = gw - unit * tl.load(ab + rows + row)[:, None]
        if CENTRED:
            r -= tl.load(ab + row)[:, None]
        _store_gradient(y, rstd * r, more, row, j, n, m_r, inside)
    tl.store(by_column + part * n + j, tl.sum(by_weight, 0), mask=j < n)
    tl.store(by_column + (parts + part) * n + j, tl.sum(by_bias, 0), mask=j < n)


# Lines: the kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _elements(at, n, C: tl.constexpr):
    """C elements of a line from `at` on, in 32 bits where n is: a division by 64 bits costs ten times one by 32"""
    return (at + tl.arange(0, C)).to((tl.zeros((), tl.int32) + n).dtype)


@triton.jit
def _line_place(line, i, across, s_o, s_i, inner, t_o, t_i, UNIT: tl.constexpr):
    """Where element i of a line is: line = outer · across + inner one, and i likewise; a stride for each"""
    lines = (line // across * _step(s_o, UNIT) + line % across * _step(s_i, UNIT))[:, None]
    inner *= UNIT
    return lines + ((i // inner).to(tl.int64) * _step(t_o, UNIT) + (i % inner).to(tl.int64) * t_i)[None, :]


@triton.jit
def moments(
    means, squares, x, lines, across, s_o, s_i, n, inner, t_o, t_i, part, parts,
    UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """means, squares, (lines, parts), float64: of a part's n elements the mean and Σ (x - mean)² / n.

    Each thread sums distances from the first block's mean: of k blocks, that costs at most k ulp of the variance.
    """
    n *= UNIT
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    first = pid % parts * part
    last = tl.minimum(n, first + part)
    there = (line < lines)[:, None]
    i = _elements(first, n, C)
    v = tl.load(
        x + _line_place(line, i, across, s_o, s_i, inner, t_o, t_i, UNIT), mask=there & (i < last)[None, :], other=0.0
    )
    shift = tl.sum(v.to(tl.float32), 1) / tl.minimum(C, last - first).to(tl.float32)
    plain = tl.zeros((R, C), tl.float32)
    square = tl.zeros((R, C), tl.float32)
    for at in tl.range(first, last, C, num_stages=3):
        i = _elements(at, n, C)
        inside = there & (i < last)[None, :]
        v = tl.load(x + _line_place(line, i, across, s_o, s_i, inner, t_o, t_i, UNIT), mask=inside, other=0.0)
        d = tl.where(inside, v.to(tl.float32) - shift[:, None], 0.0)
        plain += d
        square += d * d
    count = (last - first).to(tl.float64)
    apart = tl.sum(plain, 1).to(tl.float64) / count
    variance = tl.sum(square, 1).to(tl.float64) / count - apart * apart
    tl.store(means + line * parts + pid % parts, shift.to(tl.float64) + apart, mask=line < lines)
    tl.store(squares + line * parts + pid % parts, tl.where(variance < 0.0, 0.0, variance), mask=line < lines)


@triton.jit
def join_moments(stats, means, squares, lines, n, part, parts, R: tl.constexpr, P: tl.constexpr):
    """stats, (2, lines): the moments of lines of which each part's are known"""
    line = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    k = tl.arange(0, P)
    inside = (line < lines)[:, None] & (k < parts)[None, :]
    share = (tl.maximum(0, tl.minimum(part, n - k * part)).to(tl.float64) / n)[None, :]
    m = tl.load(means + line[:, None] * parts + k[None, :], mask=inside, other=0.0)
    s = tl.load(squares + line[:, None] * parts + k[None, :], mask=inside, other=0.0)
    mean = tl.sum(m * share, 1)
    d = tl.where(inside, m - mean[:, None], 0.0)
    tl.store(stats + line, mean, mask=line < lines)
    tl.store(stats + functions.wide(lines) + line, tl.sum((s + d * d) * share, 1), mask=line < lines)


@triton.jit
def _line_stats(stats, groups, line, there, per, eps):
    """(mean in two floats, 1 / deviation) of the lines, of which `per` have one"""
    mean = tl.load(stats + line // per, mask=there, other=0.0)
    variance = tl.load(stats + functions.wide(groups) + line // per, mask=there, other=1.0)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    return high[:, None], low[:, None], (1.0 / tl.sqrt_rn((variance + eps).to(tl.float32)))[:, None]


@triton.jit
def normalise_lines(
    y, x, weight, bias, stats, groups, per, channels, eps,
    lines, across, y_o, y_i, x_o, x_i, n, inner, yt_o, yt_i, xt_o, xt_i, blocks,
    UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) / deviation · weight + bias, for a block of a line; a line's channel is line % channels"""
    n *= UNIT
    pid = tl.program_id(0).to(tl.int64)
    line = pid // blocks * R + tl.arange(0, R)
    i = _elements(pid % blocks * C, n, C)
    there = line < lines
    inside = there[:, None] & (i < n)[None, :]
    high, low, rstd = _line_stats(stats, groups, line, there, per, eps)
    v = tl.load(x + _line_place(line, i, across, x_o, x_i, inner, xt_o, xt_i, UNIT), mask=inside, other=0.0).to(tl.float32)
    r = (v - high - low) * rstd
    if weight is not None:
        r *= tl.load(weight + line % channels, mask=there, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        r += tl.load(bias + line % channels, mask=there, other=0.0).to(tl.float32)[:, None]
    tl.store(y + _line_place(line, i, across, y_o, y_i, inner, yt_o, yt_i, UNIT), r.to(y.dtype.element_ty), mask=inside)


@triton.jit
def line_products(
    sums, g, x, stats, groups, per, eps,
    lines, across, g_o, g_i, x_o, x_i, n, inner, gt_o, gt_i, xt_o, xt_i, part, parts,
    UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """sums, (2, lines, parts): Σ g and Σ g · the normalised x of each part"""
    n *= UNIT
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    first = pid % parts * part
    last = tl.minimum(n, first + part)
    there = line < lines
    high, low, rstd = _line_stats(stats, groups, line, there, per, eps)
    plain = tl.zeros((R, C), tl.float32)
    product = tl.zeros((R, C), tl.float32)
    for at in tl.range(first, last, C, num_stages=2):
        i = _elements(at, n, C)
        inside = there[:, None] & (i < last)[None, :]
        vg = tl.load(g + _line_place(line, i, across, g_o, g_i, inner, gt_o, gt_i, UNIT), mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + _line_place(line, i, across, x_o, x_i, inner, xt_o, xt_i, UNIT), mask=inside, other=0.0).to(tl.float32)
        plain += vg
        product += tl.where(inside, vg * ((v - high - low) * rstd), 0.0)
    to = sums + line * parts + pid % parts
    tl.store(to, tl.sum(plain, 1), mask=there)
    tl.store(to + functions.wide(lines) * parts, tl.sum(product, 1), mask=there)


@triton.jit
def lines_backward(
    y, g, x, weight, stats, a, b, groups, per, channels, eps,
    lines, across, y_o, y_i, g_o, g_i, x_o, x_i, n, inner, yt_o, yt_i, gt_o, gt_i, xt_o, xt_i, blocks,
    UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y = (g · weight - a - b · the normalised x) / deviation; without a and b the moments were given"""
    n *= UNIT
    pid = tl.program_id(0).to(tl.int64)
    line = pid // blocks * R + tl.arange(0, R)
    i = _elements(pid % blocks * C, n, C)
    there = line < lines
    inside = there[:, None] & (i < n)[None, :]
    high, low, rstd = _line_stats(stats, groups, line, there, per, eps)
    r = tl.load(g + _line_place(line, i, across, g_o, g_i, inner, gt_o, gt_i, UNIT), mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        r *= tl.load(weight + line % channels, mask=there, other=0.0).to(tl.float32)[:, None]
    if a is not None:
        v = tl.load(x + _line_place(line, i, across, x_o, x_i, inner, xt_o, xt_i, UNIT), mask=inside, other=0.0).to(tl.float32)
        va = tl.load(a + line // per, mask=there, other=0.0)[:, None]
        vb = tl.load(b + line // per, mask=there, other=0.0)[:, None]
        r -= va + vb * ((v - high - low) * rstd)
    tl.store(y + _line_place(line, i, across, y_o, y_i, inner, yt_o, yt_i, UNIT), (r * rstd).to(y.dtype.element_ty), mask=inside)


# Rows: the host -----------------------------------------------------------------------------------------------------------------

_WHOLE = 32768  # 16-bit elements of a row, at most, that a program keeps; backward, which keeps two sums besides, a quarter
_BLOCK = 4096  # of a longer row that a program takes


def _rows_of(t: Tensor, n: int) -> Tensor:
    """t, or a copy of it, as rows of n elements next to each other"""
    t = t.reshape(-1, n)
    return t if t.stride(1) == 1 or n == 1 else t.contiguous()


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _row_tile_of(n: int, rows: int) -> tuple[int, int]:
    """(rows, elements) that a program keeps"""
    c = power_of_two(n, 16)
    return min(power_of_two(rows), max(1, 2048 // c)), c


def _unit(*sizes: int) -> int:
    """What the kernels call UNIT: lengths and strides that are all multiples of 8 are given in eighths"""
    return 8 if all(size % 8 == 0 for size in sizes) else 1


def _norm_rows(centred: bool, out: tuple[Tensor, ...], input: Tensor, residual: Tensor | None, weight: Tensor | None,
               bias: Tensor | None, shape: Sequence[int], eps: float) -> None:
    """out: the normalised rows, [the sum,] the statistics"""
    n = prod(shape)
    x = _rows_of(input, n)
    rows = x.shape[0]
    more = None if residual is None else _rows_of(residual, n)
    sizes = n, x.stride(0), 0 if more is None else more.stride(0)
    unit = _unit(*sizes)
    if power_of_two(n) > (_WHOLE if unit == 8 and x.itemsize == 2 else _WHOLE // 2):
        _norm_blocks(centred, out, x, residual, weight, bias, eps)
        return
    r, c = _row_tile_of(n, rows)
    launch.run(norm_rows, -(-rows // r), input.device, out[0], out[1] if len(out) > 2 else None, out[-1], x, more, _flat(weight),
               _flat(bias), rows, *(size // unit for size in sizes), float(eps), CENTRED=centred, UNIT=unit, R=r, C=c,
               num_warps=launch.warps(r * c, input.device))  # fmt: skip


def _norm_blocks(centred: bool, out: tuple[Tensor, ...], x: Tensor, residual: Tensor | None, weight: Tensor | None,
                 bias: Tensor | None, eps: float) -> None:
    """The same of rows that are too long for a program: moments of blocks, those of rows, the result"""
    rows, n = x.shape
    if residual is not None:
        x = torch.add(x, residual.reshape(rows, n), out=out[1].view(rows, n))
    parts, stats = -(-n // _BLOCK), out[-1]
    means, squares = torch.empty((2, rows, parts), dtype=torch.float64, device=x.device)
    unit = _unit(n, x.stride(0))
    sizes = n // unit, x.stride(0) // unit, parts
    options = {"CENTRED": centred, "UNIT": unit, "C": _BLOCK, "num_warps": launch.warps(2 * _BLOCK, x.device)}
    launch.run(row_moments, rows * parts, x.device, means, squares, x, *sizes, **options)
    mean, variance = found = means.new_empty(2, rows)
    _join(found, means, squares, n, _BLOCK)
    deviation = torch.rsqrt(variance + eps)
    stats.copy_((torch.stack([mean, deviation]) if centred else deviation).view(stats.shape))
    launch.run(norm_blocks, rows * parts, x.device, out[0], x, _flat(weight), _flat(bias), stats, rows, *sizes, **options)


def _plain_rows(centred: bool, out: tuple[Tensor, Tensor], input: Tensor, *rest: Any) -> None:
    """out = (the normalised rows, each row's (mean and) 1 / deviation)"""
    _norm_rows(centred, out, input, None, *rest)


def _norm_rows_backward(centred: bool, out: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, weight: Tensor | None,
                        stats: Tensor, more: Tensor | None, shape: Sequence[int], eps: float) -> None:
    """out = (the gradient of input, those of weight and bias)"""
    n = prod(shape)
    g, x = _rows_of(grad, n), _rows_of(input, n)
    rows = x.shape[0]
    extra = None if more is None else _rows_of(more, n)
    stats = stats.contiguous()
    strides = [g.stride(0), x.stride(0), 0 if extra is None else extra.stride(0)]
    unit = _unit(n, *strides)
    sizes = [size // unit for size in (n, *strides)]
    options = {"CENTRED": centred, "UNIT": unit}
    processors = launch.chip(input.device).processors
    if power_of_two(n) <= _WHOLE // 4:
        r, c = _row_tile_of(n, rows)
        blocks = -(-rows // r)
        each = -(-blocks // min(blocks, (5 if r * c <= 2048 else 2) * processors))
        parts = -(-blocks // each)
        sums = torch.empty((2, parts, n), dtype=torch.float32, device=input.device)
        launch.run(norm_rows_backward, parts, input.device, out[0], sums, g, x, _flat(weight), stats, extra, rows, *sizes, each,
                   R=r, C=c, num_warps=launch.warps(r * c, input.device), **options)  # fmt: skip
    else:
        blocks = -(-n // _BLOCK)
        tile = {"C": _BLOCK, "num_warps": launch.warps(2 * _BLOCK, input.device), **options}
        products = torch.empty((2, rows, blocks), dtype=torch.float32, device=input.device)
        launch.run(row_products, rows * blocks, input.device, products, g, x, _flat(weight), stats, rows, *sizes[:3], blocks,
                   **tile)  # fmt: skip
        tile["C"] = _BLOCK // 2
        blocks = -(-n // tile["C"])
        each = max(min(8, rows), -(-rows * blocks // (4 * processors)))
        parts = -(-rows // each)
        sums = torch.empty((2, parts, n), dtype=torch.float32, device=input.device)
        launch.run(norm_blocks_backward, parts * blocks, input.device, out[0], sums, g, x, _flat(weight), stats,
                   products.sum(2) / n, extra, rows, *sizes, each, parts, **tile)  # fmt: skip
    out[1].view(2, n).copy_(sums.sum(1))


# Lines: the host ----------------------------------------------------------------------------------------------------------------


class Lines(NamedTuple):
    """Lines of n elements: sizes, then for each tensor its strides by outer and inner line, outer and inner element."""

    number: int
    across: int
    n: int
    inner: int
    lines: list[tuple[int, int]]
    elements: list[tuple[int, int]]

    def tile(self) -> tuple[int, int]:
        """(lines, elements) of a program's tile: lines side by side where they lie so"""
        if self.lines[0][1] == 1 and self.elements[0][1] != 1:
            r = power_of_two(self.across, most=32)
            return r, power_of_two(self.n, 16, 2048 // r)
        c = power_of_two(self.n, 16, 2048)
        return min(2048 // c, power_of_two(self.number)), c

    @property
    def unit(self) -> int:
        """What the kernels call UNIT: sizes and strides are multiples of it where elements lie side by side"""
        if any(t_i != 1 for _, t_i in self.elements):
            return 1
        return gcd(8, self.n, self.inner, *(s for pair in self.lines for s in pair), *(t_o for t_o, _ in self.elements))

    def given(self) -> tuple[list[int], list[int]]:
        """As kernels take them: (number of lines, across, strides of lines), (elements, inner, strides of elements)"""
        unit = self.unit
        lines = [s // unit for pair in self.lines for s in pair]
        elements = [step for t_o, t_i in self.elements for step in (t_o // unit, t_i)]
        return [self.number, self.across, *lines], [self.n // unit, self.inner // unit, *elements]

    def parts(self, r: int, c: int, device: torch.device) -> tuple[int, int]:
        """(elements of a part, parts of a line) so that every processor has several"""
        wanted = max(1, 8 * launch.chip(device).processors // -(-self.number // r))
        part = -(-self.n // min(wanted, 256, -(-self.n // c)) // c) * c or c
        part = max(part, c)
        return part, -(-self.n // part)


def _pixels(t: Tensor) -> Tensor:
    """(N, C, pixels), a copy where the pixels lie in no order"""
    return t.unsqueeze(2) if t.dim() == 2 else t.flatten(2)


def _channel_lines(tensors: Sequence[Tensor], images: bool) -> Lines:
    """A line for each channel of an image, or of the batch."""
    n, c, pixels = tensors[0].shape
    strides = [t.stride() for t in tensors]
    if images:
        return Lines(n * c, c, pixels, pixels, [(s[0], s[1]) for s in strides], [(0, s[2]) for s in strides])
    return Lines(c, c, n * pixels, pixels, [(0, s[1]) for s in strides], [(s[0], s[2]) for s in strides])


def _group_lines(x: Tensor, groups: int) -> Lines:
    """A line for each group of an image: channels outermost, or innermost where they lie so."""
    n, c, pixels = x.shape
    each = c // groups
    s = x.stride()
    inner, steps = (each, (s[2], s[1])) if s[1] == 1 and s[2] != 1 else (pixels, (s[1], s[2]))
    return Lines(n * groups, groups, each * pixels, inner, [(s[0], each * s[1])], [steps])


def _moments(stats: Tensor, x: Tensor, lines: Lines) -> None:
    """stats: contiguous, (2, …): the mean and variance of each line"""
    r, c = lines.tile()
    part, parts = lines.parts(r, c, x.device)
    flat = stats.view(2, -1)
    means, squares = flat if parts == 1 else torch.empty((2, lines.number, parts), dtype=torch.float64, device=x.device)
    of_lines, of_elements = lines.given()
    launch.run(moments, -(-lines.number // r) * parts, x.device, means, squares, x, *of_lines, *of_elements, part, parts,
               UNIT=lines.unit, R=r, C=c, num_warps=4)  # fmt: skip
    if parts > 1:
        _join(stats, means, squares, lines.n, part)


def _join(stats: Tensor, means: Tensor, squares: Tensor, n: int, part: int) -> None:
    """stats, contiguous, (2, …): the moments of lines of n elements, of whose parts they are known: (lines, parts)"""
    lines, parts = means.shape
    p = power_of_two(parts)
    r = max(1, min(8, 1024 // p))
    launch.run(join_moments, -(-lines // r), means.device, stats, means, squares, lines, n, part, parts, R=r, P=p,
               num_warps=4)  # fmt: skip


def _normalise(y: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, groups: int,
               eps: float) -> None:
    """groups: of an image; 0: a channel's numbers in the whole batch belong together"""
    tensors = [_pixels(y), _pixels(input)]
    lines = _channel_lines(tensors, groups > 0)
    r, c = lines.tile()
    blocks = -(-lines.n // c)
    channels = input.shape[1]
    of_lines, of_elements = lines.given()
    launch.run(normalise_lines, -(-lines.number // r) * blocks, y.device, *tensors, _flat(weight), _flat(bias), stats,
               stats[0].numel(), channels // groups if groups else 1, channels, float(eps), *of_lines, *of_elements, blocks,
               UNIT=lines.unit, R=r, C=c, num_warps=4)  # fmt: skip


def _backward(y: Tensor, sums: Tensor, grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, groups: int,
              training: bool, eps: float) -> None:
    """sums, (2, lines): Σ g and Σ g x̂ of each channel, of an image or of the batch"""
    tensors = [_pixels(grad), _pixels(input)]
    lines = _channel_lines(tensors, groups > 0)
    r, c = lines.tile()
    part, parts = lines.parts(r, c, y.device)
    channels = input.shape[1]
    of_group = (stats[0].numel(), channels // groups if groups else 1)
    products = torch.empty((2, lines.number, parts), dtype=torch.float32, device=y.device)
    of_lines, of_elements = lines.given()
    launch.run(line_products, -(-lines.number // r) * parts, y.device, products, *tensors, stats, *of_group, float(eps),
               *of_lines, *of_elements, part, parts, UNIT=lines.unit, R=r, C=c, num_warps=4)  # fmt: skip
    sums.view(2, -1).copy_(products.sum(2, dtype=torch.float64))
    a = b = None
    if training:
        weighted = sums if weight is None else sums * weight.double()
        if groups:
            weighted = weighted.unflatten(-1, (groups, -1)).sum(-1)
        a, b = (weighted / (lines.n * of_group[1])).float()
    tensors = [_pixels(y), *tensors]
    lines = _channel_lines(tensors, groups > 0)
    r, c = lines.tile()
    blocks = -(-lines.n // c)
    of_lines, of_elements = lines.given()
    launch.run(lines_backward, -(-lines.number // r) * blocks, y.device, *tensors, _flat(weight), stats, a, b, *of_group,
               channels, float(eps), *of_lines, *of_elements, blocks, UNIT=lines.unit, R=r, C=c, num_warps=4)  # fmt: skip


# The operators ------------------------------------------------------------------------------------------------------------------


def batch_norm(out: tuple[Tensor, Tensor], input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
               var: Tensor | None, eps: float) -> None:
    """out = (the normalised input, the mean and variance that it was normalised by)"""
    y, stats = out
    if mean is not None and var is not None:
        stats[0], stats[1] = mean, var
    else:
        x = _pixels(input)
        _moments(stats, x, _channel_lines([x], False))
    _normalise(y, input, weight, bias, stats, 0, eps)


def batch_norm_backward(out: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor,
                        training: bool, eps: float) -> None:
    """out = (the gradient of input, those of bias and weight)"""
    _backward(*out, grad, input, weight, stats.contiguous(), 0, training, eps)


def group_norm(out: tuple[Tensor, Tensor], input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int,
               eps: float) -> None:
    """out = (the normalised input, each group's mean and variance)"""
    y, stats = out
    x = _pixels(input)
    _moments(stats, x, _group_lines(x, groups))
    _normalise(y, input, weight, bias, stats, groups, eps)


def group_norm_backward(out: tuple[Tensor, Tensor], grad: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor,
                        groups: int, eps: float) -> None:
    """out = (the gradient of input, those of bias and weight)"""
    each = out[1].new_empty((2, *input.shape[:2]))
    _backward(out[0], each, grad, input, weight, stats.contiguous(), groups, True, eps)
    out[1].copy_(each.sum(1))


def supports(op: str, *args: Any) -> str | None:
    return launch.refuses(*(a for a in args if isinstance(a, Tensor)))


KERNELS: dict[str, Callable[..., None]] = {
    "batch_norm": batch_norm, "batch_norm_backward": batch_norm_backward,
    "group_norm": group_norm, "group_norm_backward": group_norm_backward,
}
for _name, _centred in (("layer_norm", True), ("rms_norm", False)):
    KERNELS[_name], KERNELS[f"add_{_name}"] = partial(_plain_rows, _centred), partial(_norm_rows, _centred)
    KERNELS[f"{_name}_backward"] = partial(_norm_rows_backward, _centred)
