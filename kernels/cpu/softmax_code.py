"""Softmax, log-softmax and cross entropy, as compiled. Imported only to build a kernel.

A *line* is what the softmax runs over. A kernel is written once, in terms of a ``Space`` that says how lines lie: ``Rows``
have their elements next to each other, so a vector holds elements of one line and totals are reduced to a scalar; ``Columns``
lie next to each other, so a vector holds an element of many lines. Strides are in bytes, sizes in elements, addresses int64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

from .engine.host import simd
from .engine.region import parallel
from .engine.simd import (
    ELEMS,
    FLOAT64,
    INT64,
    Elem,
    absolute,
    compute_elem,
    first_lanes,
    fma,
    inline,
    load,
    load_n,
    load_scalar,
    maximum_fast,
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

WIDTH = 4 if simd().registers == 32 else 2  # vectors computed as one
BLOCK = 4096  # elements of a row that are read twice while they are in L1


class Space:
    """How lines lie, and loops over one line (or one vector of lines). See ``rows`` and ``columns``.

    largest(x, sx, n, k) → the maximum, NaN ignored; -Inf if there is none
    sum_exp(x, sx, n, k) → (m, s): s = Σ exp(x_j - m), m the maximum; NaN where the line has NaN, +Inf, or nothing but -Inf
    walk(term, writes)(a, sa, b, sb, w, sw, y, sy, n, k, p) → Σ term(a_j, b_j, w_j, p), the terms written to y if ``writes``
    log(s): of a number that belongs to a line
    get(address, k) → a line's number in the compute type; put(address, value, k)

    a, b, w are addresses (w: of the class weights, which all lines share), sa, sb, sw strides, n the line's length, k the
    number of lines in the vector; p is whatever belongs to the line.
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
    space = Space()

    @inline
    def largest(x, sx, n, k):
        best, i = spread(several, -inf), 0
        while i + W <= n:
            best = maximum_fast(load(several, x + i * size), best)
            i += W
        rest = spread(one, -inf)
        while i < n:
            rest = maximum_fast(select(first_lanes(one, n - i), load_n(one, x + i * size, n - i), -inf), rest)
            i += L
        return max(reduce_max(best), reduce_max(rest))

    def walk(term: Callable[..., Any], writes: bool) -> Any:
        @inline
        def function(a, sa, b, sb, w, sw, y, sy, n, k, p):
            sums, i = spread(several, 0.0), 0
            while i + W <= n:
                va = load(several, a + i * size)
                vb = load(several, b + i * size) if second else va
                vw = load(several, w + i * size) if weighted else va
                t = term(va, vb, vw, p)
                if writes:
                    store(several, y + i * size, t)
                sums = sums + t
                i += W
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
            return reduce_add(sums) + reduce_add(rest)
        return function

    terms = rows(elem).walk(_exp, False) if second or weighted else walk(_exp, False)

    @inline
    def sum_exp(x, sx, n, k):
        m, s, at = -inf, 0.0, 0
        while at < n:  # a block at a time, so that the second reading finds it in L1
            here, size_here = x + at * size, min(BLOCK, n - at)
            top = largest(here, sx, size_here, k)
            if top > m:
                s = s * reduce_max(exp_below(spread(compute, m - top)))
                m = top
            base = 0.0 if m == -inf else m
            s = s + terms(here, sx, 0, 0, 0, 0, 0, 0, size_here, k, base)
            at += BLOCK
        return m, s + (m - m)  # m - m: NaN if m is infinite

    @inline
    def log_scalar(s):
        return reduce_max(log(spread(compute, s)))

    @inline
    def get(address, k):
        return load_scalar(compute, address)

    @inline
    def put(address, value, k):
        store_scalar(compute, address, value)

    space.largest, space.sum_exp, space.walk, space.log, space.get, space.put = largest, sum_exp, walk, log_scalar, get, put
    return space


def columns(elem: Elem, vectors: int, second: bool = False, weighted: bool = False) -> Space:
    """Lines next to each other: ``vectors`` full vectors of them, or, if that is 1, the first k lanes of one."""
    full = vectors > 1
    lines, compute = wide(elem, vectors), wide(compute_elem(elem), vectors)
    space = Space()

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

    def walk(term: Callable[..., Any], writes: bool) -> Any:
        @inline
        def function(a, sa, b, sb, w, sw, y, sy, n, k, p):
            sums = spread(compute, 0.0)
            for j in range(n):
                va = at(lines, a + j * sa, k)
                vb = at(lines, b + j * sb, k) if second else va
                vw = spread(compute, load_scalar(elem, w + j * sw)) if weighted else va
                t = term(va, vb, vw, p)
                if writes:
                    write(lines, y + j * sy, t, k)
                sums = sums + t
            return sums
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

    space.largest, space.sum_exp, space.walk, space.log, space.get, space.put = largest, sum_exp, walk, log, get, put
    return space


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
    write_exp, scale = one.walk(_exp, True), one.walk(_times, True)
    write_scaled, shift = one.walk(_scaled_exp, True), one.walk(_minus_both, True)
    dot, total = two.walk(_product, False), one.walk(_itself, False)
    write_softmax_gradient, write_log_softmax_gradient = two.walk(_softmax_gradient, True), two.walk(_log_softmax_gradient, True)

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
    """This thread's share of outer · inner lines: many or few(r, o, i, k, args) for the k lines from r = o · inner + i on."""
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
