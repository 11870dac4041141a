"""Layer and root-mean-square normalisation, as compiled. Imported only to build a kernel.

What shares moments is a row of elements next to each other. A thread takes a stretch of rows; a row is read once from memory
(its sum with the residual, its mean), and then from L1: the squares about the mean, the result. The mean is in two parts, as in
``norm_code``. Weights, biases and their gradients are in the compute type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core.types import float64

from .engine.region import parallel
from .engine.simd import (
    ELEMS,
    FLOAT64,
    Elem,
    compute_elem,
    first_lane,
    first_lanes,
    fma,
    inline,
    load,
    load_n,
    load_scalar,
    reduce_add,
    select,
    spread,
    store,
    store_n,
    store_scalar,
    stream,
    streamed,
    wide,
)
from .norm_code import BLOCK, WIDTH, fetch, inverse_deviation, over_elements


def _access(elem: Elem, masked: bool) -> tuple[Any, Any]:
    """get(address, n), put(address, value, n): a vector of elem, or the first n of one"""
    @inline
    def get(address, n):
        return load_n(elem, address, n) if masked else load(elem, address)

    @inline
    def put(address, value, n):
        if masked:
            store_n(elem, address, value, n)
        else:
            store(elem, address, value)
    return get, put


Step = Callable[[Elem, Elem, bool], Any]  # (in memory, in registers, masked): step(i, n, args), for n elements from number i on


def _fold(elem: Elem, term: Step, pair: bool = False) -> Any:
    """fold(n, args): (a, b) = term(i, n, args, a, b) along a row, summed over the lanes; without ``pair`` b stays 0

    Vectors are summed over BLOCK elements, blocks in float64.
    """
    c = compute_elem(elem)
    many = wide(c, WIDTH)
    L, W = elem.lanes, elem.lanes * WIDTH
    several, rest = term(wide(elem, WIDTH), many, False), term(elem, c, True)

    @inline
    def fold(n, args):
        p, q, i = float64(0.0), float64(0.0), 0
        while i + W <= n:
            a, b = spread(many, 0.0), spread(many, 0.0)
            end = min(n, i + BLOCK)
            while i + W <= end:
                a, b = several(i, W, args, a, b)
                i += W
            p += reduce_add(a)
            if pair:
                q += reduce_add(b)
        if i < n:
            a, b = spread(c, 0.0), spread(c, 0.0)
            while i < n:
                a, b = rest(i, min(L, n - i), args, a, b)
                i += L
            p += reduce_add(a)
            if pair:
                q += reduce_add(b)
        return p, q
    return fold


def rows(elem_name: str, centred: bool, added: bool) -> Callable[..., Any]:
    """kernel(threads, rows, n, x, xr, r, rr, s, sr, y, yr, weight, bias, stats, past, eps)

    y: the rows of x normalised, times weight, plus bias; ``past``: stored past the caches, and aligned. ``added``: r is first
    added to x, and the sum goes to s. stats: each row's mean if ``centred``, then for each what it was multiplied by. A row is
    read from memory, and its numbers or their squares are summed, while the row before is written.
    """
    elem = ELEMS[elem_name]
    c, size, c_size = compute_elem(elem), elem.size, compute_elem(elem).size

    def reading(source: Elem, target: Elem, masked: bool) -> Any:
        get, put = _access(source, masked)

        @inline
        def term(i, n, args, a, b):
            x, r, s = args
            v = get(x + i * size, n)
            if added:
                put(s + i * size, v + get(r + i * size, n), n)
                v = get(s + i * size, n)  # as the backward will see it
            return (a + v, b) if centred else (fma(v, v, a), b)
        return term

    def writing(source: Elem, target: Elem, masked: bool) -> Any:
        get, put = _access(source, masked)
        get_c, _ = _access(target, masked)
        read = reading(source, target, masked)

        @inline
        def term(i, n, args, a, b):
            x, y, weight, bias, high, scale, shift, next_, ahead, past = args
            if not masked:
                fetch(ahead[0] + i * size, n * size)
                if not past:
                    fetch(ahead[1] + i * size, n * size)
                if added:
                    fetch(ahead[2] + i * size, n * size)
                    fetch(ahead[3] + i * size, n * size)
            v = fma(get(x + i * size, n) - high, scale, shift)
            v = fma(v, get_c(weight + i * c_size, n), get_c(bias + i * c_size, n))
            if past and not masked:
                stream(source, y + i * size, v)
            else:
                put(y + i * size, v, n)
            return read(i, n, next_, a, b)
        return term

    def deviation(source: Elem, target: Elem, masked: bool) -> Any:
        get, _ = _access(source, masked)

        @inline
        def term(i, n, args, a, b):
            d = get(args[0] + i * size, n) - args[1]
            if masked:
                d = select(first_lanes(target, n), d, 0.0)
            return fma(d, d, a), b + d
        return term
    read, write, squares = _fold(elem, reading), _fold(elem, writing), _fold(elem, deviation, True)

    @inline
    def body(thread, threads, rows, n, x, xr, r, rr, s, sr, y, yr, weight, bias, stats, past, eps):
        first, end = rows * thread // threads, rows * (thread + 1) // threads
        if first < end:
            total = read(n, (x + first * xr, r + first * rr, s + first * sr))[0]
        each = 1.0 / n
        for row in range(first, end):
            here = s + row * sr if added else x + row * xr
            var, about, d = total * each, 0.0, 0.0
            if centred:  # the mean is about + d
                about = float64(first_lane(spread(c, var)))
                dd, d = squares(n, (here, first_lane(spread(c, about))))
                d *= each
                var = dd * each - d * d
                store_scalar(FLOAT64, stats + row * 8, about + d)
            scale = inverse_deviation(var, eps)
            store_scalar(FLOAT64, stats + (rows + row if centred else row) * 8, scale)
            next_ = min(row + 1, end - 1)
            into = y + row * yr
            next_row = (x + next_ * xr, r + next_ * rr, s + next_ * sr)
            ahead = (next_row[0] + xr, into + yr, next_row[1] + rr, next_row[2] + sr)
            total = write(n, (here, into, weight, bias, first_lane(spread(c, about)), scale, -d * scale, next_row, ahead,
                              past))[0]
        if past:
            streamed()

    def kernel(threads, rows, n, x, xr, r, rr, s, sr, y, yr, weight, bias, stats, past, eps):
        parallel(threads, body, (rows, n, x, xr, r, rr, s, sr, y, yr, weight, bias, stats, past, eps))
    return kernel


def rows_backward(elem_name: str, centred: bool) -> Callable[..., Any]:
    """kernel(threads, rows, n, g, gr, x, xr, m, mr, y, yr, weight, stats, sums, work, stretch, past)

    y: the gradient of x, from g, that of the output; m: if not 0, what is added to it; past: as above. sums: the gradients of
    weight, then of bias. work: a thread's room for 4 · n numbers: such sums over ``stretch`` rows, and over all of them: an error
    grows more slowly in two steps.
    """
    elem = ELEMS[elem_name]
    c, size, c_size = compute_elem(elem), elem.size, compute_elem(elem).size

    def product(source: Elem, target: Elem, masked: bool) -> Any:
        get, _ = _access(source, masked)
        get_c, _ = _access(target, masked)

        @inline
        def term(i, n, args, a, b):
            g, x, weight, high = args
            h = get(g + i * size, n) * get_c(weight + i * c_size, n)  # 0 beyond the row
            return fma(h, get(x + i * size, n) - high, a), b + h
        return term
    products = _fold(elem, product, centred)

    def result(source: Elem, target: Elem, masked: bool) -> Any:
        get, put = _access(source, masked)
        get_c, put_c = _access(target, masked)

        @inline
        def step(i, n, args):
            g, x, m, y, gr, xr, yr, weight, sums, size_sums, high, scale, shift, slope, base, past = args
            if not masked:
                fetch(g + gr + i * size, n * size)
                fetch(x + xr + i * size, n * size)
                if not past:
                    fetch(y + yr + i * size, n * size)
            d, h = get(x + i * size, n) - high, get(g + i * size, n)
            at = sums + i * c_size
            put_c(at, fma(h, fma(d, scale, shift), get_c(at, n)), n)
            put_c(at + size_sums, h + get_c(at + size_sums, n), n)
            v = fma(h * get_c(weight + i * c_size, n), scale, fma(d, slope, base))
            if m:
                v = v + get(m + i * size, n)
            if past and not masked:
                stream(source, y + i * size, v)
            else:
                put(y + i * size, v, n)
        return step
    differentiate = over_elements(elem, result)

    def moved(source: Elem, target: Elem, masked: bool) -> Any:
        get, put = _access(target, masked)

        @inline
        def step(i, n, args):
            source, sums = args
            put(sums + i * c_size, get(sums + i * c_size, n) + get(source + i * c_size, n), n)
            put(source + i * c_size, spread(target, 0.0), n)
        return step
    move = over_elements(c, moved)

    @inline
    def body(thread, threads, rows, n, g, gr, x, xr, m, mr, y, yr, weight, stats, work, stretch, past):
        own, line = work + thread * 4 * n * c_size, n * c_size
        done = 0
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            here, grad = x + row * xr, g + row * gr
            mean, scale = 0.0, load_scalar(FLOAT64, stats + row * 8)
            if centred:
                mean, scale = scale, load_scalar(FLOAT64, stats + (rows + row) * 8)
            high = first_lane(spread(c, mean))
            low = mean - high
            across, along = products(n, (grad, here, weight, high))
            across = (across - low * along) * scale
            slope = -scale * scale * across / n
            base = -scale * along / n - slope * low
            differentiate(n, (grad, here, m + row * mr if m else 0, y + row * yr, gr, xr, yr, weight, own, line, high, scale,
                                 -low * scale, slope, base, past))
            done += 1
            if done == stretch:
                move(2 * n, (own, own + 2 * line))
                done = 0
        move(2 * n, (own, own + 2 * line))
        if past:
            streamed()

    def kernel(threads, rows, n, g, gr, x, xr, m, mr, y, yr, weight, stats, sums, work, stretch, past):
        for i in range(4 * n * threads):
            store_scalar(c, work + i * c_size, 0.0)
        for i in range(2 * n):
            store_scalar(c, sums + i * c_size, 0.0)
        parallel(threads, body, (rows, n, g, gr, x, xr, m, mr, y, yr, weight, stats, work, stretch, past))
        for thread in range(threads):
            move(2 * n, (work + (thread * 4 + 2) * n * c_size, sums))
    return kernel
