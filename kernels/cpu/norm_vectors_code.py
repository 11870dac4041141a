"""Group normalisation of vectors (N, C), as compiled: a unit is a few elements next to each other, and there are many of them.

So each is done from beginning to end in registers' reach, and nothing is kept a channel. The mean is in two parts, as in
``norm_code``; parameters are in the compute type, statistics and sums over channels float64.
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
    load_scalar,
    reduce_add,
    select,
    spread,
    store_scalar,
)
from .norm_code import TERMS, inverse_deviation
from .norm_rows_code import _access


def _fold(elem: Elem, term: Callable[..., Any]) -> Any:
    """fold(n, args): (a, b) = term(i, n, args, a, b) along a unit, summed over the lanes"""
    c, L = compute_elem(elem), elem.lanes
    one, rest = term(elem, c, False), term(elem, c, True)

    @inline
    def fold(n, args):
        a, b, i = spread(c, 0.0), spread(c, 0.0), 0
        while i + L <= n:
            a, b = one(i, L, args, a, b)
            i += L
        if i < n:
            a, b = rest(i, n - i, args, a, b)
        return float64(reduce_add(a)), float64(reduce_add(b))
    return fold


def vectors(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, images, groups, each, x, xn, y, yn, weight, bias, mean, var, eps): images of groups of ``each`` elements"""
    elem = ELEMS[elem_name]
    c, size, c_size = compute_elem(elem), elem.size, compute_elem(elem).size

    def value(source: Elem, target: Elem, masked: bool) -> Any:
        get, _ = _access(source, masked)

        @inline
        def term(i, n, x, a, b):
            return a + get(x + i * size, n), b
        return term

    def deviation(source: Elem, target: Elem, masked: bool) -> Any:
        get, _ = _access(source, masked)

        @inline
        def term(i, n, args, a, b):
            d = get(args[0] + i * size, n) - args[1]
            if masked:
                d = select(first_lanes(target, n), d, 0.0)
            return a + d, fma(d, d, b)
        return term

    def normalise(source: Elem, target: Elem, masked: bool) -> Any:
        get, put = _access(source, masked)
        get_c, _ = _access(target, masked)

        @inline
        def term(i, n, args, a, b):
            x, y, weight, bias, high, scale, shift = args
            v = fma(get(x + i * size, n) - high, scale, shift)
            put(y + i * size, fma(v, get_c(weight + i * c_size, n), get_c(bias + i * c_size, n)), n)
            return a, b
        return term
    total, deviations, write = _fold(elem, value), _fold(elem, deviation), _fold(elem, normalise)

    @inline
    def body(thread, threads, images, groups, each, x, xn, y, yn, weight, bias, mean, var, eps):
        share = 1.0 / each
        for image in range(images * thread // threads, images * (thread + 1) // threads):
            for g in range(groups):
                place, at, parameter = x + image * xn + g * each * size, (image * groups + g) * 8, g * each * c_size
                about = first_lane(spread(c, total(each, place)[0] * share))
                d, dd = deviations(each, (place, about))
                d *= share
                sigma2 = dd * share - d * d
                store_scalar(FLOAT64, mean + at, about + d)
                store_scalar(FLOAT64, var + at, sigma2)
                scale = inverse_deviation(sigma2, eps)
                to = y + image * yn + g * each * size
                write(each, (place, to, weight + parameter, bias + parameter, about, scale, -d * scale))

    def kernel(threads, images, groups, each, x, xn, y, yn, weight, bias, mean, var, eps):
        parallel(threads, body, (images, groups, each, x, xn, y, yn, weight, bias, mean, var, eps))
    return kernel


def vectors_backward(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, images, groups, each, x, xn, g, gn, y, yn, weight, mean, var, sums, work, eps)

    y: the gradient of x, from g, that of the output. sums: for each channel Σ g, then for each Σ g (x - mean) / deviation. work:
    a thread's room for 2 · channels float64, then as many numbers of the compute type, sums over TERMS images.
    """
    elem = ELEMS[elem_name]
    c, size, c_size = compute_elem(elem), elem.size, compute_elem(elem).size

    def product(source: Elem, target: Elem, masked: bool) -> Any:
        get, _ = _access(source, masked)
        get_c, _ = _access(target, masked)

        @inline
        def term(i, n, args, a, b):
            x, g, weight, high = args
            h = get(g + i * size, n) * get_c(weight + i * c_size, n)  # 0 beyond the unit
            return a + h, fma(h, get(x + i * size, n) - high, b)
        return term

    def gradient(source: Elem, target: Elem, masked: bool) -> Any:
        get, put = _access(source, masked)
        get_c, put_c = _access(target, masked)

        @inline
        def term(i, n, args, a, b):
            x, g, y, weight, own, line, high, scale, base, slope, shift = args
            h, d, at = get(g + i * size, n), get(x + i * size, n) - high, own + i * c_size
            put_c(at, get_c(at, n) + h, n)
            put_c(at + line, fma(h, fma(d, scale, base), get_c(at + line, n)), n)
            put(y + i * size, fma(h * get_c(weight + i * c_size, n), scale, fma(d, slope, shift)), n)
            return a, b
        return term
    products, write = _fold(elem, product), _fold(elem, gradient)

    @inline
    def flush(n, own, total):
        for j in range(n):
            store_scalar(FLOAT64, total + j * 8, load_scalar(FLOAT64, total + j * 8) + load_scalar(c, own + j * c_size))
            store_scalar(c, own + j * c_size, 0.0)

    @inline
    def body(thread, threads, images, groups, each, x, xn, g, gn, y, yn, weight, mean, var, work, eps):
        channels, share = groups * each, 1.0 / each
        total = work + thread * 2 * channels * (8 + c_size)
        own, line = total + 2 * channels * 8, channels * c_size
        for j in range(2 * channels):
            store_scalar(FLOAT64, total + j * 8, 0.0)
            store_scalar(c, own + j * c_size, 0.0)
        first, end = images * thread // threads, images * (thread + 1) // threads
        for image in range(first, end):
            for group in range(groups):
                offset, k, at = group * each * size, group * each * c_size, (image * groups + group) * 8
                here, grad = x + image * xn + offset, g + image * gn + offset
                mu, rstd = load_scalar(FLOAT64, mean + at), inverse_deviation(load_scalar(FLOAT64, var + at), eps)
                high = first_lane(spread(c, mu))
                low = mu - high
                along, across = products(each, (here, grad, weight + k, high))
                slope = -rstd * rstd * rstd * (across - low * along) * share
                shift = -rstd * along * share - slope * low
                to = y + image * yn + offset
                write(each, (here, grad, to, weight + k, own + k, line, high, rstd, -low * rstd, slope, shift))
            if (image - first + 1) % TERMS == 0 or image == end - 1:
                flush(2 * channels, own, total)

    def kernel(threads, images, groups, each, x, xn, g, gn, y, yn, weight, mean, var, sums, work, eps):
        n = 2 * groups * each
        parallel(threads, body, (images, groups, each, x, xn, g, gn, y, yn, weight, mean, var, work, eps))
        for j in range(n):
            total = 0.0
            for thread in range(threads):
                total += load_scalar(FLOAT64, work + thread * n * (8 + c_size) + j * 8)
            store_scalar(FLOAT64, sums + j * 8, total)
    return kernel
