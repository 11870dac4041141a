"""Softmax, log-softmax and the losses on the GPU.

A line lies along the class dimension; a program takes R of them, whole, where they fit into its registers. Longer lines are cut
into parts: ``line_sums`` takes each part's maximum and sum, ``softmax_lines`` joins them, in their order, and finishes a part.
The losses go through a line in steps, by one program, as they have many lines and write nothing of their size forward; long
lines that are too few for the GPU are cut into parts as well.

A class index out of range gives NaN: to raise an error, the call would have to wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import linear_loss
from ..layout import outer_and_inner
from . import matmul
from .activation import run_elementwise
from .engine import functions, launch
from .engine.launch import power_of_two

# The kernels --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(line, inner, outer_step, inner_step):
    return ((line // inner) * outer_step + (line % inner) * inner_step)[:, None]


@triton.jit
def _sums(x, g, inside, OP: tl.constexpr):
    """Of each line of a tile: (maximum, Σ exp(x - maximum)), or (0, the sum that the backward wants)"""
    if OP == "softmax_backward":
        s = tl.sum(tl.where(inside, g * x, 0.0), 1)
        m = s * 0.0
    elif OP == "log_softmax_backward":
        s = tl.sum(tl.where(inside, g, 0.0), 1)
        m = s * 0.0
    else:
        m = tl.max(tl.where(inside, x, float("-inf")), 1)
        shift = tl.where(m == float("-inf"), 0.0, m)
        s = tl.sum(tl.where(inside, functions.exp(x - shift[:, None]), 0.0), 1)
    return m, s


@triton.jit
def _join(m, s, m2, s2, OP: tl.constexpr):
    """Two parts' sums as those of both"""
    if OP == "softmax" or OP == "log_softmax":
        top = tl.maximum(m, m2)
        shift = tl.where(top == float("-inf"), 0.0, top)
        s = s * functions.exp(m - shift) + s2 * functions.exp(m2 - shift)
        m = top
    else:
        s += s2
    return m, s


@triton.jit
def line_sums(
    sums, x, g, lines, inner, n, x_o, x_i, x_n, g_o, g_i, g_n, part, parts,
    OP: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """sums[:, line, part]: of that part of the line, `part` elements long"""
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    first = pid % parts * part
    last = tl.minimum(n, first + part)
    m = tl.full((R,), float("-inf"), tl.float32)
    if OP == "softmax_backward" or OP == "log_softmax_backward":
        m = tl.zeros((R,), tl.float32)
    s = tl.zeros((R,), tl.float32)
    for at in tl.range(first, last, C):
        j = (at + tl.arange(0, C))[None, :]
        inside = (line < lines)[:, None] & (j < last)
        vx = tl.load(x + _place(line, inner, x_o, x_i) + j * x_n, mask=inside, other=0.0).to(tl.float32)
        vg = tl.load(g + _place(line, inner, g_o, g_i) + j * g_n, mask=inside, other=0.0).to(tl.float32)
        m2, s2 = _sums(vx, vg, inside, OP)
        m, s = _join(m, s, m2, s2, OP)
    to = sums + line * parts + pid % parts
    tl.store(to, m, mask=line < lines)
    tl.store(to + functions.wide(lines) * parts, s, mask=line < lines)


@triton.jit
def _joined(sums, line, lines, parts, OP: tl.constexpr, P: tl.constexpr):
    """What `line_sums` made of the parts of each line, as that of the line"""
    k = tl.arange(0, P)[None, :]
    there = (line < lines)[:, None] & (k < parts)
    ms = tl.load(sums + line[:, None] * parts + k, mask=there, other=float("-inf"))
    ss = tl.load(sums + (functions.wide(lines) + line[:, None]) * parts + k, mask=there, other=0.0)
    if OP == "softmax" or OP == "log_softmax":
        m = tl.max(ms, 1)
        shift = tl.where(m == float("-inf"), 0.0, m)
        s = tl.sum(tl.where(there, ss * functions.exp(ms - shift[:, None]), 0.0), 1)
    else:
        s = tl.sum(ss, 1)
        m = s * 0.0
    return m, s


@triton.jit
def softmax_lines(
    y, x, g, sums, lines, inner, n, y_o, y_i, y_n, x_o, x_i, x_n, g_o, g_i, g_n, part, parts,
    OP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The result of whole lines, with sums = None, or of a part of each. Forward x is the input, backward the output."""
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    first = pid % parts * part
    last = tl.minimum(n, first + part)
    if sums is not None:
        m, s = _joined(sums, line, lines, parts, OP, P)
    for at in tl.range(first, last, C):
        j = (at + tl.arange(0, C))[None, :]
        inside = (line < lines)[:, None] & (j < last)
        vx = tl.load(x + _place(line, inner, x_o, x_i) + j * x_n, mask=inside, other=0.0).to(tl.float32)
        vg = vx
        if g is not None:
            vg = tl.load(g + _place(line, inner, g_o, g_i) + j * g_n, mask=inside, other=0.0).to(tl.float32)
        if sums is None:
            m, s = _sums(vx, vg, inside, OP)
        if OP == "softmax":
            r = functions.exp(vx - m[:, None]) / s[:, None]
        elif OP == "log_softmax":
            r = vx - m[:, None] - tl.log(s)[:, None]
        elif OP == "softmax_backward":
            r = vx * (vg - s[:, None])
        else:
            tl.static_assert(OP == "log_softmax_backward", "an unknown operation")
            r = vg - functions.exp(vx) * s[:, None]
        tl.store(y + _place(line, inner, y_o, y_i) + j * y_n, r.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weights(q, w, j, line, inside, n, inner, q_o, q_i, q_n, smoothing, target, KIND: tl.constexpr):
    """What each class counts: its weight times the smoothed target"""
    if KIND == "probabilities":
        share = tl.load(q + _place(line, inner, q_o, q_i) + j * q_n, mask=inside, other=0.0).to(tl.float32)
    else:
        share = tl.where(j == target[:, None], 1.0, 0.0)
    share = share * (1.0 - smoothing) + smoothing / n
    if w is not None:
        share *= tl.load(w + j, mask=j < n, other=0.0).to(tl.float32)
    return tl.where(inside, share, 0.0)


@triton.jit
def _target(q, w, line, there, n, ignore):
    """Each line's class, whether it counts, its weight, and whether it is out of range"""
    target = tl.load(q + line, mask=there, other=0)
    kept = there & (target != ignore)
    wrong = kept & ((target < 0) | (target >= n))
    target = tl.where(kept & ~wrong, target, 0)
    weight = tl.where(kept, 1.0, 0.0)
    if w is not None:
        weight *= tl.load(w + target).to(tl.float32)
    return target, kept, weight, wrong


@triton.jit
def losses(
    loss, total, lse, sums, x, q, w, lines, inner, n, x_o, x_i, x_n, q_o, q_i, q_n, ignore, smoothing, pieces, part, parts,
    KIND: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Each line's loss, the weight of its class, and (2, lines) its maximum and log Σ exp(x - maximum).

    KIND: "nll" (x are logarithms), "indices", "smoothed", "probabilities". q: classes, one a line, or probabilities.
    sums: None, or of `pieces` of each line; then the loss may be in `parts` (lines, parts) that are yet to be added up.
    """
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    begin = pid % parts * part
    last = tl.minimum(n, begin + part)
    there = line < lines
    once = there & (pid % parts == 0)
    row = x + _place(line, inner, x_o, x_i)
    target = tl.zeros((R,), tl.int64)
    weight = tl.where(there, 1.0, 0.0)
    kept = there
    wrong = line < 0
    if KIND != "probabilities":
        target, kept, weight, wrong = _target(q, w, line, there, n, ignore)
    if KIND == "nll" or KIND == "indices":
        at = tl.sum(tl.load(row + target[:, None] * x_n, mask=there[:, None], other=0.0).to(tl.float32), 1)
    if KIND == "nll":
        value = -at * weight
    else:
        if sums is not None:
            m, s = _joined(sums, line, lines, pieces, "softmax", P)
        else:
            m = tl.full((R,), float("-inf"), tl.float32)
            s = tl.zeros((R,), tl.float32)
            for first in tl.range(0, n, C):
                j = (first + tl.arange(0, C)).to(tl.int64)[None, :]
                inside = there[:, None] & (j < n)
                vx = tl.load(row + j * x_n, mask=inside, other=0.0).to(tl.float32)
                m2, s2 = _sums(vx, vx, inside, "softmax")
                m, s = _join(m, s, m2, s2, "softmax")
        logs = tl.log(s)
        tl.store(lse + line, m.to(tl.float64), mask=once)
        tl.store(lse + functions.wide(lines) + line, logs.to(tl.float64), mask=once)
        if KIND == "indices":
            value = (logs - (at - m)) * weight
        else:
            value = tl.zeros((R,), tl.float32)
            for first in tl.range(begin, last, C):
                j = (first + tl.arange(0, C)).to(tl.int64)[None, :]
                inside = there[:, None] & (j < last)
                vx = tl.load(row + j * x_n, mask=inside, other=0.0).to(tl.float32)
                share = _weights(q, w, j, line, inside, n, inner, q_o, q_i, q_n, smoothing, target, KIND)
                terms = share * (logs[:, None] - (vx - m[:, None]))
                value += tl.sum(tl.where(share == 0.0, 0.0, terms), 1)
    value = tl.where(wrong, float("nan"), tl.where(kept, value, 0.0))
    tl.store(loss + line * parts + pid % parts, value.to(loss.dtype.element_ty), mask=there)
    tl.store(total + line, weight, mask=once)


@triton.jit
def losses_backward(
    y, grad, lse, x, q, w, sum_w, lines, inner, n, y_o, y_i, y_n, x_o, x_i, x_n, q_o, q_i, q_n, grad_step, ignore, smoothing,
    part, parts, KIND: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A part of each line of grad (p Σ share - share), p the probabilities; for "nll" -grad share. sum_w: all weights' sum."""
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    begin = pid % parts * part
    last = tl.minimum(n, begin + part)
    there = line < lines
    target = tl.zeros((R,), tl.int64)
    weight = tl.where(there, 1.0, 0.0)
    kept = there
    wrong = line < 0
    if KIND == "probabilities":
        whole = tl.zeros((R,), tl.float32)
        for first in tl.range(0, n, C):
            j = (first + tl.arange(0, C)).to(tl.int64)[None, :]
            inside = there[:, None] & (j < n)
            whole += tl.sum(_weights(q, w, j, line, inside, n, inner, q_o, q_i, q_n, smoothing, target, KIND), 1)
    else:
        target, kept, weight, wrong = _target(q, w, line, there, n, ignore)
        whole = weight
    if KIND == "smoothed":
        whole = weight * (1.0 - smoothing) + tl.load(sum_w) * (smoothing / n)
    factor = tl.load(grad + line * grad_step, mask=there, other=0.0).to(tl.float32)
    factor = tl.where(wrong, float("nan"), tl.where(kept, factor, 0.0))
    if KIND != "nll":
        m = tl.load(lse + line, mask=there, other=0.0).to(tl.float32)
        logs = tl.load(lse + functions.wide(lines) + line, mask=there, other=0.0).to(tl.float32)
    for first in tl.range(begin, last, C):
        j = (first + tl.arange(0, C)).to(tl.int64)[None, :]
        inside = there[:, None] & (j < last)
        if KIND == "nll" or KIND == "indices":
            share = tl.where(j == target[:, None], weight[:, None], 0.0)
        else:
            share = _weights(q, w, j, line, inside, n, inner, q_o, q_i, q_n, smoothing, target, KIND)
        if KIND == "nll":
            r = -share
        else:
            vx = tl.load(x + _place(line, inner, x_o, x_i) + j * x_n, mask=inside, other=0.0).to(tl.float32)
            r = functions.exp(vx - m[:, None] - logs[:, None]) * whole[:, None] - share
        r = tl.where(kept[:, None], r * factor[:, None], 0.0)  # an ignored line's logits may be NaN
        tl.store(y + _place(line, inner, y_o, y_i) + j * y_n, r.to(y.dtype.element_ty), mask=inside)


@triton.jit
def squared_error(parts, x, t, n, part, C: tl.constexpr):
    """The sum of (x - t)² over a part of `part` elements"""
    pid = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((C,), tl.float32)
    for at in tl.range(pid * part, tl.minimum(n, (pid + 1) * part), C):
        i = at + tl.arange(0, C)
        d = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) - tl.load(t + i, mask=i < n, other=0.0).to(tl.float32)
        sums += d * d
    tl.store(parts + pid, tl.sum(sums, 0))


# The host -----------------------------------------------------------------------------------------------------------------------

_WHOLE = 16384  # elements of a tile, at most, in which whole lines are kept
_STEP = 4096  # of a tile that goes along its lines


class Lines(NamedTuple):
    """outer · inner lines of n elements; for each tensor its outer, inner and class stride, in elements."""

    number: int
    inner: int
    n: int
    steps: list[tuple[int, int, int]]

    @property
    def beside(self) -> int:
        """Lines that a program takes so that what it reads lies together, of the first tensor."""
        return power_of_two(self.inner, most=32) if self.steps[0][2] != 1 and self.steps[0][1] == 1 else 1


def _lines(dim: int, tensors: Sequence[Tensor]) -> tuple[Lines, Sequence[Tensor]]:
    """How the lines along dim lie in all tensors, which are copied where they lie in no order; lines are counted row-major."""
    shape = tensors[0].shape
    dim = dim % max(1, len(shape))
    strides = [t.stride() for t in tensors]
    beside = outer_and_inner(shape, strides, dim)
    if beside is None:
        return _lines(dim, [t.contiguous() for t in tensors])
    (outer, outer_steps), (inner, inner_steps) = beside
    along = [s[dim] if shape else 1 for s in strides]
    return Lines(outer * inner, inner, shape[dim] if shape else 1, list(zip(outer_steps, inner_steps, along))), tensors


def _warps(elements: int) -> int:
    return max(4, min(16, elements // 1024))


def _parts(lines: Lines, r: int, c: int, device: torch.device) -> tuple[int, int]:
    """(elements of a part, parts of a line) so that a program of r lines by c, each, has some work and the GPU enough programs"""
    wanted = max(1, 4 * launch.chip(device).processors // -(-lines.number // r))
    part = -(-lines.n // min(wanted, 64, -(-lines.n // c)) // c) * c or c
    return part, -(-lines.n // part)


def _softmax(op: str, out: Tensor, x: Tensor, g: Tensor | None, dim: int) -> None:
    if not out.numel():
        return
    lines, tensors = _lines(dim, [out, x] if g is None else [out, x, g])
    target, x, g = tensors[0], tensors[1], tensors[2] if g is not None else None
    steps = [s for tensor in lines.steps for s in tensor]
    g_steps = steps[6:] or [0, 0, 0]
    n, r = lines.n, lines.beside
    if power_of_two(n) * r <= _WHOLE:
        c = power_of_two(n)
        r = max(r, min(power_of_two(lines.number), 2048 // c))
        launch.run(softmax_lines, -(-lines.number // r), out.device, target, x, g, None, lines.number, lines.inner, n,
                   *steps[:6], *g_steps, c, 1, OP=op, R=r, C=c, P=1, num_warps=_warps(r * c))  # fmt: skip
    else:
        c = _STEP // r
        part, parts = _parts(lines, r, c, out.device)
        sums = torch.empty((2, lines.number, parts), dtype=torch.float32, device=out.device)
        programs = -(-lines.number // r) * parts
        launch.run(line_sums, programs, out.device, sums, x, x if g is None else g, lines.number, lines.inner, n, *steps[3:6],
                   *(steps[3:6] if g is None else g_steps), part, parts, OP=op, R=r, C=c, num_warps=4)  # fmt: skip
        launch.run(softmax_lines, programs, out.device, target, x, g, sums, lines.number, lines.inner, n, *steps[:6], *g_steps,
                   part, parts, OP=op, R=r, C=c, P=power_of_two(parts), num_warps=4)  # fmt: skip
    if target.data_ptr() != out.data_ptr():
        out.copy_(target)


def softmax(out: Tensor, input: Tensor, dim: int) -> None:
    """out = exp(input - max) / Σ exp(input - max)"""
    _softmax("softmax", out, input, None, dim)


def softmax_backward(out: Tensor, grad: Tensor, output: Tensor, dim: int) -> None:
    """out = output (grad - Σ grad output)"""
    _softmax("softmax_backward", out, output, grad, dim)


def log_softmax(out: Tensor, input: Tensor, dim: int) -> None:
    """out = input - max - log Σ exp(input - max)"""
    _softmax("log_softmax", out, input, None, dim)


def log_softmax_backward(out: Tensor, grad: Tensor, output: Tensor, dim: int) -> None:
    """out = grad - exp(output) Σ grad"""
    _softmax("log_softmax_backward", out, output, grad, dim)


# Losses


def _kind(target: Tensor, smoothing: float) -> str:
    return "probabilities" if target.is_floating_point() else "smoothed" if smoothing else "indices"


def _tile(lines: Lines) -> tuple[int, int]:
    c = power_of_two(lines.n, most=_STEP // lines.beside)
    return max(lines.beside, min(power_of_two(lines.number), 1024 // c)), c


def _loss(kind: str, out: Tensor, lse: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
          reduction: str, smoothing: float) -> None:
    q = [target] if kind == "probabilities" else []
    lines, (input, *q) = _lines(1 if input.dim() > 1 else 0, [input, *q])
    if not lines.number or not lines.n:
        out.fill_(float("nan") if reduction == "mean" else 0.0)
        if lse is not None:
            lse.zero_()
        return
    target = q[0] if q else target.contiguous()
    each = out if reduction == "none" else torch.empty(lines.number, dtype=torch.float32, device=out.device)
    total = torch.empty(lines.number, dtype=torch.float32, device=out.device)
    r, c = _tile(lines)
    part, parts = _parts(lines, r, c, out.device) if lines.n > _WHOLE and kind != "nll" else (lines.n, 1)
    sums, pieces, values = None, parts, each
    if parts > 1:
        sums = torch.empty((2, lines.number, parts), dtype=torch.float32, device=out.device)
        launch.run(line_sums, -(-lines.number // r) * parts, out.device, sums, input, input, lines.number, lines.inner, lines.n,
                   *lines.steps[0], *lines.steps[0], part, parts, OP="softmax", R=r, C=c, num_warps=4)  # fmt: skip
        if kind == "indices":  # nothing but the class itself is left to read
            part, parts = lines.n, 1
        else:
            values = torch.empty((lines.number, parts), dtype=torch.float32, device=out.device)
    launch.run(losses, -(-lines.number // r) * parts, out.device, values, total, lse, sums, input, target,
               None if weight is None else weight.contiguous(), lines.number, lines.inner, lines.n, *lines.steps[0],
               *(lines.steps[1] if q else (0, 0, 0)), ignore_index, float(smoothing), pieces, part, parts, KIND=kind, R=r, C=c,
               P=power_of_two(pieces), num_warps=4)  # fmt: skip
    if values is not each:
        each.copy_(values.sum(1).view(each.shape))
    if reduction == "sum":
        out.copy_(each.sum())
    elif reduction == "mean":
        out.copy_(each.sum() / total.sum())


def _loss_backward(kind: str, out: Tensor, grad: Tensor, lse: Tensor | None, input: Tensor, target: Tensor,
                   weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float) -> None:
    if not out.numel():
        return
    q = [target] if kind == "probabilities" else []
    dim = 1 if input.dim() > 1 else 0
    lines, (y, input, *q) = _lines(dim, [out, input, *q])
    target = q[0] if q else target.contiguous()
    sum_w = None
    if kind == "smoothed":
        sum_w = input.new_full((), lines.n, dtype=torch.float32) if weight is None else weight.float().sum()
    factor = grad.contiguous()
    if reduction == "mean":
        if kind == "probabilities":
            factor = grad.float() / lines.number
        else:
            kept = target != ignore_index
            each = kept if weight is None else weight.float()[target.clamp(0, lines.n - 1)] * kept
            factor = grad.float() / each.sum()
    r, c = _tile(lines)
    # A program goes through all of a line's probabilities: only without parts is that once.
    part, parts = _parts(lines, r, c, out.device) if lines.n > _WHOLE and kind != "probabilities" else (lines.n, 1)
    launch.run(losses_backward, -(-lines.number // r) * parts, out.device, y, factor, lse, input, target,
               None if weight is None else weight.contiguous(), sum_w, lines.number, lines.inner, lines.n, *lines.steps[0],
               *lines.steps[1], *(lines.steps[2] if q else (0, 0, 0)), int(reduction == "none"), ignore_index, float(smoothing),
               part, parts, KIND=kind, R=r, C=c, num_warps=4)  # fmt: skip
    if y.data_ptr() != out.data_ptr():
        out.copy_(y)


def cross_entropy(out: tuple[Tensor, Tensor], input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
                  reduction: str, label_smoothing: float) -> None:
    """(loss, lse): lse, (2, …), float64: each line's maximum m and log Σ exp(x - m); nothing of the input's size is made."""
    kind = _kind(target, label_smoothing)
    _loss(kind, out[0], out[1], input, target, weight, ignore_index, reduction, label_smoothing)


def cross_entropy_backward(out: Tensor, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor,
                           ignore_index: int, reduction: str, label_smoothing: float) -> None:
    """out = the gradient of input"""
    kind = _kind(target, label_smoothing)
    _loss_backward(kind, out, grad, lse.contiguous(), input, target, weight, ignore_index, reduction, label_smoothing)


def nll_loss(out: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
             reduction: str) -> None:
    """-weight[target] · input[target]"""
    _loss("nll", out, None, input, target, weight, ignore_index, reduction, 0.0)


def nll_loss_backward(out: Tensor, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None,
                      ignore_index: int, reduction: str) -> None:
    """out = the gradient of input: zero but for the target's class"""
    _loss_backward("nll", out, grad, None, input, target, weight, ignore_index, reduction, 0.0)


# A linear layer and its cross-entropy


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, added where it is made: each program reads what it then writes"""
    matmul.multiply(total, a, b, matmul.Epilogue(residual=None if first else total))


_STEPS = linear_loss.Steps(matmul.linear, matmul.matmul, _add_product, cross_entropy, cross_entropy_backward, 256 << 20,
                           in_place=True)


def linear_cross_entropy(out: tuple[Tensor, ...], *args: Any) -> None:
    """out = (the loss, what it was divided by, the gradients of the losses' sum by input, weight and bias, if wanted)"""
    linear_loss.forward(_STEPS, out, *args)


def linear_cross_entropy_backward(out: tuple[Tensor, ...], *args: Any) -> None:
    """out = the gradients by input, weight and bias"""
    linear_loss.backward(_STEPS, out, *args)


def mse_loss(out: Tensor, input: Tensor, target: Tensor, reduction: str) -> None:
    """(input - target)², reduced"""
    n = input.numel()
    if reduction == "none":
        run_elementwise("mse_loss", out, (input, target))
    elif n == 0:
        out.fill_(0.0 if reduction == "sum" else float("nan"))
    else:
        part = max(8192, power_of_two(n) // 1024)
        parts = torch.empty(-(-n // part), dtype=torch.float32, device=out.device)
        launch.run(squared_error, len(parts), out.device, parts, input.contiguous(), target.contiguous(), n, part, C=2048,
                   num_warps=4)  # fmt: skip
        out.copy_(parts.sum() / (n if reduction == "mean" else 1))


def mse_loss_backward(out: Tensor, grad: Tensor, input: Tensor, target: Tensor, reduction: str) -> None:
    """out = 2 (input - target) grad, over the number of elements for "mean" """
    factor = 2.0 / input.numel() if reduction == "mean" and input.numel() else 2.0
    run_elementwise("mse_loss_backward", out, (input, target, grad.expand(input.shape)), floats=(factor, 0.0))


def supports(op: str, *args: Any) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    return launch.refuses(*tensors)


KERNELS: dict[str, Callable[..., None]] = {
    "softmax": softmax, "softmax_backward": softmax_backward,
    "log_softmax": log_softmax, "log_softmax_backward": log_softmax_backward,
    "cross_entropy": cross_entropy, "cross_entropy_backward": cross_entropy_backward,
    "nll_loss": nll_loss, "nll_loss_backward": nll_loss_backward,
    "mse_loss": mse_loss, "mse_loss_backward": mse_loss_backward,
    "linear_cross_entropy": linear_cross_entropy, "linear_cross_entropy_backward": linear_cross_entropy_backward,
}
