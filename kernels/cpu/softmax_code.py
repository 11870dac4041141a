"""Softmax, log-softmax and cross entropy, as compiled. Imported only to build a kernel.

A *line* is what the softmax runs over. A kernel is written once, in terms of a ``Space`` that says how lines lie:
``Rows`` have their elements next to each other, so a vector holds elements of one line and totals are reduced to a
scalar; ``Columns`` lie next to each other, so a vector holds an element of many lines. Strides are in bytes, sizes in
elements, addresses int64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, NamedTuple

from numba.core.types import float64

from .activation_code import WIDTH, elementwise
from .engine.region import parallel
from .engine.simd import (
    ELEMS,
    FLOAT64,
    INT64,
    Elem,
    compute_elem,
    first_lane,
    first_lanes,
    fma,
    inline,
    load,
    load_n,
    load_scalar,
    maximum_fast,
    prefetch,
    reduce_add,
    reduce_max,
    select,
    spread,
    store,
    store_n,
    store_scalar,
    wide,
)
from .engine.vecmath import exp_below, log

LINE = 64  # bytes
BLOCK = 4096  # elements of a row that are read twice while they are in L1
TERMS = 64  # of a column that are summed before they are added to the total: its error grows more slowly


class Space(NamedTuple):
    """How lines lie, and loops over one line (or one vector of lines). See ``rows`` and ``columns``.

    ``largest(x, sx, n, k)``: the maximum, NaN ignored; -Inf if there is none.
    ``sum_exp(x, sx, n, k)``: (m, s), s = Σ exp(x_j - m), m the maximum; NaN if the line has NaN or +Inf.
    ``walk(term, writes)(a, sa, b, sb, w, sw, y, sy, n, k, p)``: Σ term(a_j, b_j, w_j, p); the terms also go to y if
    ``writes``.
    ``log(s)``: of a number that belongs to a line.
    ``get(address, k)``, ``put(address, value, k)``: a line's number in memory, in the compute type.

    a, b, w are addresses (w: of the class weights, which all lines share), sa, sb, sw strides, n the line's length, k
    the number of lines in the vector; p is whatever belongs to the line.
    """

    largest: Any
    sum_exp: Any
    walk: Callable[..., Any]
    log: Any
    get: Any
    put: Any


def rows(elem: Elem, second: bool = False, weighted: bool = False) -> Space:
    """Lines of consecutive elements. ``second``: b exists; ``weighted``: w exists."""
    one, several, compute = elem, wide(elem, WIDTH), compute_elem(elem)
    L, W, size = one.lanes, several.lanes, elem.size

    @inline
    def largest(x, sx, n, k):
        best, i = spread(several, -inf), 0
        while i + W <= n:
            best = maximum_fast(load(several, x + i * size), best)
            i += W
        top = reduce_max(best)
        if i < n:
            rest = spread(one, -inf)
            while i < n:
                rest = maximum_fast(select(first_lanes(one, n - i), load_n(one, x + i * size, n - i), -inf), rest)
                i += L
            top = max(top, reduce_max(rest))
        return top

    def walk(term: Callable[..., Any], writes: bool, fetches: bool = False) -> Any:
        @inline
        def function(a, sa, b, sb, w, sw, y, sy, n, k, p):
            sums, i = spread(several, 0.0), 0
            while i + W <= n:
                if fetches:  # the next line, where it most likely is
                    for line in range(0, W * size, LINE):
                        prefetch(a + (n + i) * size + line)
                        prefetch(y + (n + i) * size + line)
                        if second:
                            prefetch(b + (n + i) * size + line)
                va = load(several, a + i * size)
                vb = load(several, b + i * size) if second else va
                vw = load(several, w + i * size) if weighted else va
                t = term(va, vb, vw, p)
                if writes:
                    store(several, y + i * size, t)
                sums = sums + t
                i += W
            total = reduce_add(sums)
            if i < n:
                rest = spread(one, 0.0)
                while i < n:
                    va = load_n(one, a + i * size, n - i)
                    vb = load_n(one, b + i * size, n - i) if second else va
                    vw = load_n(one, w + i * size, n - i) if weighted else va
                    t = term(va, vb, vw, p)
                    if writes:
                        store_n(one, y + i * size, t, n - i)
                    rest = rest + select(first_lanes(one, n - i), t, 0.0)
                    i += L
                total = total + reduce_add(rest)
            return total
        return function

    terms = rows(elem).walk(_exp, False) if second or weighted else walk(_exp, False)

    @inline
    def sum_exp(x, sx, n, k):
        m, s, at = -inf, 0.0, 0
        while at < n:  # a block at a time, so that the second reading finds it in L1
            here, size_here = x + at * size, min(BLOCK, n - at)
            top = largest(here, sx, size_here, k)
            if top > m:
                if s != 0.0:
                    s = s * first_lane(exp_below(spread(compute, m - top)))
                m = top
            base = 0.0 if m == -inf else m
            s = s + terms(here, sx, 0, 0, 0, 0, 0, 0, size_here, k, base)
            at += BLOCK
        return m, s

    @inline
    def log_scalar(s):
        return first_lane(log(spread(compute, s)))

    @inline
    def get(address, k):
        return load_scalar(compute, address)

    @inline
    def put(address, value, k):
        store_scalar(compute, address, value)

    return Space(largest, sum_exp, walk, log_scalar, get, put)


def columns(elem: Elem, vectors: int, second: bool = False, weighted: bool = False) -> Space:
    """Lines next to each other: ``vectors`` full vectors of them, or, if that is 1, the first k lanes of one."""
    full = vectors > 1
    lines, compute = wide(elem, vectors), wide(compute_elem(elem), vectors)

    @inline
    def at(E, address, k):
        if full:
            return load(E, address)
        return load_n(E, address, k)

    @inline
    def write(E, address, value, k):
        if full:
            store(E, address, value)
        else:
            store_n(E, address, value, k)

    @inline
    def largest(x, sx, n, k):
        best = spread(compute, -inf)
        for j in range(n):
            best = maximum_fast(at(lines, x + j * sx, k), best)
        return best

    def walk(term: Callable[..., Any], writes: bool, fetches: bool = False) -> Any:
        @inline
        def function(a, sa, b, sb, w, sw, y, sy, n, k, p):
            total = spread(compute, 0.0)
            for first in range(0, n, TERMS):
                sums = spread(compute, 0.0)
                for j in range(first, min(n, first + TERMS)):
                    va = at(lines, a + j * sa, k)
                    vb = at(lines, b + j * sb, k) if second else va
                    vw = spread(compute, load_scalar(elem, w + j * sw)) if weighted else va
                    t = term(va, vb, vw, p)
                    if writes:
                        write(lines, y + j * sy, t, k)
                    sums = sums + t
                total = total + sums
            return total
        return function

    terms = columns(elem, vectors).walk(_exp, False) if second or weighted else walk(_exp, False)

    @inline
    def sum_exp(x, sx, n, k):
        m = largest(x, sx, n, k)
        return m, terms(x, sx, 0, 0, 0, 0, 0, 0, n, k, m)  # Inf - Inf makes NaN

    @inline
    def get(address, k):
        return at(compute, address, k)

    @inline
    def put(address, value, k):
        write(compute, address, value, k)

    return Space(largest, sum_exp, walk, log, get, put)


@inline
def _exp(x, b, w, m):
    return exp_below(x - m)


# Softmax -------------------------------------------------------------------------------------------------------------


@inline
def _scaled_exp(x, b, w, p):
    return exp_below(x - p[0]) * p[1]


@inline
def _times(x, b, w, s):
    return x * s


@inline
def _minus_both(x, b, w, p):
    return (x - p[0]) - p[1]


@inline
def _product(g, y, w, p):
    return g * y


@inline
def _itself(g, y, w, p):
    return g


@inline
def _softmax_gradient(g, y, w, d):
    return y * (g - d)


@inline
def _log_softmax_gradient(g, y, w, d):
    return fma(exp_below(y), -d, g)


def _line_functions(elem: Elem, space: Callable[..., Space]) -> dict[str, Callable[..., Any]]:
    """What is done to a line, by name: f(x, sx, g, sg, y, sy, n, k); g is read by the gradients only."""
    one, two = space(), space(second=True)
    in_place = elem.size > 2  # a half type is too coarse to keep the numerators in
    largest, sum_exp, logarithm = one.largest, one.sum_exp, one.log
    write_exp, scale = one.walk(_exp, True, fetches=True), one.walk(_times, True)
    write_scaled, shift = one.walk(_scaled_exp, True, fetches=True), one.walk(_minus_both, True, fetches=True)
    dot, total = two.walk(_product, False), one.walk(_itself, False)
    write_softmax_gradient = two.walk(_softmax_gradient, True, fetches=True)
    write_log_softmax_gradient = two.walk(_log_softmax_gradient, True, fetches=True)

    @inline
    def softmax(x, sx, g, sg, y, sy, n, k):
        if in_place:
            m = largest(x, sx, n, k)
            s = write_exp(x, sx, 0, 0, 0, 0, y, sy, n, k, m)
            scale(y, sy, 0, 0, 0, 0, y, sy, n, k, 1.0 / s)
        else:
            m, s = sum_exp(x, sx, n, k)
            write_scaled(x, sx, 0, 0, 0, 0, y, sy, n, k, (m, 1.0 / s))

    @inline
    def log_softmax(x, sx, g, sg, y, sy, n, k):
        m, s = sum_exp(x, sx, n, k)
        shift(x, sx, 0, 0, 0, 0, y, sy, n, k, (m, logarithm(s)))

    @inline
    def softmax_backward(x, sx, g, sg, y, sy, n, k):
        d = dot(g, sg, x, sx, 0, 0, 0, 0, n, k, 0.0)
        write_softmax_gradient(g, sg, x, sx, 0, 0, y, sy, n, k, d)

    @inline
    def log_softmax_backward(x, sx, g, sg, y, sy, n, k):
        d = total(g, sg, 0, 0, 0, 0, 0, 0, n, k, 0.0)
        write_log_softmax_gradient(g, sg, x, sx, 0, 0, y, sy, n, k, d)

    return {f.__name__: f for f in (softmax, log_softmax, softmax_backward, log_softmax_backward)}


def _over_lines(elem: Elem, in_rows: bool, many: Callable[..., Any], few: Callable[..., Any]) -> Callable[..., Any]:
    """This thread's share of the lines: many or few(r, o, i, k, args) for k of them from r = o · inner + i on."""
    L, W = elem.lanes, elem.lanes * WIDTH
    step = 1 if in_rows else W

    @inline
    def run(thread, threads, outer, inner, args):
        blocks = (inner + step - 1) // step
        first, end = outer * blocks * thread // threads, outer * blocks * (thread + 1) // threads
        o = first // blocks
        block = first - o * blocks
        for _block in range(first, end):
            i = block * step
            stop = min(inner, i + step)
            if i + step <= stop:
                many(o * inner + i, o, i, step, args)
            else:
                while i < stop:
                    few(o * inner + i, o, i, min(L, stop - i), args)
                    i += L
            block += 1
            if block == blocks:
                block = 0
                o += 1
    return run


def softmax(elem_name: str, op: str, in_rows: bool) -> Callable[..., Any]:
    """kernel(outer, inner, n, threads, x, g, y: address, outer, inner and class stride each)

    x is the input, or the output for the gradients, whose g is the incoming one; outer · inner lines.
    """
    elem = ELEMS[elem_name]
    if in_rows:
        line = _line_functions(elem, partial(rows, elem))[op]

        @inline
        def few(r, o, i, k, args):
            n, x, xo, xi, xc, g, go, gi, gc, y, yo, yi, yc = args
            line(x + o * xo + i * xi, xc, g + o * go + i * gi, gc, y + o * yo + i * yi, yc, n, k)
        many = few
    else:
        line = _line_functions(elem, partial(columns, elem, 1))[op]
        lines = _line_functions(elem, partial(columns, elem, WIDTH))[op]

        @inline
        def few(r, o, i, k, args):
            n, x, xo, xi, xc, g, go, gi, gc, y, yo, yi, yc = args
            line(x + o * xo + i * xi, xc, g + o * go + i * gi, gc, y + o * yo + i * yi, yc, n, k)

        @inline
        def many(r, o, i, k, args):
            n, x, xo, xi, xc, g, go, gi, gc, y, yo, yi, yc = args
            lines(x + o * xo + i * xi, xc, g + o * go + i * gi, gc, y + o * yo + i * yi, yc, n, k)
    run = _over_lines(elem, in_rows, many, few)

    @inline
    def body(thread, threads, outer, inner, n, x, xo, xi, xc, g, go, gi, gc, y, yo, yi, yc):
        run(thread, threads, outer, inner, (n, x, xo, xi, xc, g, go, gi, gc, y, yo, yi, yc))

    def kernel(outer, inner, n, threads, x, xo, xi, xc, g, go, gi, gc, y, yo, yi, yc):
        parallel(threads, body, (outer, inner, n, x, xo, xi, xc, g, go, gi, gc, y, yo, yi, yc))
    return kernel


# Cross entropy -------------------------------------------------------------------------------------------------------


def _coefficient(probabilities: bool) -> Callable[..., Any]:
    """c_j in loss = Σ c_j (lse - x_j): the (smoothed) target times the class weight. For class indices without the
    factor that all classes share, and without the target's own class."""
    @inline
    def coefficient(q, w, keep, each):
        if probabilities:
            return (q * keep + each) * w
        return w
    return coefficient


def _weights(elem: Elem) -> Callable[..., Any]:
    """weight_of(w, t): the class weight as float64; 1 if there are none (w is 0)."""
    size = elem.size

    @inline
    def weight_of(w, t):
        if w != 0:
            return float64(load_scalar(elem, w + t * size))
        return 1.0
    return weight_of


def _sum(array: int, n: int) -> float:
    """Σ of n float64 numbers, in an order that depends on n alone."""
    total, i = spread(FLOAT64, 0.0), 0
    while i < n:
        total = total + load_n(FLOAT64, array + i * 8, n - i)
        i += FLOAT64.lanes
    return reduce_add(total)


_total = inline(_sum)
NONE, MEAN, SUM = range(3)  # reductions


def cross_entropy(elem_name: str, in_rows: bool, kind: str) -> Callable[..., Any]:
    """kernel(outer, inner, n, threads, reduction, ignore, x, xo, xi, xc, q, qo, qi, qc, w, lines, lse, losses, out,
    bad, smoothing)

    q: class indices (int64, one a line, in order) or, for ``probabilities``, laid out like x. lines: room for 3 numbers
    a line in the compute type; lse: float64, a line each; losses: room for 2 float64 a line; out: the loss, in x's
    type, reduced or a line each. bad: int64, set to 1 + the number of a line whose class index is out of range.

    kind: "indices", "smoothed" (indices with label smoothing), "probabilities", or "logs" (indices, and x is
    log-probabilities already: nll_loss). w: class weights; for "indices" and "logs" 0 means none.
    """
    elem = ELEMS[elem_name]
    compute = compute_elem(elem)
    size = compute.size
    probabilities, smooth, logs = (kind == k for k in ("probabilities", "smoothed", "logs"))
    summed = probabilities or smooth  # over all classes
    weight_of, coefficient = _weights(elem), _coefficient(probabilities)

    @inline
    def term(x, q, w, p):
        m, log_sum, keep, each = p
        value = (m - x) + log_sum
        return coefficient(q, w, keep, each) * value

    def line_function(space: Callable[..., Space]) -> Callable[..., Any]:
        plain = space()
        sum_exp, logarithm, put = plain.sum_exp, plain.log, plain.put
        loss_sum = space(second=probabilities, weighted=True).walk(term, False)

        @inline
        def line(r, o, i, k, args):
            lines, at, n, x, xo, xi, xc, q, qo, qi, qc, w, keep, each = args
            here = x + o * xo + i * xi
            m, s = sum_exp(here, xc, n, k)
            log_sum = logarithm(s)
            put(at + r * size, m, k)
            put(at + (lines + r) * size, log_sum, k)
            if summed:
                total = loss_sum(here, xc, q + o * qo + i * qi, qc, w, elem.size, 0, 0, n, k, (m, log_sum, keep, each))
                put(at + (2 * lines + r) * size, total, k)
        return line

    if in_rows:
        few = line_function(partial(rows, elem))
        many = few
    else:
        few, many = line_function(partial(columns, elem, 1)), line_function(partial(columns, elem, WIDTH))

    @inline
    def finish(r, o, i, k, args):
        """The losses of k lines, from what was kept of them"""
        lines, at, n, x, xo, xi, xc, q, w, ignore, keep, each, reduction, lse, losses, out, bad = args
        for line in range(r, r + k):
            m, log_sum, rest = 0.0, 0.0, 0.0
            if not logs:
                m = float64(load_scalar(compute, at + line * size))
                log_sum = float64(load_scalar(compute, at + (lines + line) * size))
                store_scalar(FLOAT64, lse + line * 8, m)
                store_scalar(FLOAT64, lse + (lines + line) * 8, log_sum)
            if summed:
                rest = float64(load_scalar(compute, at + (2 * lines + line) * size))
            loss, weight = 0.0, 0.0
            if probabilities:
                loss, weight = rest, 1.0
            else:
                t = load_scalar(INT64, q + line * 8)
                if t != ignore:
                    if t < 0 or t >= n:
                        store_scalar(INT64, bad, line + 1)
                    else:
                        weight = weight_of(w, t)
                        xt = float64(load_scalar(elem, x + o * xo + (i + line - r) * xi + t * xc))
                        if logs:
                            loss = weight * -xt  # of 0 it is −0
                        else:
                            loss = keep * weight * ((m - xt) + log_sum)
                        if smooth:
                            loss += each * rest
            store_scalar(FLOAT64, losses + line * 8, loss)
            store_scalar(FLOAT64, losses + (lines + line) * 8, weight)
            if reduction == NONE:
                store_scalar(elem, out + line * elem.size, loss)

    @inline
    def whole(r, o, i, k, args):
        first, second = args
        if not logs:
            many(r, o, i, k, first)
        finish(r, o, i, k, second)

    @inline
    def part(r, o, i, k, args):
        first, second = args
        if not logs:
            few(r, o, i, k, first)
        finish(r, o, i, k, second)

    run = _over_lines(elem, in_rows, whole, part)

    @inline
    def body(thread, threads, outer, inner, n, reduction, ignore, x, xo, xi, xc, q, qo, qi, qc, w, at, lse, losses,
             out, bad, keep, each):
        lines = outer * inner
        run(thread, threads, outer, inner,
            ((lines, at, n, x, xo, xi, xc, q, qo, qi, qc, w, keep, each),
             (lines, at, n, x, xo, xi, xc, q, w, ignore, keep, each, reduction, lse, losses, out, bad)))

    def kernel(outer, inner, n, threads, reduction, ignore, x, xo, xi, xc, q, qo, qi, qc, w, at, lse, losses, out, bad,
               smoothing):
        parallel(threads, body, (outer, inner, n, reduction, ignore, x, xo, xi, xc, q, qo, qi, qc, w, at, lse, losses,
                                 out, bad, 1.0 - smoothing, smoothing / n))
        if reduction != NONE:
            lines = outer * inner
            total = _total(losses, lines)
            if reduction == MEAN:
                total = total / _total(losses + lines * 8, lines)
            store_scalar(elem, out, total)
    return kernel


def cross_entropy_backward(elem_name: str, in_rows: bool, kind: str) -> Callable[..., Any]:
    """kernel(outer, inner, n, threads, mean, ignore, x, xo, xi, xc, q, qo, qi, qc, w, lines, lse, y, yo, yi, yc, g, gs,
    bad, smoothing)

    As for ``cross_entropy``. lines: room for 4 numbers a line; y: the gradient of x (for ``logs`` already zero); g: the
    loss's gradient, in x's type, stride gs; mean: whether to divide by the sum of weights.
    """
    elem = ELEMS[elem_name]
    compute = compute_elem(elem)
    size = compute.size
    probabilities, smooth, logs = (kind == k for k in ("probabilities", "smoothed", "logs"))
    spread_out = probabilities or smooth  # whether classes other than the target's have a coefficient
    weight_of, coefficient = _weights(elem), _coefficient(probabilities)

    @inline
    def the_coefficient(x, q, w, p):
        return coefficient(q, w, p[0], p[1])

    @inline
    def term(x, q, w, p):
        high, low, a, b, keep, each = p
        t = exp_below((x - high) - low) * a
        return t - coefficient(q, w, keep, each) * b if spread_out else t

    def line_function(space: Callable[..., Space]) -> Callable[..., Any]:
        s = space(second=probabilities, weighted=spread_out)
        get, gradient, coefficients = s.get, s.walk(term, True), s.walk(the_coefficient, False)
        sum_exp, logarithm = s.sum_exp, s.log

        @inline
        def line(r, o, i, k, args):
            lines, at, n, x, xo, xi, xc, q, qo, qi, qc, w, y, yo, yi, yc, keep, each = args
            here, there = x + o * xo + i * xi, q + o * qo + i * qi
            if size == 8:  # there is nothing wider to keep lse in
                high, total = sum_exp(here, xc, n, k)
                low = logarithm(total)
            else:
                high, low = get(at + r * size, k), get(at + (lines + r) * size, k)
            a, b = get(at + (2 * lines + r) * size, k), get(at + (3 * lines + r) * size, k)
            if probabilities:
                a = a * coefficients(here, xc, there, qc, w, elem.size, 0, 0, n, k, (keep, each))
            gradient(here, xc, there, qc, w, elem.size, y + o * yo + i * yi, yc, n, k, (high, low, a, b, keep, each))
        return line

    if in_rows:
        few = line_function(partial(rows, elem))
        many = few
    else:
        few, many = line_function(partial(columns, elem, 1)), line_function(partial(columns, elem, WIDTH))

    @inline
    def prepare(r, o, i, k, args):
        """What the lines' loops need: lse in two parts, the factor of the softmax, the factor of the coefficients"""
        lines, at, n, q, w, ignore, lse, g, gs, scale, keep, each, weights, bad = args
        for line in range(r, r + k):
            s = float64(load_scalar(elem, g + line * gs)) * scale
            total = s
            if not probabilities:
                t = load_scalar(INT64, q + line * 8)
                total = 0.0
                if t == ignore:
                    s = 0.0
                elif t < 0 or t >= n:
                    store_scalar(INT64, bad, line + 1)
                else:
                    total = s * (keep * weight_of(w, t) + each * weights)
                    s = s * each
            if not logs:
                store_scalar(compute, at + line * size, load_scalar(FLOAT64, lse + line * 8))
                store_scalar(compute, at + (lines + line) * size, load_scalar(FLOAT64, lse + (lines + line) * 8))
                store_scalar(compute, at + (2 * lines + line) * size, total)
                store_scalar(compute, at + (3 * lines + line) * size, s)

    @inline
    def finish(r, o, i, k, args):
        """What is different for the target's class"""
        lines, n, x, xo, xi, xc, q, w, y, yo, yi, yc, ignore, lse, g, gs, scale, keep, each, weights = args
        for line in range(r, r + k):
            t = load_scalar(INT64, q + line * 8)
            at = y + o * yo + (i + line - r) * yi
            if t != ignore and t >= 0 and t < n:
                s = float64(load_scalar(elem, g + line * gs)) * scale
                weight = weight_of(w, t)
                value = -keep * weight * s
                if size == 8:
                    value += load_scalar(elem, at + t * yc)  # what the line's loop wrote
                elif not logs:  # again, as that has been rounded
                    xt = float64(load_scalar(elem, x + o * xo + (i + line - r) * xi + t * xc))
                    m, log_sum = load_scalar(FLOAT64, lse + line * 8), load_scalar(FLOAT64, lse + (lines + line) * 8)
                    p = first_lane(exp_below(spread(FLOAT64, (xt - m) - log_sum)))
                    value += s * (p * (keep * weight + each * weights) - each * weight)
                store_scalar(elem, at + t * yc, value)

    def both(line: Callable[..., Any]) -> Callable[..., Any]:
        @inline
        def lines(r, o, i, k, args):
            first, second, third = args
            prepare(r, o, i, k, first)
            if not logs:
                line(r, o, i, k, second)
            if not probabilities:
                finish(r, o, i, k, third)
        return lines

    run = _over_lines(elem, in_rows, both(many), both(few))

    @inline
    def body(thread, threads, outer, inner, n, ignore, x, xo, xi, xc, q, qo, qi, qc, w, at, lse, y, yo, yi, yc, g, gs,
             bad, scale, keep, each, weights):
        lines = outer * inner
        run(thread, threads, outer, inner,
            ((lines, at, n, q, w, ignore, lse, g, gs, scale, keep, each, weights, bad),
             (lines, at, n, x, xo, xi, xc, q, qo, qi, qc, w, y, yo, yi, yc, keep, each),
             (lines, n, x, xo, xi, xc, q, w, y, yo, yi, yc, ignore, lse, g, gs, scale, keep, each, weights)))

    def kernel(outer, inner, n, threads, mean, ignore, x, xo, xi, xc, q, qo, qi, qc, w, at, lse, y, yo, yi, yc, g, gs,
               bad, smoothing):
        scale, weights, lines = 1.0, float64(n), outer * inner
        if mean and probabilities:
            scale = 1.0 / lines
        elif mean:
            total = 0.0
            for line in range(lines):
                t = load_scalar(INT64, q + line * 8)
                if t != ignore and t >= 0 and t < n:
                    total += weight_of(w, t)
            scale = 1.0 / total
        if smooth:
            weights = 0.0
            for j in range(n):
                weights += weight_of(w, j)
        parallel(threads, body, (outer, inner, n, ignore, x, xo, xi, xc, q, qo, qi, qc, w, at, lse, y, yo, yi, yc, g,
                                 gs, bad, scale, 1.0 - smoothing, smoothing / n, weights))
    return kernel


# Mean squared error --------------------------------------------------------------------------------------------------


@inline
def _squared_difference(a, b, w, p):
    d = a - b
    return d * d


def squared_error(elem_name: str) -> Callable[..., Any]:
    """kernel(n, threads, a, b, parts, out, factor): out = factor · Σ (a - b)²; parts: a float64 for each BLOCK"""
    elem = ELEMS[elem_name]
    part = rows(elem, second=True).walk(_squared_difference, False)
    step = BLOCK * elem.size

    @inline
    def body(thread, threads, n, a, b, parts):
        blocks = (n + BLOCK - 1) // BLOCK
        for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
            here = min(BLOCK, n - block * BLOCK)
            total = part(a + block * step, 0, b + block * step, 0, 0, 0, 0, 0, here, 1, 0.0)
            store_scalar(FLOAT64, parts + block * 8, float64(total))

    def kernel(n, threads, a, b, parts, out, factor):
        parallel(threads, body, (n, a, b, parts))
        store_scalar(elem, out, _total(parts, (n + BLOCK - 1) // BLOCK) * factor)
    return kernel


def mse_loss(elem_name: str) -> Callable[..., Any]:
    @inline
    def f(a, b, c, i, step, k0, k1, k2, p0, p1):
        d = a - b
        return d * d, a
    return elementwise(f, f"{elem_name} {elem_name}", elem_name)


def mse_loss_backward(elem_name: str, grad_each: bool) -> Callable[..., Any]:
    """p0 (a - b), and the gradient c of each element if there is one"""
    @inline
    def f(a, b, c, i, step, k0, k1, k2, p0, p1):
        if grad_each:
            return (a - b) * p0 * c, a
        return (a - b) * p0, a
    return elementwise(f, " ".join([elem_name] * (3 if grad_each else 2)), elem_name)
