"""Batch, group and instance normalisation, as compiled. Imported only to build a kernel.

What shares a mean and a variance is a *unit*: a channel of a batch, or a group of channels of an image. As in pooling,
each kernel is written twice:

*along*: a unit is a number of *runs*, stretches of memory, each of one channel. A thread does a unit from beginning to
end, so that where it fits into the cache memory is read once.

*across*: the channels of a pixel lie next to each other. The channels' own moments are taken first, in parts of the
rows; they are put together to those of the units; then all rows are walked again.

The mean and the sum of squares about it are taken of blocks that stay in L1, in two passes; blocks are joined in float64
(Chan, Golub and LeVeque 1979). A mean is kept in two parts, so that x - mean is exact where x is near it however large
both are. Statistics and sums over channels are float64 in memory, parameters in the compute type; strides are in bytes.
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
    prefetch,
    reduce_add,
    select,
    spread,
    sqrt,
    store,
    store_n,
    store_scalar,
    stream,
    streamed,
    wide,
)
from .softmax_code import LINE

WIDTH = 4  # vectors that are worked on at once
BLOCK = 2048  # elements of a run that are read twice while they are in L1
SHORT = 1024  # bytes of a run up to which the backward fetches the next unit's: longer ones the hardware follows
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
    """sums(x, xs, y, ys, runs, n, m): (Σ f(x, y, m)[0], Σ f(x, y, m)[1]) over runs of n elements, xs and ys bytes apart, at most
    BLOCK of them in all; m is a number"""
    c = compute_elem(elem)
    several, c_several = wide(elem, WIDTH), wide(c, WIDTH)
    L, W, size = elem.lanes, elem.lanes * WIDTH, elem.size

    @inline
    def sums(x, xs, y, ys, runs, n, m):
        a, b = spread(c, 0.0), spread(c, 0.0)
        aa, bb = spread(c_several, 0.0), spread(c_several, 0.0)
        for _ in range(runs):
            i = 0
            while i + W <= n:
                u, v = f(load(several, x + i * size), load(several, y + i * size), m)
                aa, bb = aa + u, bb + v
                i += W
            while i + L <= n:
                u, v = f(load(elem, x + i * size), load(elem, y + i * size), m)
                a, b = a + u, b + v
                i += L
            if i < n:
                u, v = f(load_n(elem, x + i * size, n - i), load_n(elem, y + i * size, n - i), m)
                mask = first_lanes(c, n - i)
                a, b = a + select(mask, u, 0.0), b + select(mask, v, 0.0)
            x += xs
            y += ys
        return float64(reduce_add(aa)) + reduce_add(a), float64(reduce_add(bb)) + reduce_add(b)
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


@inline
def _pieces(runs, n, together):
    """How many runs, and elements of a run, are summed at once"""
    return max(1, BLOCK // n) if together else 1, min(n, BLOCK)


def _moments(elem: Elem) -> Any:
    """moments(x, xs, runs, n): (mean, sum of squares about it) of runs of n elements, xs bytes apart"""
    c, size = compute_elem(elem), elem.size
    total, deviations = _sums(elem, _value), _sums(elem, _deviation)

    @inline
    def moments(x, xs, runs, n):
        count, mean, m2 = 0, 0.0, 0.0
        many, piece = _pieces(runs, n, True)
        for r in range(0, runs, many):
            m = min(many, runs - r)
            for i in range(0, n, piece):
                j = min(piece, n - i)
                place, k = x + r * xs + i * size, m * j
                about = first_lane(spread(c, total(place, xs, place, xs, m, j, 0.0)[0] / k))
                d, dd = deviations(place, xs, place, xs, m, j, about)
                count, mean, m2 = joined(count, mean, m2, k, about + d / k, dd - d * d / k)
        return mean, m2
    return moments


# Along ----------------------------------------------------------------------------------------------------------------


@inline
def fetch(address, bytes):
    for line in range(0, bytes, LINE):
        prefetch(address + line)


def _putter(elem: Elem, masked: bool) -> Any:
    """put(address, value, n, past): the first n elements if ``masked``; ``past``: past the caches"""
    @inline
    def put(address, value, n, past):
        if masked:
            store_n(elem, address, value, n)
        elif past:
            stream(elem, address, value)
        else:
            store(elem, address, value)
    return put


def norm_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, outer, inner, runs, n, x, xo, xi, xr, y, yo, yi, yr, weight, bias, wi, wr, mean, var, so, given, given_var,
    lines, past, eps)

    Unit (o, i) has runs of n elements; its moments are number o · so + i; its run r has the channel i · wi + r · wr. ``given``,
    if not 0: the means, of units that are channels, which with the variances become mean and var; lines: then room for 3 · inner
    numbers of the compute type. past: whether y is stored past the caches.
    """
    elem = ELEMS[elem_name]
    c, moments = compute_elem(elem), _moments(elem)
    c_size = c.size

    def normalise(source: Elem, target: Elem, masked: bool) -> Any:
        put = _putter(source, masked)

        @inline
        def step(i, n, args):
            x, y, high, scale, shift, past = args
            v = load_n(source, x + i, n) if masked else load(source, x + i)
            put(y + i, fma(v - high, scale, shift), n, past)
        return step
    run = _over_run(elem, normalise)

    @inline
    def parameters(channel, mu, rstd, weight, bias):
        """(high, scale, shift): (x - high) · scale + shift is x normalised"""
        high = first_lane(spread(c, mu))
        scale = rstd * load_scalar(c, weight + channel * c_size) if weight else rstd
        return high, scale, (load_scalar(c, bias + channel * c_size) if bias else 0.0) - (mu - high) * scale

    @inline
    def settle(thread, threads, channels, weight, bias, mean, var, given, given_var, lines, eps):
        """What is known before: the moments, in float64, and all channels' lines"""
        for i in range(channels * thread // threads, channels * (thread + 1) // threads):
            mu, sigma2 = float64(load_scalar(c, given + i * c_size)), float64(load_scalar(c, given_var + i * c_size))
            store_scalar(FLOAT64, mean + i * 8, mu)
            store_scalar(FLOAT64, var + i * 8, sigma2)
            high, scale, shift = parameters(i, mu, inverse_deviation(sigma2, eps), weight, bias)
            line = lines + 3 * i * c_size
            store_scalar(c, line, high)
            store_scalar(c, line + c_size, scale)
            store_scalar(c, line + 2 * c_size, shift)

    @inline
    def body(thread, threads, outer, inner, runs, n, x, xo, xi, xr, y, yo, yi, yr, weight, bias, wi, wr, mean, var, so,
             given, lines, past, eps):
        units = outer * inner
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            o = unit // inner
            i = unit - o * inner
            source, target, at = x + o * xo + i * xi, y + o * yo + i * yi, (o * so + i) * 8
            mu, rstd = 0.0, 0.0
            if not given:
                mu, m2 = moments(source, xr, runs, n)
                sigma2 = m2 / (runs * n)
                store_scalar(FLOAT64, mean + at, mu)
                store_scalar(FLOAT64, var + at, sigma2)
                rstd = inverse_deviation(sigma2, eps)
            for r in range(runs):
                high, scale, shift = parameters(i * wi + r * wr, mu, rstd, weight, bias)
                if given:
                    line = lines + 3 * i * c_size
                    high, scale = load_scalar(c, line), float64(load_scalar(c, line + c_size))
                    shift = float64(load_scalar(c, line + 2 * c_size))
                run(n, (source + r * xr, target + r * yr, high, scale, shift, past))
        if past:
            streamed()

    def kernel(threads, outer, inner, runs, n, x, xo, xi, xr, y, yo, yi, yr, weight, bias, wi, wr, mean, var, so, given,
               given_var, lines, past, eps):
        if given:
            parallel(threads, settle, (inner, weight, bias, mean, var, given, given_var, lines, eps))
        parallel(threads, body, (outer, inner, runs, n, x, xo, xi, xr, y, yo, yi, yr, weight, bias, wi, wr, mean, var, so,
                                 given, lines, past, eps))
    return kernel


def norm_backward_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, outer, inner, runs, n, x, xo, xi, xr, g, go, gi, gr, y, yo, yi, yr, weight, wi, wr, mean, var, so,
    given, sums, past, eps)

    As in ``norm_along``, but that ``given`` only says whether the moments were. y: the gradient of x, from g, that of the output.
    sums: for each channel of a unit Σ g, then for each Σ g (x - mean) / deviation; number (o · inner + i) · runs + r, or
    o · inner + i where wr is 0: then all runs are one channel's.
    """
    elem = ELEMS[elem_name]
    c, products, size = compute_elem(elem), _sums(elem, _product), elem.size
    c_size = c.size

    def gradient(source: Elem, target: Elem, masked: bool) -> Any:
        put = _putter(source, masked)

        @inline
        def step(i, n, args):
            x, g, y, high, scale, slope, shift, past = args
            v = load_n(source, x + i, n) if masked else load(source, x + i)
            w = load_n(source, g + i, n) if masked else load(source, g + i)
            below = select(spread(target, slope) == 0.0, 0.0, v - high)  # of known moments; NaN · 0 would be NaN
            put(y + i, fma(w, scale, fma(below, slope, shift)), n, past)
        return step
    run = _over_run(elem, gradient)

    @inline
    def body(thread, threads, outer, inner, runs, n, x, xo, xi, xr, g, go, gi, gr, y, yo, yi, yr, weight, wi, wr, mean, var,
             so, given, sums, past, eps):
        units, own = outer * inner, runs if wr else 1
        many, piece = _pieces(runs, n, wr == 0)
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            o = unit // inner
            i = unit - o * inner
            source, grad, target = x + o * xo + i * xi, g + o * go + i * gi, y + o * yo + i * yi
            mu = load_scalar(FLOAT64, mean + (o * so + i) * 8)
            rstd = inverse_deviation(load_scalar(FLOAT64, var + (o * so + i) * 8), eps)
            high = first_lane(spread(c, mu))
            low, along, across, a, b = mu - high, 0.0, 0.0, 0.0, 0.0
            if n * size <= SHORT:
                for r in range(runs):
                    fetch(source + xi + r * xr, n * size)
                    fetch(grad + gi + r * gr, n * size)
                    fetch(target + yi + r * yr, n * size)
            for r in range(0, runs, many):
                m = min(many, runs - r)
                for j in range(0, n, piece):
                    p, q = products(grad + r * gr + j * size, gr, source + r * xr + j * size, xr, m, min(piece, n - j), high)
                    a, b = a + p, b + q
                if wr or r + m == runs:
                    b = (b - low * a) * rstd
                    at = (unit * own + (r if wr else 0)) * 8
                    store_scalar(FLOAT64, sums + at, a)
                    store_scalar(FLOAT64, sums + units * own * 8 + at, b)
                    factor = load_scalar(c, weight + (i * wi + r * wr) * c_size) if weight else 1.0
                    along, across, a, b = along + a * factor, across + b * factor, 0.0, 0.0
            slope = 0.0 if given else -rstd * rstd * across / (runs * n)
            shift = 0.0 if given else -rstd * along / (runs * n) - slope * low
            for r in range(runs):
                scale = rstd * load_scalar(c, weight + (i * wi + r * wr) * c_size) if weight else rstd
                run(n, (source + r * xr, grad + r * gr, target + r * yr, high, scale, slope, shift, past))
        if past:
            streamed()

    def kernel(threads, outer, inner, runs, n, x, xo, xi, xr, g, go, gi, gr, y, yo, yi, yr, weight, wi, wr, mean, var, so,
               given, sums, past, eps):
        parallel(threads, body, (outer, inner, runs, n, x, xo, xi, xr, g, go, gi, gr, y, yo, yi, yr, weight, wi, wr, mean,
                                 var, so, given, sums, past, eps))
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
def _ahead(i, n, channels, size, block):
    """How far from the elements i … i + n of a row those are that come after them, in it or in the next block of rows"""
    return n * size if i + n < channels else block - i * size


@inline
def _row_block(rows, parts, part, block, size):
    """(first, end) of a block of a part of the rows"""
    start, stop = rows * part // parts, rows * (part + 1) // parts
    return min(stop, start + block * size), min(stop, start + block * size + size)


def norm_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, images, rows, channels, groups, parts, x, xn, xr, y, yn, yr, weight, bias, mean, var, given,
    given_var, past, work, eps)

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
            place, ahead = x + i * size, _ahead(i, n, channels, size, rows * xr)
            for _r in range(rows):
                fetch(place + ahead, n * size)
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
        put = _putter(source, masked)

        @inline
        def get(address, n):
            return load_n(target, address, n) if masked else load(target, address)

        @inline
        def step(i, n, args):
            x, xr, y, yr, line, channels, past = args
            at, next_ = line + i * c_size, channels * c_size
            if not masked:
                fetch(x + xr + i * size, n * size)
                if not past:
                    fetch(y + yr + i * size, n * size)
            v = load_n(source, x + i * size, n) if masked else load(source, x + i * size)
            put(y + i * size, fma(v - get(at, n), get(at + next_, n), get(at + 2 * next_, n)), n, past)
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
    def apply(thread, threads, images, rows, channels, groups, x, xn, xr, y, yn, yr, past, lines):
        units = images * rows
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            image = unit // rows
            r = unit - image * rows
            line = lines + (image * 3 * channels * c_size if groups else 0)
            row(channels, (x + image * xn + r * xr, xr, y + image * yn + r * yr, yr, line, channels, past))
        if past:
            streamed()

    @inline
    def settle(thread, threads, images, rows, channels, groups, parts, weight, bias, mean, var, given, given_var,
               work, lines, eps):
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
            elif given:
                store_scalar(FLOAT64, mean + at, load_scalar(c, given + i * c_size))
                store_scalar(FLOAT64, var + at, load_scalar(c, given_var + i * c_size))
            else:
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
                scale = rstd * load_scalar(c, weight + j * c_size) if weight else rstd
                place = lines + (o * 3 * channels + j) * c_size
                store_scalar(c, place, high)
                store_scalar(c, place + channels * c_size, scale)
                shift = (load_scalar(c, bias + j * c_size) if bias else 0.0) - (mu - high) * scale
                store_scalar(c, place + 2 * channels * c_size, shift)

    def kernel(threads, images, rows, channels, groups, parts, x, xn, xr, y, yn, yr, weight, bias, mean, var, given,
               given_var, past, work, eps):
        lines = work + 2 * images * parts * channels * 8
        own = lines + 3 * images * channels * c_size
        if not given:
            parallel(threads, measure, (images, rows, channels, parts, x, xn, xr, work, own))
        parallel(threads, settle, (images, rows, channels, groups, parts, weight, bias, mean, var, given, given_var, work, lines,
                                   eps))
        parallel(threads, apply, (images, rows, channels, groups, x, xn, xr, y, yn, yr, past, lines))
    return kernel


def norm_backward_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, images, rows, channels, groups, parts, x, xn, xr, g, gn, gr, y, yn, yr, weight, mean, var, given,
    sums, past, work, eps)

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
            x_ahead, g_ahead = _ahead(i, n, channels, size, rows * xr), _ahead(i, n, channels, size, rows * gr)
            for _r in range(rows):
                fetch(place + x_ahead, n * size)
                fetch(grad + g_ahead, n * size)
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
        put = _putter(source, masked)

        @inline
        def get(address, n):
            return load_n(target, address, n) if masked else load(target, address)

        @inline
        def step(i, n, args):
            x, xr, g, gr, y, yr, line, channels, past = args
            at, next_ = line + i * c_size, channels * c_size
            if not masked:
                fetch(x + xr + i * size, n * size)
                fetch(g + gr + i * size, n * size)
                if not past:
                    fetch(y + yr + i * size, n * size)
            v = load_n(source, x + i * size, n) if masked else load(source, x + i * size)
            w = load_n(source, g + i * size, n) if masked else load(source, g + i * size)
            slope = get(at + 2 * next_, n)
            below = select(slope == 0.0, 0.0, v - get(at, n))  # of known moments; NaN · 0 would be NaN
            v = fma(w, get(at + next_, n), fma(below, slope, get(at + 3 * next_, n)))
            put(y + i * size, v, n, past)
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
    def apply(thread, threads, images, rows, channels, groups, x, xn, xr, g, gn, gr, y, yn, yr, past, lines):
        units = images * rows
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            image = unit // rows
            r = unit - image * rows
            row(channels, (x + image * xn + r * xr, xr, g + image * gn + r * gr, gr, y + image * yn + r * yr, yr,
                           lines + (image * 4 * channels * c_size if groups else 0), channels, past))
        if past:
            streamed()

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
                factor = load_scalar(c, weight + j * c_size) if weight else 1.0
                along, across = along + a * factor, across + b * factor
            m = float64(each * rows * together)
            slope = 0.0 if given else -rstd * rstd * across / m
            shift = 0.0 if given else -rstd * along / m - slope * low
            for j in range(i * each, (i + 1) * each):
                place = lines + (o * 4 * channels + j) * c_size
                store_scalar(c, place + channels * c_size, rstd * load_scalar(c, weight + j * c_size) if weight else rstd)
                store_scalar(c, place + 2 * channels * c_size, slope)
                store_scalar(c, place + 3 * channels * c_size, shift)

    @inline
    def line_means(thread, threads, outer, inner, each, channels, mean, lines):
        for o in range(outer * thread // threads, outer * (thread + 1) // threads):
            for j in range(channels):
                store_scalar(c, lines + (o * 4 * channels + j) * c_size, load_scalar(FLOAT64, mean + (o * inner + j // each) * 8))

    def kernel(threads, images, rows, channels, groups, parts, x, xn, xr, g, gn, gr, y, yn, yr, weight, mean, var, given, sums,
               past, work, eps):
        lines = work + 2 * images * parts * channels * 8
        own = lines + 4 * images * channels * c_size
        outer, inner, each = (images, groups, channels // groups) if groups else (1, channels, 1)
        parallel(threads if groups else 1, line_means, (outer, inner, each, channels, mean, lines))
        parallel(threads, measure, (images, rows, channels, groups, parts, x, xn, xr, g, gn, gr, work, lines, own))
        parallel(threads, settle, (images, rows, channels, groups, parts, weight, mean, var, given, sums, work, lines, eps))
        parallel(threads, apply, (images, rows, channels, groups, x, xn, xr, g, gn, gr, y, yn, yr, past, lines))
    return kernel
