"""Batch, group and instance normalisation, as compiled. Imported only to build a kernel.

What shares a mean and a variance is a *unit*: a channel of a batch, or a group of channels of an image. As in pooling,
each kernel is written twice:

*along*: a unit is a number of *runs*, stretches of memory, each of one channel. A thread does a unit from beginning to
end, so that where it fits into the cache memory is read once.

*across*: the channels of a pixel lie next to each other. The channels' own moments are taken first, in parts of the
rows; they are put together to those of the units; then all rows are walked again.

The mean and the sum of squares about it are taken of blocks that stay in L1, in two passes; blocks are joined in float64
(Chan, Golub and LeVeque 1979). A mean is kept in two parts, so that x - mean is exact where x is near it however large
both are. Means, variances, weights, biases and sums over channels are float64 in memory; strides are in bytes.
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
    sqrt,
    store,
    store_n,
    store_scalar,
    wide,
)

WIDTH = 4  # vectors that are worked on at once
BLOCK = 2048  # elements of a run that are read twice while they are in L1
ROWS, TERMS = 256, 32  # rows whose moments, or products, are summed before they go to the total: the error grows more slowly


@inline
def joined(n, mean, m2, k, other, other_m2):
    """The moments (count, mean, sum of squares about it) of two sets together"""
    total = n + k
    d, share = other - mean, float64(k) / total
    return total, mean + d * share, m2 + other_m2 + d * d * share * n


@inline
def inverse_deviation(var, eps):
    return 1.0 / first_lane(sqrt(spread(FLOAT64, var + eps)))


def _over_run(elem: Elem, step: Callable[[Elem, Elem, bool], Any]) -> Any:
    """run(n, args): step at every offset of a run, several vectors, one, and the first n of one"""
    c = compute_elem(elem)
    L, W, size = elem.lanes, elem.lanes * WIDTH, elem.size
    several, one = step(wide(elem, WIDTH), wide(c, WIDTH), False), step(elem, c, False)
    rest = step(elem, c, True)

    @inline
    def run(n, args):
        i = 0
        while i + W <= n:
            several(i * size, W, args)
            i += W
        while i + L <= n:
            one(i * size, L, args)
            i += L
        if i < n and n >= L:  # overlaps the one before it: on AVX2 a masked store costs as much as ten others
            one((n - L) * size, L, args)
        elif i < n:
            rest(0, n, args)
    return run


def _sums(elem: Elem, f: Callable[..., Any]) -> Any:
    """sums(x, y, n, m): (Σ f(x, y, m)[0], Σ f(x, y, m)[1]) over at most BLOCK elements; m is a number"""
    c = compute_elem(elem)
    several, c_several = wide(elem, WIDTH), wide(c, WIDTH)
    L, W, size = elem.lanes, elem.lanes * WIDTH, elem.size

    @inline
    def sums(x, y, n, m):
        a, b = spread(c, 0.0), spread(c, 0.0)
        first, second, i = float64(0.0), float64(0.0), 0
        if n >= W:
            aa, bb = spread(c_several, 0.0), spread(c_several, 0.0)
            while i + W <= n:
                u, v = f(load(several, x + i * size), load(several, y + i * size), m)
                aa, bb = aa + u, bb + v
                i += W
            first, second = float64(reduce_add(aa)), float64(reduce_add(bb))
        while i < n:
            inside = min(L, n - i)
            u, v = f(load_n(elem, x + i * size, inside), load_n(elem, y + i * size, inside), m)
            mask = first_lanes(c, inside)
            a, b = a + select(mask, u, 0.0), b + select(mask, v, 0.0)
            i += L
        return first + reduce_add(a), second + reduce_add(b)
    return sums


@inline
def _value(x, y, m):
    return x, x


@inline
def _deviation(x, y, m):
    d = x - m
    return d, d * d


@inline
def _product(g, x, m):
    return g, g * (x - m)


def _moments(elem: Elem) -> Any:
    """moments(x, n): (mean, sum of squares about it) of a run"""
    c, size = compute_elem(elem), elem.size
    total, deviations = _sums(elem, _value), _sums(elem, _deviation)

    @inline
    def moments(x, n):
        count, mean, m2 = 0, 0.0, 0.0
        while count < n:
            k = min(BLOCK, n - count)
            place = x + count * size
            about = first_lane(spread(c, total(place, place, k, 0.0)[0] / k))
            d, dd = deviations(place, place, k, about)
            count, mean, m2 = joined(count, mean, m2, k, about + d / k, dd - d * d / k)
        return mean, m2
    return moments


# Along ----------------------------------------------------------------------------------------------------------------


def norm_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, outer, inner, runs, n, x, xo, xi, xr, y, yo, yi, yr, weight, bias, wi, wr, mean, var, so, given,
    eps)

    Unit (o, i) has runs of n elements; its moments are number o · so + i, and are written unless they are ``given``; its
    run r has the channel i · wi + r · wr.
    """
    elem = ELEMS[elem_name]
    c, moments = compute_elem(elem), _moments(elem)

    def normalise(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def step(i, n, args):
            x, y, high, scale, shift = args
            v = load_n(source, x + i, n) if masked else load(source, x + i)
            v = fma(v - high, scale, shift)
            if masked:
                store_n(source, y + i, v, n)
            else:
                store(source, y + i, v)
        return step
    run = _over_run(elem, normalise)

    @inline
    def body(thread, threads, outer, inner, runs, n, x, xo, xi, xr, y, yo, yi, yr, weight, bias, wi, wr, mean, var, so,
             given, eps):
        units = outer * inner
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            o, i = unit // inner, unit % inner
            source, target, at = x + o * xo + i * xi, y + o * yo + i * yi, (o * so + i) * 8
            if given:
                mu, sigma2 = load_scalar(FLOAT64, mean + at), load_scalar(FLOAT64, var + at)
            else:
                count, mu, m2 = 0, 0.0, 0.0
                for r in range(runs):
                    a, b = moments(source + r * xr, n)
                    count, mu, m2 = joined(count, mu, m2, n, a, b)
                sigma2 = m2 / count
                store_scalar(FLOAT64, mean + at, mu)
                store_scalar(FLOAT64, var + at, sigma2)
            rstd = inverse_deviation(sigma2, eps)
            high = first_lane(spread(c, mu))
            for r in range(runs):
                channel = (i * wi + r * wr) * 8
                scale = rstd * load_scalar(FLOAT64, weight + channel) if weight else rstd
                shift = (load_scalar(FLOAT64, bias + channel) if bias else 0.0) - (mu - high) * scale
                run(n, (source + r * xr, target + r * yr, high, scale, shift))

    def kernel(threads, outer, inner, runs, n, x, xo, xi, xr, y, yo, yi, yr, weight, bias, wi, wr, mean, var, so, given, eps):
        parallel(threads, body, (outer, inner, runs, n, x, xo, xi, xr, y, yo, yi, yr, weight, bias, wi, wr, mean, var, so,
                                 given, eps))
    return kernel


def norm_backward_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, outer, inner, runs, n, x, xo, xi, xr, g, go, gi, gr, y, yo, yi, yr, weight, wi, wr, mean, var, so,
    given, sums, eps)

    As in ``norm_along``. y: the gradient of x, from g, that of the output. sums: for each run Σ g, then for each
    Σ g (x - mean) / deviation, run (o, i, r) being number (o · inner + i) · runs + r.
    """
    elem = ELEMS[elem_name]
    c, products, size = compute_elem(elem), _sums(elem, _product), elem.size

    def gradient(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def step(i, n, args):
            x, g, y, high, scale, slope, shift = args
            v = load_n(source, x + i, n) if masked else load(source, x + i)
            w = load_n(source, g + i, n) if masked else load(source, g + i)
            v = fma(w, scale, fma(v - high, slope, shift))
            if masked:
                store_n(source, y + i, v, n)
            else:
                store(source, y + i, v)
        return step
    run = _over_run(elem, gradient)

    @inline
    def body(thread, threads, outer, inner, runs, n, x, xo, xi, xr, g, go, gi, gr, y, yo, yi, yr, weight, wi, wr, mean, var,
             so, given, sums, eps):
        units = outer * inner
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            o, i = unit // inner, unit % inner
            source, grad, target = x + o * xo + i * xi, g + o * go + i * gi, y + o * yo + i * yi
            mu = load_scalar(FLOAT64, mean + (o * so + i) * 8)
            rstd = inverse_deviation(load_scalar(FLOAT64, var + (o * so + i) * 8), eps)
            high = first_lane(spread(c, mu))
            low, along, across = mu - high, 0.0, 0.0
            for r in range(runs):
                a, b, done = 0.0, 0.0, 0
                while done < n:
                    k = min(BLOCK, n - done)
                    p, q = products(grad + r * gr + done * size, source + r * xr + done * size, k, high)
                    a, b = a + p, b + q
                    done += k
                b = (b - low * a) * rstd
                at = (unit * runs + r) * 8
                store_scalar(FLOAT64, sums + at, a)
                store_scalar(FLOAT64, sums + units * runs * 8 + at, b)
                factor = load_scalar(FLOAT64, weight + (i * wi + r * wr) * 8) if weight else 1.0
                along, across = along + a * factor, across + b * factor
            slope = 0.0 if given else -rstd * rstd * across / (runs * n)
            shift = 0.0 if given else -rstd * along / (runs * n) - slope * low
            for r in range(runs):
                scale = rstd * load_scalar(FLOAT64, weight + (i * wi + r * wr) * 8) if weight else rstd
                run(n, (source + r * xr, grad + r * gr, target + r * yr, high, scale, slope, shift))

    def kernel(threads, outer, inner, runs, n, x, xo, xi, xr, g, go, gi, gr, y, yo, yi, yr, weight, wi, wr, mean, var, so,
               given, sums, eps):
        parallel(threads, body, (outer, inner, runs, n, x, xo, xi, xr, g, go, gi, gr, y, yo, yi, yr, weight, wi, wr, mean,
                                 var, so, given, sums, eps))
    return kernel


# Across ---------------------------------------------------------------------------------------------------------------


def over_elements(elem: Elem, step: Callable[[Elem, Elem, bool], Any]) -> Any:
    """run(n, args): step(first element, how many, args) along a row: several vectors, one, and the first few of one"""
    c = compute_elem(elem)
    L, W = elem.lanes, elem.lanes * WIDTH
    several, one, rest = step(wide(elem, WIDTH), wide(c, WIDTH), False), step(elem, c, False), step(elem, c, True)

    @inline
    def run(n, args):
        i = 0
        while i + W <= n:
            several(i, W, args)
            i += W
        while i + L <= n:
            one(i, L, args)
            i += L
        if i < n:
            rest(i, n - i, args)
    return run


@inline
def _row_block(rows, parts, part, block, size):
    """(first, end) of a block of a part of the rows"""
    start, stop = rows * part // parts, rows * (part + 1) // parts
    return min(stop, start + block * size), min(stop, start + block * size + size)


def norm_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, images, rows, channels, groups, parts, x, xn, xr, y, yn, yr, weight, bias, mean, var, given, work,
    eps)

    rows of channels; groups: units of an image; 0: its channels are units, and with all other images. parts: into how
    many the rows of an image are cut. work: room for 2 · images · parts · channels float64, then for 3 · images ·
    channels and a thread's 3 · channels numbers of the compute type.
    """
    elem = ELEMS[elem_name]
    c = compute_elem(elem)
    size, c_size = elem.size, c.size

    def moments(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def step(i, n, args):
            """Of a block of rows: the sum, about which number it has been taken, and the sum of squares"""
            x, xr, rows, line, channels = args
            total = spread(target, 0.0)
            place = x + i * size
            for _r in range(rows):
                total = total + (load_n(source, place, n) if masked else load(source, place))
                place += xr
            about = total / float(rows)
            d, dd, place = spread(target, 0.0), spread(target, 0.0), x + i * size
            for _r in range(rows):
                v = (load_n(source, place, n) if masked else load(source, place)) - about
                d, dd = d + v, fma(v, v, dd)
                place += xr
            at = line + i * c_size
            if masked:
                store_n(target, at, about, n)
                store_n(target, at + channels * c_size, d, n)
                store_n(target, at + 2 * channels * c_size, dd, n)
            else:
                store(target, at, about)
                store(target, at + channels * c_size, d)
                store(target, at + 2 * channels * c_size, dd)
        return step
    block_moments = over_elements(elem, moments)

    def normalise(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def step(i, n, args):
            x, y, line, channels = args
            at = line + i * c_size
            v = load_n(source, x + i * size, n) if masked else load(source, x + i * size)
            if masked:
                high, scale = load_n(target, at, n), load_n(target, at + channels * c_size, n)
                store_n(source, y + i * size, fma(v - high, scale, load_n(target, at + 2 * channels * c_size, n)), n)
            else:
                high, scale = load(target, at), load(target, at + channels * c_size)
                store(source, y + i * size, fma(v - high, scale, load(target, at + 2 * channels * c_size)))
        return step
    row = over_elements(elem, normalise)

    @inline
    def measure(thread, threads, images, rows, channels, parts, x, xn, xr, work, lines):
        """The moments of each part's channels"""
        line, units = lines + thread * 3 * channels * c_size, images * parts
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            image, part = unit // parts, unit % parts
            mean, m2 = work + 2 * unit * channels * 8, work + (2 * unit + 1) * channels * 8
            count, block = 0, 0
            first, end = _row_block(rows, parts, part, block, ROWS)
            while first < end:
                k = end - first
                block_moments(channels, (x + image * xn + first * xr, xr, k, line, channels))
                share = 1.0 / k
                for j in range(channels):
                    at = line + j * c_size
                    d = float64(load_scalar(c, at + channels * c_size))
                    a, b = load_scalar(c, at) + d * share, load_scalar(c, at + 2 * channels * c_size) - d * d * share
                    if count:
                        _, a, b = joined(count, load_scalar(FLOAT64, mean + j * 8), load_scalar(FLOAT64, m2 + j * 8), k, a, b)
                    store_scalar(FLOAT64, mean + j * 8, a)
                    store_scalar(FLOAT64, m2 + j * 8, b)
                count += k
                block += 1
                first, end = _row_block(rows, parts, part, block, ROWS)

    @inline
    def apply(thread, threads, images, rows, channels, groups, x, xn, xr, y, yn, yr, lines):
        units = images * rows
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            image, r = unit // rows, unit % rows
            line = lines + (image * 3 * channels * c_size if groups else 0)
            row(channels, (x + image * xn + r * xr, y + image * yn + r * yr, line, channels))

    @inline
    def settle(thread, threads, images, rows, channels, groups, parts, weight, bias, mean, var, given, work, lines, eps):
        """Each unit's moments, and its channels' lines"""
        inner, each = (groups, channels // groups) if groups else (channels, 1)
        together = 1 if groups else images  # images of a unit
        units = images // together * inner
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            o, i, at = unit // inner, unit % inner, unit * 8
            if groups and parts == 1:  # channels of as many rows each: without a division for each
                place, mu, m2 = work + (2 * o * channels + i * each) * 8, 0.0, 0.0
                for j in range(each):
                    mu += load_scalar(FLOAT64, place + j * 8)
                mu /= each
                for j in range(each):
                    d = load_scalar(FLOAT64, place + j * 8) - mu
                    m2 += load_scalar(FLOAT64, place + (channels + j) * 8) + rows * d * d
                store_scalar(FLOAT64, mean + at, mu)
                store_scalar(FLOAT64, var + at, m2 / (each * rows))
            elif not given:
                count, mu, m2 = 0, 0.0, 0.0
                for p in range(o * parts, (o + together) * parts):
                    k = rows * (p % parts + 1) // parts - rows * (p % parts) // parts
                    for j in range(i * each, (i + 1) * each):
                        if k:
                            a = load_scalar(FLOAT64, work + (2 * p * channels + j) * 8)
                            b = load_scalar(FLOAT64, work + ((2 * p + 1) * channels + j) * 8)
                            count, mu, m2 = joined(count, mu, m2, k, a, b)
                store_scalar(FLOAT64, mean + at, mu)
                store_scalar(FLOAT64, var + at, m2 / count)
            mu = load_scalar(FLOAT64, mean + at)
            rstd = inverse_deviation(load_scalar(FLOAT64, var + at), eps)
            high = first_lane(spread(c, mu))
            for j in range(i * each, (i + 1) * each):
                scale = rstd * load_scalar(FLOAT64, weight + j * 8) if weight else rstd
                place = lines + (o * 3 * channels + j) * c_size
                store_scalar(c, place, high)
                store_scalar(c, place + channels * c_size, scale)
                shift = (load_scalar(FLOAT64, bias + j * 8) if bias else 0.0) - (mu - high) * scale
                store_scalar(c, place + 2 * channels * c_size, shift)

    def kernel(threads, images, rows, channels, groups, parts, x, xn, xr, y, yn, yr, weight, bias, mean, var, given, work, eps):
        lines = work + 2 * images * parts * channels * 8
        own = lines + 3 * images * channels * c_size
        if not given:
            parallel(threads, measure, (images, rows, channels, parts, x, xn, xr, work, own))
        parallel(threads, settle, (images, rows, channels, groups, parts, weight, bias, mean, var, given, work, lines, eps))
        parallel(threads, apply, (images, rows, channels, groups, x, xn, xr, y, yn, yr, lines))
    return kernel


def norm_backward_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, images, rows, channels, groups, parts, x, xn, xr, g, gn, gr, y, yn, yr, weight, mean, var, given,
    sums, work, eps)

    As in ``norm_across``; y: the gradient of x, from g, that of the output. sums: Σ g of each image's channels (of all
    images' if groups is 0), then Σ g (x - mean) / deviation. work: its last two rooms are 4 · and not 3.
    """
    elem = ELEMS[elem_name]
    c = compute_elem(elem)
    size, c_size = elem.size, c.size

    def products(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def step(i, n, args):
            x, xr, g, gr, rows, line, own, channels = args
            a, b = spread(target, 0.0), spread(target, 0.0)
            high = load_n(target, line + i * c_size, n) if masked else load(target, line + i * c_size)
            place, grad = x + i * size, g + i * size
            for _r in range(rows):
                v = load_n(source, place, n) if masked else load(source, place)
                w = load_n(source, grad, n) if masked else load(source, grad)
                a, b = a + w, fma(w, v - high, b)
                place += xr
                grad += gr
            if masked:
                store_n(target, own + i * c_size, a, n)
                store_n(target, own + (channels + i) * c_size, b, n)
            else:
                store(target, own + i * c_size, a)
                store(target, own + (channels + i) * c_size, b)
        return step
    block_products = over_elements(elem, products)

    def gradient(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def get(address, n):
            return load_n(target, address, n) if masked else load(target, address)

        @inline
        def step(i, n, args):
            x, g, y, line, channels = args
            at, next_ = line + i * c_size, channels * c_size
            v = load_n(source, x + i * size, n) if masked else load(source, x + i * size)
            w = load_n(source, g + i * size, n) if masked else load(source, g + i * size)
            v = fma(w, get(at + next_, n), fma(v - get(at, n), get(at + 2 * next_, n), get(at + 3 * next_, n)))
            if masked:
                store_n(source, y + i * size, v, n)
            else:
                store(source, y + i * size, v)
        return step
    row = over_elements(elem, gradient)

    @inline
    def measure(thread, threads, images, rows, channels, groups, parts, x, xn, xr, g, gn, gr, work, lines, owns):
        own, units = owns + thread * 4 * channels * c_size, images * parts
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            image, part, block = unit // parts, unit % parts, 0
            line = lines + (image * 4 * channels * c_size if groups else 0)
            for j in range(2 * channels):
                store_scalar(FLOAT64, work + (2 * unit * channels + j) * 8, 0.0)
            first, end = _row_block(rows, parts, part, block, TERMS)
            while first < end:
                block_products(channels, (x + image * xn + first * xr, xr, g + image * gn + first * gr, gr, end - first, line,
                                          own, channels))
                for j in range(2 * channels):
                    at = work + (2 * unit * channels + j) * 8
                    store_scalar(FLOAT64, at, load_scalar(FLOAT64, at) + load_scalar(c, own + j * c_size))
                block += 1
                first, end = _row_block(rows, parts, part, block, TERMS)

    @inline
    def apply(thread, threads, images, rows, channels, groups, x, xn, xr, g, gn, gr, y, yn, yr, lines):
        units = images * rows
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            image, r = unit // rows, unit % rows
            row(channels, (x + image * xn + r * xr, g + image * gn + r * gr, y + image * yn + r * yr,
                           lines + (image * 4 * channels * c_size if groups else 0), channels))

    @inline
    def settle(thread, threads, images, rows, channels, groups, parts, weight, mean, var, given, sums, work, lines, eps):
        """Each unit's sums, and its channels' lines"""
        outer, inner, each = (images, groups, channels // groups) if groups else (1, channels, 1)
        together = images // outer
        units = outer * inner
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            o, i = unit // inner, unit % inner
            mu = load_scalar(FLOAT64, mean + unit * 8)
            rstd = inverse_deviation(load_scalar(FLOAT64, var + unit * 8), eps)
            high = first_lane(spread(c, mu))
            low, along, across = mu - high, 0.0, 0.0
            for j in range(i * each, (i + 1) * each):
                a, b = 0.0, 0.0
                for p in range(o * parts, (o + together) * parts):
                    a += load_scalar(FLOAT64, work + (2 * p * channels + j) * 8)
                    b += load_scalar(FLOAT64, work + ((2 * p + 1) * channels + j) * 8)
                b = (b - low * a) * rstd
                store_scalar(FLOAT64, sums + (o * channels + j) * 8, a)
                store_scalar(FLOAT64, sums + ((outer + o) * channels + j) * 8, b)
                factor = load_scalar(FLOAT64, weight + j * 8) if weight else 1.0
                along, across = along + a * factor, across + b * factor
            m = float64(each * rows * together)
            slope = 0.0 if given else -rstd * rstd * across / m
            shift = 0.0 if given else -rstd * along / m - slope * low
            for j in range(i * each, (i + 1) * each):
                place = lines + (o * 4 * channels + j) * c_size
                store_scalar(c, place + channels * c_size, rstd * load_scalar(FLOAT64, weight + j * 8) if weight else rstd)
                store_scalar(c, place + 2 * channels * c_size, slope)
                store_scalar(c, place + 3 * channels * c_size, shift)

    @inline
    def line_means(thread, threads, outer, inner, each, channels, mean, lines):
        for o in range(outer * thread // threads, outer * (thread + 1) // threads):
            for j in range(channels):
                store_scalar(c, lines + (o * 4 * channels + j) * c_size, load_scalar(FLOAT64, mean + (o * inner + j // each) * 8))

    def kernel(threads, images, rows, channels, groups, parts, x, xn, xr, g, gn, gr, y, yn, yr, weight, mean, var, given, sums,
               work, eps):
        lines = work + 2 * images * parts * channels * 8
        own = lines + 4 * images * channels * c_size
        outer, inner, each = (images, groups, channels // groups) if groups else (1, channels, 1)
        parallel(threads if groups else 1, line_means, (outer, inner, each, channels, mean, lines))
        parallel(threads, measure, (images, rows, channels, groups, parts, x, xn, xr, g, gn, gr, work, lines, own))
        parallel(threads, settle, (images, rows, channels, groups, parts, weight, mean, var, given, sums, work, lines, eps))
        parallel(threads, apply, (images, rows, channels, groups, x, xn, xr, g, gn, gr, y, yn, yr, lines))
    return kernel
