"""Softmax, log-softmax and the losses on the GPU.

A line lies along the class dimension; a program takes R of them, whole, where they fit into its registers. Longer lines are cut
into parts: ``line_sums`` takes each part's maximum and sum, ``softmax_parts`` joins them, in their order, and finishes a part.
The losses go through a line in steps, by one program, as they have many lines and write nothing of their size forward; long
lines that are too few for the GPU are cut into parts as well.

The compiler reads 16 bytes at once only where it knows that an address is a multiple of 16. UNIT says what it may know: 8, sizes
and steps are multiples of 8 and given in eighths; 1, nothing; 0, lines lie side by side and begin anywhere, so each has a head of
up to 7 elements before its first whole vector and a tail behind the last, which are its edges, a small tile of their own.

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
def _start(line, inner, outer_step, inner_step):
    return (line // inner) * outer_step + (line % inner) * inner_step


@triton.jit
def _place(line, inner, outer_step, inner_step, UNIT: tl.constexpr):
    """Where the first whole vector of each line is"""
    at = _start(line, inner, outer_step, inner_step)
    return ((at + 7) // 8 * 8 if UNIT == 0 else at * UNIT)[:, None]


@triton.jit
def _extent(line, inner, n, outer_step, inner_step, UNIT: tl.constexpr):
    """(elements of a line, those before its first whole vector, those of its whole vectors), the last two as columns"""
    head = line[:, None] * 0
    if UNIT == 0:
        head = -_start(line, inner, outer_step, inner_step)[:, None] & 7
        length = functions.wide(n)
        whole = (length - head) // 8 * 8
    else:
        length = functions.wide(n) * UNIT
        whole = head + length
    return length, head, whole


@triton.jit
def _edges(length, head, whole, there):
    """The places of a line's head and tail, from its first whole vector on, and which of them are the line's"""
    k = tl.arange(0, 16)[None, :]
    p = tl.where(k < 8, k - 8, whole + k - 8)
    return p, there & (p >= -head) & (p < length - head)


@triton.jit
def _load(x, place, p, step, inside, OUTSIDE: tl.constexpr):
    return tl.load(x + place + p * step, mask=inside, other=OUTSIDE)


@triton.jit
def _exp(x, like: tl.constexpr):
    """exp(x) for x ≤ 0, as exact as numbers of this type can show"""
    return functions.exp(x) if like == tl.float32 else tl.exp2(x * functions.LOG2_E)


@triton.jit
def _finite(m):
    """What may be subtracted: of a line of -Inf alone, 0"""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _running(x, place, there, whole, step, first, last, R: tl.constexpr, C: tl.constexpr, V: tl.constexpr):
    """(maximum, Σ exp(x - maximum)) of places first to last, of V elements each, which are a thread's, until the end"""
    m = tl.full((R, C // V), float("-inf"), tl.float32)
    s = tl.zeros((R, C // V), tl.float32)
    for at in tl.range(first, last, C, num_stages=3):
        p = (at + tl.arange(0, C)).to(tl.int64)[None, :]
        v = tl.reshape(_load(x, place, p, step, there & (p < whole), float("-inf")), (R, C // V, V)).to(tl.float32)
        top = tl.maximum(m, tl.max(v, 2))
        shift = _finite(top)
        s = s * _exp(m - shift, x.dtype.element_ty) + tl.sum(_exp(v - shift[:, :, None], x.dtype.element_ty), 2)
        m = top
    top = tl.max(m, 1)
    return top, tl.sum(s * _exp(m - _finite(top)[:, None], x.dtype.element_ty), 1)


@triton.jit
def _join(m, s, m2, s2):
    """Two parts' maxima and sums as those of both"""
    top = tl.maximum(m, m2)
    shift = _finite(top)
    return top, s * functions.exp(m - shift) + s2 * functions.exp(m2 - shift)


@triton.jit
def _with_edges(m, s, x, place, length, head, whole, there, step):
    """A maximum and a sum with those of the edges"""
    p, inside = _edges(length, head, whole, there)
    v = _load(x, place, p, step, inside, float("-inf")).to(tl.float32)
    m2 = tl.max(v, 1)
    return _join(m, s, m2, tl.sum(functions.exp(v - _finite(m2)[:, None]), 1))


@triton.jit
def _terms(x, g, m, OP: tl.constexpr, like: tl.constexpr):
    """What is summed of a line"""
    if OP == "softmax_backward":
        t = g * x
    elif OP == "log_softmax_backward":
        t = g
    else:
        t = _exp(x - _finite(m)[:, None], like)
    return t


@triton.jit
def _result(t, x, g, m, s, OP: tl.constexpr, like: tl.constexpr):
    """What a line becomes: t are its terms, m its maximum, s their sum"""
    if OP == "softmax":
        r = t * (1.0 / s)[:, None]
    elif OP == "log_softmax":
        r = x - m[:, None] - tl.log(s)[:, None]
    elif OP == "softmax_backward":
        r = x * (g - s[:, None])
    else:
        tl.static_assert(OP == "log_softmax_backward", "an unknown operation")
        r = g - _exp(x, like) * s[:, None]
    return r


@triton.jit
def _operands(x, x_place, x_n, g, g_place, g_n, p, inside):
    """x, -Inf outside, and g; without a g both are x, and 0 outside where there is one"""
    if g is None:
        vx = _load(x, x_place, p, x_n, inside, float("-inf")).to(tl.float32)
        vg = vx
    else:
        vx = _load(x, x_place, p, x_n, inside, 0.0).to(tl.float32)
        vg = _load(g, g_place, p, g_n, inside, 0.0).to(tl.float32)
    return vx, vg


@triton.jit
def softmax_lines(
    y, x, g, lines, inner, n, y_o, y_i, y_n, x_o, x_i, x_n, g_o, g_i, g_n,
    OP: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The result of whole lines. Forward x is the input, backward the output."""
    line = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = (line < lines)[:, None]
    length, head, whole = _extent(line, inner, n, x_o, x_i, UNIT)
    to = _place(line, inner, y_o, y_i, UNIT)
    x_place = _place(line, inner, x_o, x_i, UNIT)
    g_place = _place(line, inner, g_o, g_i, UNIT)
    p = tl.arange(0, C).to(tl.int64)[None, :]
    inside = there & (p < whole)
    vx, vg = _operands(x, x_place, x_n, g, g_place, g_n, p, inside)
    m = tl.zeros((R,), tl.float32)
    if g is None:
        m = tl.max(vx, 1)
    if UNIT == 0:
        at, edge = _edges(length, head, whole, there)
        ex, eg = _operands(x, x_place, x_n, g, g_place, g_n, at, edge)
        if g is None:
            m = tl.maximum(m, tl.max(ex, 1))
    t = _terms(vx, vg, m, OP, x.dtype.element_ty)
    s = tl.sum(t, 1)
    if UNIT == 0:
        et = _terms(ex, eg, m, OP, x.dtype.element_ty)
        s += tl.sum(et, 1)
        r = _result(et, ex, eg, m, s, OP, x.dtype.element_ty)
        tl.store(y + to + at * y_n, r.to(y.dtype.element_ty), mask=edge)
    r = _result(t, vx, vg, m, s, OP, x.dtype.element_ty)
    tl.store(y + to + p * y_n, r.to(y.dtype.element_ty), mask=inside)


@triton.jit
def line_sums(
    sums, x, g, lines, inner, n, x_o, x_i, x_n, g_o, g_i, g_n, part, parts,
    OP: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """sums[:, line, part]: of that part of the line, `part` elements long; a line's edges are its first part's"""
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    there = (line < lines)[:, None]
    length, head, whole = _extent(line, inner, n, x_o, x_i, UNIT)
    first = pid % parts * part
    last = tl.minimum(length, first + part)
    x_place = _place(line, inner, x_o, x_i, UNIT)
    mine = there & (first == 0)
    if g is None:
        m, s = _running(x, x_place, there, whole, x_n, first, last, R, C, V)
        if UNIT == 0:
            m, s = _with_edges(m, s, x, x_place, length, head, whole, mine, x_n)
    else:
        m = tl.zeros((R,), tl.float32)
        t = tl.zeros((R, C), tl.float32)
        g_place = _place(line, inner, g_o, g_i, UNIT)
        for at in tl.range(first, last, C, num_stages=3):
            p = (at + tl.arange(0, C)).to(tl.int64)[None, :]
            vx, vg = _operands(x, x_place, x_n, g, g_place, g_n, p, there & (p < whole))
            t += _terms(vx, vg, m, OP, x.dtype.element_ty)
        s = tl.sum(t, 1)
        if UNIT == 0:
            at, edge = _edges(length, head, whole, mine)
            ex, eg = _operands(x, x_place, x_n, g, g_place, g_n, at, edge)
            s += tl.sum(_terms(ex, eg, m, OP, x.dtype.element_ty), 1)
    to = sums + line * parts + pid % parts
    tl.store(to, m, mask=line < lines)
    tl.store(to + functions.wide(lines) * parts, s, mask=line < lines)


@triton.jit
def _joined(sums, line, lines, parts, FORWARD: tl.constexpr, P: tl.constexpr):
    """What `line_sums` made of the parts of each line, as that of the line"""
    k = tl.arange(0, P)[None, :]
    there = (line < lines)[:, None] & (k < parts)
    ms = tl.load(sums + line[:, None] * parts + k, mask=there, other=float("-inf"))
    ss = tl.load(sums + (functions.wide(lines) + line[:, None]) * parts + k, mask=there, other=0.0)
    if FORWARD:
        m = tl.max(ms, 1)
        s = tl.sum(tl.where(there, ss * functions.exp(ms - _finite(m)[:, None]), 0.0), 1)
    else:
        s = tl.sum(ss, 1)
        m = s * 0.0
    return m, s


@triton.jit
def softmax_parts(
    y, x, g, sums, lines, inner, n, y_o, y_i, y_n, x_o, x_i, x_n, g_o, g_i, g_n, part, parts,
    OP: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """softmax_lines of a part of each line, where the sums of all parts are known"""
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    there = (line < lines)[:, None]
    length, head, whole = _extent(line, inner, n, x_o, x_i, UNIT)
    first = pid % parts * part
    last = tl.minimum(length, first + part)
    to = _place(line, inner, y_o, y_i, UNIT)
    x_place = _place(line, inner, x_o, x_i, UNIT)
    g_place = _place(line, inner, g_o, g_i, UNIT)
    m, s = _joined(sums, line, lines, parts, g is None, P)
    for at in tl.range(first, last, C, num_stages=3):
        p = (at + tl.arange(0, C)).to(tl.int64)[None, :]
        inside = there & (p < whole)
        vx, vg = _operands(x, x_place, x_n, g, g_place, g_n, p, inside)
        r = _result(_terms(vx, vg, m, OP, x.dtype.element_ty), vx, vg, m, s, OP, x.dtype.element_ty)
        tl.store(y + to + p * y_n, r.to(y.dtype.element_ty), mask=inside)
    if UNIT == 0:
        at, edge = _edges(length, head, whole, there & (first == 0))
        ex, eg = _operands(x, x_place, x_n, g, g_place, g_n, at, edge)
        r = _result(_terms(ex, eg, m, OP, x.dtype.element_ty), ex, eg, m, s, OP, x.dtype.element_ty)
        tl.store(y + to + at * y_n, r.to(y.dtype.element_ty), mask=edge)


@triton.jit
def _weights(q, w, c, hit, place, p, step, inside, n, smoothing, KIND: tl.constexpr):
    """What each class c counts, which is at place p of its line: its weight times the smoothed target, which it may have hit"""
    if KIND == "probabilities":
        share = _load(q, place, p, step, inside, 0.0).to(tl.float32)
    else:
        share = tl.where(hit, 1.0, 0.0)
    share = share * (1.0 - smoothing) + smoothing / n
    if w is not None:
        share *= tl.load(w + c, mask=inside, other=0.0).to(tl.float32)
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
        weight *= tl.load(w + target, mask=kept, other=0.0).to(tl.float32)
    return target, kept, weight, wrong


@triton.jit
def _loss_terms(x, q, w, row, place, p, inside, head, x_n, q_n, n, m, logs, smoothing, target, KIND: tl.constexpr):
    """What classes add to the loss of smoothed targets or probabilities"""
    v = _load(x, row, p, x_n, inside, 0.0).to(tl.float32)
    share = _weights(q, w, head + p, head + p == target[:, None], place, p, q_n, inside, n, smoothing, KIND)
    return tl.where(share == 0.0, 0.0, share * (logs[:, None] - (v - m[:, None])))


@triton.jit
def losses(
    loss, total, lse, sums, x, q, w, lines, inner, n, x_o, x_i, x_n, q_o, q_i, q_n, ignore, smoothing, pieces, part, parts,
    KIND: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Each line's loss, the weight of its class, and (2, lines) its maximum and log Σ exp(x - maximum).

    KIND: "nll" (x are logarithms), "indices", "smoothed", "probabilities". q: classes, one a line, or probabilities.
    sums: None, or of `pieces` of each line; then the loss may be in `parts` (lines, parts) that are yet to be added up.
    """
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    there = line < lines
    length, head, whole = _extent(line, inner, n, x_o, x_i, UNIT)
    begin = pid % parts * part
    last = tl.minimum(length, begin + part)
    once = there & (begin == 0)
    row = _place(line, inner, x_o, x_i, UNIT)
    target = tl.zeros((R,), tl.int64)
    weight = tl.where(there, 1.0, 0.0)
    kept = there
    wrong = line < 0
    if KIND != "probabilities":
        target, kept, weight, wrong = _target(q, w, line, there, length, ignore)
    if KIND == "nll" or KIND == "indices":
        at = tl.sum(_load(x, row, target[:, None] - head, x_n, there[:, None], 0.0).to(tl.float32), 1)
    if KIND == "nll":
        value = -at * weight
    else:
        if sums is not None:
            m, s = _joined(sums, line, lines, pieces, True, P)
        else:
            m, s = _running(x, row, there[:, None], whole, x_n, 0, length, R, C, V)
            if UNIT == 0:
                m, s = _with_edges(m, s, x, row, length, head, whole, there[:, None], x_n)
        logs = tl.log(s)
        tl.store(lse + line, m.to(tl.float64), mask=once)
        tl.store(lse + functions.wide(lines) + line, logs.to(tl.float64), mask=once)
        if KIND == "indices":
            value = (logs - (at - m)) * weight
        else:
            place = row
            if KIND == "probabilities":
                place = _place(line, inner, q_o, q_i, UNIT)
            value = tl.zeros((R,), tl.float32)
            for first in tl.range(begin, last, C):
                p = (first + tl.arange(0, C)).to(tl.int64)[None, :]
                inside = there[:, None] & (p < whole)
                terms = _loss_terms(
                    x, q, w, row, place, p, inside, head, x_n, q_n, length, m, logs, smoothing, target, KIND
                )
                value += tl.sum(terms, 1)
            if UNIT == 0:
                p, edge = _edges(length, head, whole, once[:, None])
                terms = _loss_terms(
                    x, q, w, row, place, p, edge, head, x_n, q_n, length, m, logs, smoothing, target, KIND
                )
                value += tl.sum(terms, 1)
    value = tl.where(wrong, float("nan"), tl.where(kept, value, 0.0))
    tl.store(loss + line * parts + pid % parts, value.to(loss.dtype.element_ty), mask=there)
    tl.store(total + line, weight, mask=once)


@triton.jit
def _slopes(x, q, w, row, place, p, hit, inside, kept, head, x_n, q_n, n, m, times, weight, factor, smoothing,
            KIND: tl.constexpr):  # fmt: skip
    """factor (p Σ share - share), p being exp(x - m) · times / (factor Σ share); for "nll" -factor · share"""
    if KIND == "nll" or KIND == "indices":
        share = tl.where(hit, (weight * factor)[:, None], 0.0)
    else:
        share = _weights(q, w, head + p, hit, place, p, q_n, inside, n, smoothing, KIND) * factor[:, None]
    if KIND == "nll":
        r = -share
    else:  # an ignored line's logits may be NaN: they are not read
        v = _load(x, row, p, x_n, inside & kept[:, None], 0.0).to(tl.float32)
        r = _exp(v - m[:, None], x.dtype.element_ty) * times[:, None] - share
    return r


@triton.jit
def losses_backward(
    y, grad, lse, x, q, w, sum_w, lines, inner, n, y_o, y_i, y_n, x_o, x_i, x_n, q_o, q_i, q_n, grad_step, ignore, smoothing,
    part, parts, KIND: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A part of each line of grad (p Σ share - share), p the probabilities; for "nll" -grad share. sum_w: all weights' sum."""
    pid = tl.program_id(0).to(tl.int64)
    line = pid // parts * R + tl.arange(0, R)
    there = line < lines
    length, head, whole = _extent(line, inner, n, y_o, y_i, UNIT)
    begin = pid % parts * part
    last = tl.minimum(length, begin + part)
    to = _place(line, inner, y_o, y_i, UNIT)
    row = _place(line, inner, x_o, x_i, UNIT)
    place = row
    target = tl.zeros((R,), tl.int64)
    weight = tl.where(there, 1.0, 0.0)
    kept = there
    wrong = line < 0
    if KIND == "probabilities":
        place = _place(line, inner, q_o, q_i, UNIT)
        mass = tl.zeros((R,), tl.float32)
        for first in tl.range(0, length, C):
            p = (first + tl.arange(0, C)).to(tl.int64)[None, :]
            inside = there[:, None] & (p < whole)
            mass += tl.sum(_weights(q, w, head + p, inside, place, p, q_n, inside, length, smoothing, KIND), 1)
        if UNIT == 0:
            p, edge = _edges(length, head, whole, there[:, None])
            mass += tl.sum(_weights(q, w, head + p, edge, place, p, q_n, edge, length, smoothing, KIND), 1)
    else:
        target, kept, weight, wrong = _target(q, w, line, there, length, ignore)
        mass = weight
    if KIND == "smoothed":
        mass = weight * (1.0 - smoothing) + tl.load(sum_w) * (smoothing / length)
    factor = tl.load(grad + line * grad_step, mask=there, other=0.0).to(tl.float32)
    factor = tl.where(wrong, float("nan"), tl.where(kept, factor, 0.0))
    m = factor
    times = factor
    if KIND != "nll":
        m = tl.load(lse + line, mask=kept, other=0.0).to(tl.float32)
        logs = tl.load(lse + functions.wide(lines) + line, mask=kept, other=0.0).to(tl.float32)
        times = functions.exp(-logs) * mass * factor
    for first in tl.range(begin, last, C, num_stages=3):
        p = (first + tl.arange(0, C)).to(tl.int64)[None, :]
        inside = there[:, None] & (p < whole)
        here = target[:, None] - head - first
        hit = tl.arange(0, C)[None, :] == tl.where((here >= 0) & (here < C), here, -1).to(tl.int32)
        r = _slopes(x, q, w, row, place, p, hit, inside, kept, head, x_n, q_n, length, m, times, weight, factor, smoothing, KIND)
        tl.store(y + to + p * y_n, r.to(y.dtype.element_ty), mask=inside)
    if UNIT == 0:
        p, edge = _edges(length, head, whole, there[:, None] & (begin == 0))
        hit = head + p == target[:, None]
        r = _slopes(x, q, w, row, place, p, hit, edge, kept, head, x_n, q_n, length, m, times, weight, factor, smoothing, KIND)
        tl.store(y + to + p * y_n, r.to(y.dtype.element_ty), mask=edge)


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

_WHOLE = 32768  # elements of a tile, at most, in which whole lines are kept; backward, which keeps two, half as many
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

    @property
    def unit(self) -> int:
        """What the kernels call UNIT"""
        if any(along != 1 for _, _, along in self.steps):
            return 1
        if all(size % 8 == 0 for size in (self.n, *(s for outer, inner, _ in self.steps for s in (outer, inner)))):
            return 8
        return 0 if self.inner == 1 and self.n >= 256 and len({outer % 8 for outer, *_ in self.steps}) == 1 else 1

    def given(self) -> tuple[list[int], list[list[int]]]:
        """Number, inner and n of lines, and each tensor's strides, as kernels take them"""
        unit = max(1, self.unit)
        steps = [[outer // unit, inner // unit, along] for outer, inner, along in self.steps]
        return [self.number, self.inner, self.n // unit], steps


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
    if outer == 1 and 1 not in inner_steps:  # lines of their own: no program divides by a constant 1
        outer, inner, outer_steps, inner_steps = inner, 1, inner_steps, outer_steps
    return Lines(outer * inner, inner, shape[dim] if shape else 1, list(zip(outer_steps, inner_steps, along))), tensors


def _vector(lines: Lines, c: int, tensor: Tensor) -> int:
    """Elements side by side that a thread has of a tile of c: 16 bytes of them, or of lines that lie across all"""
    return min(c, 16 // tensor.itemsize) if lines.steps[0][2] == 1 else c


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
    sizes, (y_steps, x_steps, *more) = lines.given()
    g_steps = more[0] if more else [0, 0, 0]
    n, r, options = lines.n, lines.beside, {"OP": op, "UNIT": lines.unit}
    roomy = g is None and (x.itemsize == 2 or lines.unit)  # in registers, which edges take some of
    if power_of_two(n) * r <= (_WHOLE if roomy else _WHOLE // 2):
        c = power_of_two(n)
        r = max(r, min(power_of_two(lines.number), 2048 // c))
        launch.run(softmax_lines, -(-lines.number // r), out.device, target, x, g, *sizes, *y_steps, *x_steps, *g_steps,
                   R=r, C=c, num_warps=launch.warps(r * c, out.device), **options)  # fmt: skip
    else:
        c = _STEP // r
        part, parts = _parts(lines, r, c, out.device)
        sums = torch.empty((2, lines.number, parts), dtype=torch.float32, device=out.device)
        programs = -(-lines.number // r) * parts
        launch.run(line_sums, programs, out.device, sums, x, g, *sizes, *x_steps, *g_steps, part, parts, R=r, C=c,
                   V=_vector(lines, c, x), num_warps=4, **options)  # fmt: skip
        launch.run(softmax_parts, programs, out.device, target, x, g, sums, *sizes, *y_steps, *x_steps, *g_steps, part, parts,
                   R=r, C=c, P=power_of_two(parts), num_warps=4, **options)  # fmt: skip
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
    sizes, (x_steps, *more) = lines.given()
    options = {"UNIT": lines.unit, "R": r, "C": c, "V": _vector(lines, c, input), "num_warps": 4}
    if parts > 1:
        sums = torch.empty((2, lines.number, parts), dtype=torch.float32, device=out.device)
        launch.run(line_sums, -(-lines.number // r) * parts, out.device, sums, input, None, *sizes, *x_steps, 0, 0, 0, part,
                   parts, OP="softmax", **options)  # fmt: skip
        if kind == "indices":  # nothing but the class itself is left to read
            part, parts = lines.n, 1
        else:
            values = torch.empty((lines.number, parts), dtype=torch.float32, device=out.device)
    launch.run(losses, -(-lines.number // r) * parts, out.device, values, total, lse, sums, input, target,
               None if weight is None else weight.contiguous(), *sizes, *x_steps, *(more[0] if more else (0, 0, 0)), ignore_index,
               float(smoothing), pieces, part, parts, KIND=kind, P=power_of_two(pieces), **options)  # fmt: skip
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
    sizes, (y_steps, x_steps, *more) = lines.given()
    launch.run(losses_backward, -(-lines.number // r) * parts, out.device, y, factor, lse, input, target,
               None if weight is None else weight.contiguous(), sum_w, *sizes, *y_steps, *x_steps,
               *(more[0] if more else (0, 0, 0)), int(reduction == "none"), ignore_index, float(smoothing), part, parts,
               KIND=kind, UNIT=lines.unit, R=r, C=c, num_warps=4)  # fmt: skip
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


# The weight's gradient is read and written once a chunk: of 131072 classes, half of the time was that with chunks of 256 MB.
_STEPS = linear_loss.Steps(matmul.linear, matmul.matmul, _add_product, cross_entropy, cross_entropy_backward, 1 << 30,
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
