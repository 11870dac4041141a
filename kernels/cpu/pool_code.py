"""Pooling, as compiled. Imported only to build a kernel.

Every pooling is three-dimensional: a missing dimension has size 1. A kernel finds sizes, strides and windows in the
*geometry*, an array of int64 (``Slot`` says what lies where; the host fills it), and is written twice, for the two
ways that images lie:

*along*: the pixels of a row lie next to each other (N, C, D, H, W). All rows that a window covers are first reduced to
one, vector by vector, in a buffer that has the padding at its ends; then the windows are reduced along that row. So
neither loop asks where the image ends, and a k × k window costs k + k operations instead of k · k.

*across*: the channels of a pixel lie next to each other (N, D, H, W, C): a vector holds channels and walks the window.

Where the maximum is: torch takes the first of equal ones in row-major order, and the last NaN if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

from .engine.region import parallel
from .engine.simd import (
    ELEMS,
    INT32,
    INT64,
    Elem,
    compute_elem,
    even_lanes,
    first_lanes,
    inline,
    iota_like,
    load,
    load_n,
    load_scalar,
    load_steps,
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
from .pool_slots import (
    ADAPTIVE,
    BLOCK,
    DILATION,
    DIVISOR,
    IN,
    INCLUDE_PAD,
    INDICES,
    OUT,
    OWN,
    PAD,
    ROOM,
    SIZE,
    STRIDE,
    WHOLE,
    C,
    N,
    X,
    Y,
)

LINE = 64  # bytes
WIDTH = 4  # vectors that are worked on at once
FEW = 6  # taps up to which a vector adds to all of a window; with more each lane adds to its own
CHAIN = 64  # of them that are added one to another before they go to the total: the error grows more slowly


@inline
def at(g, slot):
    return load_scalar(INT64, g + 8 * slot)


@inline
def window(g, d, o):
    """(first, taps, count) of output o in dimension d: what of its window is inside, and what an average divides by"""
    n = at(g, IN + d)
    if at(g, ADAPTIVE):
        outputs = at(g, OUT + d)
        first = o * n // outputs
        taps = ((o + 1) * n + outputs - 1) // outputs - first
        return first, taps, taps
    size, pad, step = at(g, SIZE + d), at(g, PAD + d), at(g, DILATION + d)
    low = o * at(g, STRIDE + d) - pad
    skip, end = max(0, -low), n - low
    if step > 1:
        skip, end = (skip + step - 1) // step, (end + step - 1) // step
    taps = max(0, min(size, end) - skip)
    return low + skip * step, taps, min(size, n + pad - low) if at(g, INCLUDE_PAD) else taps


@inline
def over(thread, threads, units):
    """What of the units is this thread's: (first, end)"""
    return units * thread // threads, units * (thread + 1) // threads


@inline
def plane_of(g, first, base, unit):
    """The address of the unit's plane, unit = n · C + c, in the tensor whose strides start at slot ``first``"""
    channels = at(g, C)
    return base + unit // channels * at(g, first) + unit % channels * at(g, first + 1)


# What is done to a window ---------------------------------------------------------------------------------------------


class Combine(NamedTuple):
    """A reduction: of two vectors, of a vector's lanes."""

    nothing: float
    both: Any
    lanes: Any


@inline
def _larger(a, b):
    """The larger, or a NaN if there is one"""
    return select(b != b, b, maximum_fast(b, a))


@inline
def _sum(a, b):
    return a + b


MAXIMUM = Combine(-inf, _larger, reduce_max)
SUM = Combine(0.0, _sum, reduce_add)


@inline
def beyond(x, j, v, i):
    """Whether value x at j is the maximum, rather than v at i"""
    return (x > v) | ((x == v) & (j < i)) | ((x != x) & ((v == v) | (j > i)))


def fill(elem: Elem) -> Any:
    """fill(address, n, x)"""
    L, size = elem.lanes, elem.size

    @inline
    def run(address, n, x):
        value, i = spread(elem, x), 0
        while i + L <= n:
            store(elem, address + i * size, value)
            i += L
        store_n(elem, address + i * size, value, n - i)
    return run


def copy(source: Elem, target: Elem, add: bool = False) -> Any:
    """copy(from, to, n): to = from, or to += from"""
    L, a, b = source.lanes, source.size, target.size

    @inline
    def run(x, y, n):
        i = 0
        while i + L <= n:
            value = load(source, x + i * a)
            store(target, y + i * b, value + load(target, y + i * b) if add else value)
            i += L
        if i < n:
            value = load_n(source, x + i * a, n - i)
            store_n(target, y + i * b, value + load_n(target, y + i * b, n - i) if add else value, n - i)
    return run


def whole_run(elem: Elem, combine: Combine) -> Any:
    """whole_run(address, n): the reduction of n elements next to each other"""
    L, size = elem.lanes, elem.size
    W = L * WIDTH
    nothing, both, lanes = combine.nothing, combine.both, combine.lanes

    @inline
    def run(address, n):
        total, i = spread(elem, nothing), 0
        while i + W <= n:
            stop = min(n, i + W * CHAIN)
            a = spread(elem, nothing)
            b, c, d = a, a, a
            while i + W <= stop:
                place = address + i * size
                a, b = both(a, load(elem, place)), both(b, load(elem, place + L * size))
                c, d = both(c, load(elem, place + 2 * L * size)), both(d, load(elem, place + 3 * L * size))
                i += W
            total = both(total, both(both(a, b), both(c, d)))
        while i + L <= n:
            total = both(total, load(elem, address + i * size))
            i += L
        if i < n:
            total = both(total, select(first_lanes(elem, n - i), load_n(elem, address + i * size, n - i), nothing))
        return lanes(total)
    return run


@inline
def first_row(g, unit, channels):
    """The place of a row of the output, counted through all planes: (n, c, od, oh)"""
    depth, height = at(g, OUT), at(g, OUT + 1)
    plane = unit // height // depth
    return plane // channels, plane % channels, unit // height % depth, unit % height


@inline
def next_row(g, channels, n, c, d, h):
    h += 1
    if h == at(g, OUT + 1):
        h = 0
        d += 1
        if d == at(g, OUT):
            d = 0
            c += 1
            if c == channels:
                c = 0
                n += 1
    return n, c, d, h


@inline
def row_of(g, first, base, n, c, d, h):
    """The address of a row in the tensor whose strides start at slot ``first``"""
    return base + n * at(g, first) + c * at(g, first + 1) + d * at(g, first + 2) + h * at(g, first + 3)


# Along ----------------------------------------------------------------------------------------------------------------

# A row's last vector overlaps the one before it, where the row is at least as long as a vector: on AVX2 a masked store
# costs as much as ten others.


def pool_along(elem_name: str, average: bool) -> Callable[..., Any]:
    """kernel(threads, x, y, geometry, scratch)"""
    elem = ELEMS[elem_name]
    c_elem = compute_elem(elem)
    combine = SUM if average else MAXIMUM
    nothing, both = combine.nothing, combine.both
    L, W, size, c_size = elem.lanes, elem.lanes * WIDTH, elem.size, c_elem.size
    run_input, run_buffer, fill_row = whole_run(elem, combine), whole_run(c_elem, combine), fill(c_elem)

    def column(vectors: int, masked: bool) -> Any:
        source, target = wide(elem, vectors), wide(c_elem, vectors)

        @inline
        def reduce(x, xd, xh, dt, ht, ahead, y, n):
            """y = the reduction of dt · ht rows; those that the next output row adds are fetched"""
            total = spread(target, nothing)
            for d in range(dt):
                row = x + d * xd
                for _h in range(ht):
                    if vectors > 1:
                        prefetch(row + ahead)
                        prefetch(row + ahead + LINE)
                    total = both(total, load_n(source, row, n) if masked else load(source, row))
                    row += xh
            store(target, y, select(first_lanes(target, n), total, nothing) if masked else total)
        return reduce
    column_several, column_one, column_rest = column(WIDTH, False), column(1, False), column(1, True)

    @inline
    def body(thread, threads, x, y, g, scratch):
        w_in, w_out, k, stride, pad = at(g, IN + 2), at(g, OUT + 2), at(g, SIZE + 2), at(g, STRIDE + 2), at(g, PAD + 2)
        tap = at(g, DILATION + 2) * c_size
        xd, xh = at(g, X + 2) * at(g, DILATION), at(g, X + 3) * at(g, DILATION + 1)
        ahead = at(g, STRIDE + 1) * at(g, X + 3)
        whole, adaptive, divisor = at(g, WHOLE), at(g, ADAPTIVE), at(g, DIVISOR)
        counts = scratch + thread * at(g, ROOM)
        buffer = counts + (w_out + L) * c_size
        here = buffer + pad * c_size
        fill_row(buffer, (w_out + L) * stride + k * at(g, DILATION + 2) + w_in + 2 * L, nothing)
        for o in range(w_out + L):
            count = window(g, 2, o)[2] if o < w_out and not divisor else 1
            store_scalar(c_elem, counts + o * c_size, count)
        first, end = over(thread, threads, at(g, N) * at(g, C) * at(g, OUT) * at(g, OUT + 1))
        channels = at(g, C)
        n, c, od, oh = first_row(g, first, channels)
        if whole:
            scale = 1.0 / float(divisor if divisor else w_in)
            xn, xc, yn, yc = at(g, X), at(g, X + 1), at(g, Y), at(g, Y + 1)
            for _unit in range(first, end):
                total = run_input(x + n * xn + c * xc, w_in)
                store_scalar(elem, y + n * yn + c * yc, total * scale if average else total)
                c += 1
                if c == channels:
                    c = 0
                    n += 1
            return
        for _unit in range(first, end):
            d0, dt, dc = window(g, 0, od)
            h0, ht, hc = window(g, 1, oh)
            source, target = row_of(g, X, x, n, c, d0, h0), row_of(g, Y, y, n, c, od, oh)
            n, c, od, oh = next_row(g, channels, n, c, od, oh)
            scale = float(divisor if divisor else dc * hc)
            i = 0
            while i + W <= w_in:
                column_several(source + i * size, xd, xh, dt, ht, ahead, here + i * c_size, W)
                i += W
            while i + L <= w_in:
                column_one(source + i * size, xd, xh, dt, ht, ahead, here + i * c_size, L)
                i += L
            if i < w_in and w_in >= L:
                i = w_in - L
                column_one(source + i * size, xd, xh, dt, ht, ahead, here + i * c_size, L)
            elif i < w_in:
                column_rest(source, xd, xh, dt, ht, ahead, here, w_in)
            if adaptive or (k > 2 * L and stride > 2):
                for o in range(w_out):
                    place, taps = o * stride, k
                    if adaptive:
                        place, taps, _ = window(g, 2, o)
                    total = run_buffer(buffer + place * c_size, taps)
                    if average:
                        total = total / (load_scalar(c_elem, counts + o * c_size) * scale)
                    store_scalar(elem, target + o * size, total)
                continue
            o = 0
            while o < w_out:
                if o + L > w_out and w_out >= L:
                    o = w_out - L
                place = buffer + o * stride * c_size
                if stride == 1:
                    v = load(c_elem, place)
                    for t in range(1, k):
                        v = both(v, load(c_elem, place + t * tap))
                elif stride == 2:
                    v = even_lanes(load(c_elem, place), load(c_elem, place + L * c_size))
                    for t in range(1, k):
                        there = place + t * tap
                        v = both(v, even_lanes(load(c_elem, there), load(c_elem, there + L * c_size)))
                else:
                    v = load_steps(c_elem, place, stride * c_size)
                    for t in range(1, k):
                        v = both(v, load_steps(c_elem, place + t * tap, stride * c_size))
                if average:
                    v = v / (load(c_elem, counts + o * c_size) * scale)
                if w_out >= L:
                    store(elem, target + o * size, v)
                else:
                    store_n(elem, target, v, w_out)
                o += L

    def kernel(threads, x, y, g, scratch):
        parallel(threads, body, (x, y, g, scratch))
    return kernel


def _keys(c: Elem) -> Elem:
    """What an element's place, counted from the first row of its window, is kept in: integers as wide as the values"""
    return INT32 if c.size == 4 else INT64


def argmax_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, x, y, z, geometry, scratch): where geometry says INDICES, y = the maxima and z = their indices; else
    y is the gradient of the output, and z, that of the input, gets each of its elements where the maximum is."""
    elem = ELEMS[elem_name]
    c_elem = compute_elem(elem)
    keys = _keys(c_elem)
    L, size, c_size, half = elem.lanes, elem.size, c_elem.size, elem.size != c_elem.size
    fill_row, fill_keys, narrow_plane = fill(c_elem), fill(keys), copy(c_elem, elem)
    far = 2**31 - 1

    def column(vectors: int, masked: bool) -> Any:
        source, target, places = wide(elem, vectors), wide(c_elem, vectors), wide(keys, vectors)

        @inline
        def reduce(x, xd, xh, dt, ht, i, plane, row, values, indices, n):
            """For the elements from i on of dt · ht rows, the values and places of the maxima"""
            v = spread(target, -inf)
            number = iota_like(v) + i
            best = (number & 0) + far
            for d in range(dt):
                at_row, key = x + d * xd, d * plane
                for h in range(ht):
                    u = load_n(source, at_row, n) if masked else load(source, at_row)
                    better = (u > v) | (u != u)
                    if d == 0 and h == 0:
                        v, best = u, number
                    else:
                        v, best = select(better, u, v), select(better, number + key, best)
                    at_row += xh
                    key += row
            if masked:
                inside = first_lanes(target, n)
                v, best = select(inside, v, -inf), select(inside, best, far)
            store(target, values, v)
            store(places, indices, best)
        return reduce
    column_several, column_one, column_rest = column(2, False), column(1, False), column(1, True)

    @inline
    def body(thread, threads, x, y, z, g, scratch):
        w_in, w_out, k, stride, pad = at(g, IN + 2), at(g, OUT + 2), at(g, SIZE + 2), at(g, STRIDE + 2), at(g, PAD + 2)
        tap = at(g, DILATION + 2) * c_size
        xd, xh = at(g, X + 2) * at(g, DILATION), at(g, X + 3) * at(g, DILATION + 1)
        step_h, step_d = at(g, DILATION + 1) * w_in, at(g, DILATION) * at(g, IN + 1) * w_in
        adaptive, indices = at(g, ADAPTIVE), at(g, INDICES)
        length = (w_out + L) * stride + k * at(g, DILATION + 2) + w_in + 4 * L
        values = scratch + thread * at(g, ROOM)
        places = values + length * c_size
        chosen = places + length * c_size
        whole = chosen + (w_out + L) * c_size  # a plane in the compute type, for the half types' gradients
        fill_row(values, length, -inf)
        fill_keys(places, length, far)
        depth, height, volume = at(g, OUT), at(g, OUT + 1), at(g, IN) * at(g, IN + 1) * w_in
        rows, planes = depth * height, at(g, N) * at(g, C)
        first, end = over(thread, threads, planes * rows)
        if not indices:  # one thread adds to a plane
            first, end = over(thread, threads, planes)
            first, end = first * rows, end * rows
        channels = at(g, C)
        n, c, od, oh = first_row(g, first, channels)
        for _unit in range(first, end):
            d0, dt, _ = window(g, 0, od)
            h0, ht, _ = window(g, 1, oh)
            base = (d0 * at(g, IN + 1) + h0) * w_in - pad
            source, target = row_of(g, X, x, n, c, d0, h0), row_of(g, Y, y, n, c, od, oh)
            plane, row = n * channels + c, od * height + oh
            n, c, od, oh = next_row(g, channels, n, c, od, oh)
            i, here, there = 0, values + pad * c_size, places + pad * c_size
            while i + 2 * L <= w_in:
                column_several(source + i * size, xd, xh, dt, ht, i + pad, step_d, step_h, here + i * c_size, there + i * c_size,
                               2 * L)
                i += 2 * L
            while i + L <= w_in:
                column_one(source + i * size, xd, xh, dt, ht, i + pad, step_d, step_h, here + i * c_size, there + i * c_size, L)
                i += L
            if i < w_in and w_in >= L:
                i = w_in - L
                column_one(source + i * size, xd, xh, dt, ht, i + pad, step_d, step_h, here + i * c_size, there + i * c_size, L)
            elif i < w_in:
                column_rest(source, xd, xh, dt, ht, pad, step_d, step_h, here, there, w_in)
            if adaptive:
                for o in range(w_out):
                    w0, taps, _ = window(g, 2, o)
                    v, best = load_scalar(c_elem, values + w0 * c_size), load_scalar(keys, places + w0 * c_size)
                    for t in range(w0 + 1, w0 + taps):
                        u, key = load_scalar(c_elem, values + t * c_size), load_scalar(keys, places + t * c_size)
                        if beyond(u, key, v, best):
                            v, best = u, key
                    store_scalar(keys, chosen + o * c_size, best)
                    if indices:
                        store_scalar(elem, target + o * size, v)
            else:
                o = 0
                while o < w_out:
                    if o + L > w_out and w_out >= L:
                        o = w_out - L
                    place = o * stride * c_size
                    v = load_steps(c_elem, values + place, stride * c_size)
                    best = load_steps(keys, places + place, stride * c_size)
                    for _t in range(1, k):
                        place += tap
                        if stride == 1:
                            u, key = load(c_elem, values + place), load(keys, places + place)
                        elif stride == 2:
                            u = even_lanes(load(c_elem, values + place), load(c_elem, values + place + L * c_size))
                            key = even_lanes(load(keys, places + place), load(keys, places + place + L * c_size))
                        else:
                            u = load_steps(c_elem, values + place, stride * c_size)
                            key = load_steps(keys, places + place, stride * c_size)
                        better = beyond(u, key, v, best)
                        v, best = select(better, u, v), select(better, key, best)
                    store(keys, chosen + o * c_size, best)
                    if indices and w_out >= L:
                        store(elem, target + o * size, v)
                    elif indices:
                        store_n(elem, target, v, w_out)
                    o += L
            if indices:
                target = z + (plane * rows + row) * w_out * 8
                for o in range(w_out):
                    store_scalar(INT64, target + o * 8, base + load_scalar(keys, chosen + o * c_size))
                continue
            gradient = z + plane * volume * size
            total = whole if half else gradient
            if row == 0:
                fill_row(total, volume, 0.0)
            for o in range(w_out):
                place = base + load_scalar(keys, chosen + o * c_size)
                if place < volume:  # else nothing of its window is inside
                    place = total + place * c_size
                    store_scalar(c_elem, place, load_scalar(c_elem, place) + load_scalar(elem, target + o * size))
            if half and row == rows - 1:
                narrow_plane(total, gradient, volume)

    def kernel(threads, x, y, z, g, scratch):
        parallel(threads, body, (x, y, z, g, scratch))
    return kernel


def average_backward_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, y, z, geometry, scratch): z, the input's gradient, from y, the output's"""
    elem = ELEMS[elem_name]
    c_elem = compute_elem(elem)
    L, size, c_size, half = elem.lanes, elem.size, c_elem.size, elem.size != c_elem.size
    fill_row, narrow_plane, add_row = fill(c_elem), copy(c_elem, elem), copy(c_elem, c_elem, add=True)

    @inline
    def body(thread, threads, y, z, g, scratch):
        w_in, w_out, k, stride, pad = at(g, IN + 2), at(g, OUT + 2), at(g, SIZE + 2), at(g, STRIDE + 2), at(g, PAD + 2)
        adaptive, divisor = at(g, ADAPTIVE), at(g, DIVISOR)
        length = (w_out + L) * stride + k + w_in + 2 * L
        counts = scratch + thread * at(g, ROOM)
        shares = counts + (w_out + L) * c_size
        line = shares + (w_out + L) * c_size  # with the padding
        whole = line + length * c_size
        for o in range(w_out):
            store_scalar(c_elem, counts + o * c_size, 1 if divisor else window(g, 2, o)[2])
        depth, height, volume = at(g, OUT), at(g, OUT + 1), at(g, IN) * at(g, IN + 1) * w_in
        first, end = over(thread, threads, at(g, N) * at(g, C))
        for plane in range(first, end):
            gradient = z + plane * volume * size
            total = whole if half else gradient
            fill_row(total, volume, 0.0)
            for od in range(depth):
                d0, dt, dc = window(g, 0, od)
                for oh in range(height):
                    h0, ht, hc = window(g, 1, oh)
                    source = plane_of(g, Y, y, plane) + od * at(g, Y + 2) + oh * at(g, Y + 3)
                    scale = float(divisor if divisor else dc * hc)
                    o = 0
                    while o < w_out:
                        grad = load(elem, source + o * size) if o + L <= w_out else load_n(elem, source + o * size, w_out - o)
                        store(c_elem, shares + o * c_size, grad / (load(c_elem, counts + o * c_size) * scale))
                        o += L
                    fill_row(line, w_in + 2 * pad, 0.0)
                    if stride == 1 and w_out >= L and not adaptive:
                        for t in range(k):
                            add_row(shares, line + t * c_size, w_out)
                    else:
                        for o in range(w_out):
                            place, taps, t = o * stride, k, 0
                            if adaptive:
                                place, taps, _ = window(g, 2, o)
                            share, place = load_scalar(c_elem, shares + o * c_size), line + place * c_size
                            while t + L <= taps:
                                store(c_elem, place + t * c_size, load(c_elem, place + t * c_size) + share)
                                t += L
                            while t < taps:
                                store_scalar(c_elem, place + t * c_size, load_scalar(c_elem, place + t * c_size) + share)
                                t += 1
                    for d in range(d0, d0 + dt):
                        for h in range(h0, h0 + ht):
                            add_row(line + pad * c_size, total + (d * at(g, IN + 1) + h) * w_in * c_size, w_in)
            if half:
                narrow_plane(total, gradient, volume)

    def kernel(threads, y, z, g, scratch):
        parallel(threads, body, (y, z, g, scratch))
    return kernel


# Across ---------------------------------------------------------------------------------------------------------------


def _chunks(elem: Elem, step: Callable[[Elem, Elem, bool], Any], vectors: int) -> Any:
    """run(c0, c1, args): step(channel, n, args) over the channels from c0 to c1, several vectors, one, part of one"""
    c, L, W = compute_elem(elem), elem.lanes, elem.lanes * vectors
    several, one, rest = step(wide(elem, vectors), wide(c, vectors), False), step(elem, c, False), step(elem, c, True)

    @inline
    def run(i, end, args):
        while i + W <= end:
            several(i, W, args)
            i += W
        while i + L <= end:
            one(i, L, args)
            i += L
        if i < end:
            rest(i, end - i, args)
    return run


def pool_across(elem_name: str, average: bool) -> Callable[..., Any]:
    """kernel(threads, x, y, geometry, scratch)"""
    elem = ELEMS[elem_name]
    combine = SUM if average else MAXIMUM
    nothing, both, size = combine.nothing, combine.both, elem.size

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def chunk(i, n, args):
            x, xd, xh, xw, dt, ht, wt, ahead, y, count = args
            total = spread(target, nothing)
            for d in range(dt):
                row = x + d * xd + i * size
                for _h in range(ht):
                    part, place = spread(target, nothing), row
                    for _w in range(wt):
                        if source.lanes > elem.lanes:  # what the next pixel's window adds
                            prefetch(place + ahead)
                            prefetch(place + ahead + LINE)
                        part = both(part, load_n(source, place, n) if masked else load(source, place))
                        place += xw
                    total = both(total, part)
                    row += xh
            if average:
                total = total / count
            if masked:
                store_n(source, y + i * size, total, n)
            else:
                store(source, y + i * size, total)
        return chunk
    chunks = _chunks(elem, step, WIDTH)

    @inline
    def body(thread, threads, x, y, g, scratch):
        width, channels, block, divisor = at(g, OUT + 2), at(g, C), at(g, BLOCK), at(g, DIVISOR)
        xd, xh, xw = at(g, X + 2) * at(g, DILATION), at(g, X + 3) * at(g, DILATION + 1), at(g, X + 4) * at(g, DILATION + 2)
        ahead = 0 if at(g, ADAPTIVE) else at(g, STRIDE + 2) * at(g, X + 4)
        blocks = (channels + block - 1) // block
        first, end = over(thread, threads, at(g, N) * blocks * at(g, OUT) * at(g, OUT + 1))
        n, b, od, oh = first_row(g, first, blocks)
        for _unit in range(first, end):
            d0, dt, dc = window(g, 0, od)
            h0, ht, hc = window(g, 1, oh)
            source, target = row_of(g, X, x, n, 0, d0, h0), row_of(g, Y, y, n, 0, od, oh)
            c0, c1 = b * block, min(channels, b * block + block)
            n, b, od, oh = next_row(g, blocks, n, b, od, oh)
            for ow in range(width):
                w0, wt, wc = window(g, 2, ow)
                chunks(c0, c1, (source + w0 * at(g, X + 4), xd, xh, xw, dt, ht, wt, ahead, target + ow * at(g, Y + 4),
                                float(divisor if divisor else dc * hc * wc)))

    def kernel(threads, x, y, g, scratch):
        parallel(threads, body, (x, y, g, scratch))
    return kernel


def _scatter_across(elem: Elem, step: Callable[[Elem, Elem, bool], Any], vectors: int) -> Any:
    """body(thread, threads, x, y, z, g): adds to z, the input's gradient, what step makes of every window. A thread has
    whole images of a block of channels; the half types' sums are kept in the compute type until they are complete."""
    c = compute_elem(elem)
    size, c_size, half = elem.size, c.size, elem.size != c.size
    chunks, fill_row, narrow_row = _chunks(elem, step, vectors), fill(c), copy(c, elem)

    @inline
    def body(thread, threads, x, y, z, g, scratch):
        depth, height, width, channels, block = at(g, OUT), at(g, OUT + 1), at(g, OUT + 2), at(g, C), at(g, BLOCK)
        h_in, w_in, divisor = at(g, IN + 1), at(g, IN + 2), at(g, DIVISOR)
        room, blocks, volume = scratch + thread * at(g, ROOM) + OWN, (channels + block - 1) // block, at(g, IN) * h_in * w_in
        first, end = over(thread, threads, at(g, N) * blocks)
        for unit in range(first, end):
            n, c0 = unit // blocks, unit % blocks * block
            c1 = min(channels, c0 + block)
            gradient = z + n * volume * channels * size
            # The sums' first channel and their pixels' distance
            total, zw = (room - c0 * c_size, block * c_size) if half else (gradient, channels * c_size)
            for pixel in range(volume):
                fill_row(total + pixel * zw + c0 * c_size, c1 - c0, 0.0)
            for od in range(depth):
                d0, dt, dc = window(g, 0, od)
                for oh in range(height):
                    h0, ht, hc = window(g, 1, oh)
                    for ow in range(width):
                        w0, wt, wc = window(g, 2, ow)
                        source = x + n * at(g, X) + d0 * at(g, X + 2) + h0 * at(g, X + 3) + w0 * at(g, X + 4)
                        target = y + n * at(g, Y) + od * at(g, Y + 2) + oh * at(g, Y + 3) + ow * at(g, Y + 4)
                        place, count = total + ((d0 * h_in + h0) * w_in + w0) * zw, float(divisor if divisor else dc * hc * wc)
                        chunks(c0, c1, (source, target, place, zw, dt, ht, wt, count, room - OWN, g))
            if half:
                for pixel in range(volume):
                    narrow_row(total + pixel * zw + c0 * c_size, gradient + (pixel * channels + c0) * size, c1 - c0)
    return body


def _argmax_of_taps(source: Elem, target: Elem, masked: bool) -> Any:
    """argmax(x, n, dt, ht, wt, g): the maximum of a window and its place, counted from the window's first"""
    @inline
    def argmax(x, n, dt, ht, wt, g):
        v = spread(target, -inf)
        none = iota_like(v) & 0
        best = none
        xd, xh, xw = at(g, X + 2) * at(g, DILATION), at(g, X + 3) * at(g, DILATION + 1), at(g, X + 4) * at(g, DILATION + 2)
        pw = at(g, DILATION + 2)
        ph = at(g, IN + 2) * at(g, DILATION + 1)
        pd = at(g, IN + 2) * at(g, IN + 1) * at(g, DILATION)
        for d in range(dt):
            for h in range(ht):
                place, key = x + d * xd + h * xh, d * pd + h * ph
                for _w in range(wt):
                    u = load_n(source, place, n) if masked else load(source, place)
                    better = (u > v) | (u != u)
                    v, best = select(better, u, v), select(better, none + key, best)
                    place += xw
                    key += pw
        return v, best
    return argmax


def argmax_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, x, y, z, geometry, scratch): y = the maxima, z = their indices"""
    elem = ELEMS[elem_name]
    size = elem.size

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        argmax, key = _argmax_of_taps(source, target, masked), _keys(target)
        keys, key_size = wide(key, target.lanes // key.lanes), key.size

        @inline
        def chunk(i, n, args):
            x, y, z, base, dt, ht, wt, scratch, g = args
            v, best = argmax(x + i * size, n, dt, ht, wt, g)
            if masked:
                store_n(source, y + i * size, v, n)
            else:
                store(source, y + i * size, v)
            store(keys, scratch, best)
            for j in range(n):
                store_scalar(INT64, z + (i + j) * 8, base + load_scalar(key, scratch + j * key_size))
        return chunk
    chunks = _chunks(elem, step, 2)

    @inline
    def body(thread, threads, x, y, z, g, scratch):
        width, channels, room = at(g, OUT + 2), at(g, C), scratch + thread * at(g, ROOM)
        first, end = over(thread, threads, at(g, N) * at(g, OUT) * at(g, OUT + 1))
        n, c, od, oh = first_row(g, first, 1)
        for unit in range(first, end):
            d0, dt, _ = window(g, 0, od)
            h0, ht, _ = window(g, 1, oh)
            source, target = row_of(g, X, x, n, 0, d0, h0), row_of(g, Y, y, n, 0, od, oh)
            n, c, od, oh = next_row(g, 1, n, c, od, oh)
            for ow in range(width):
                w0, wt, _ = window(g, 2, ow)
                chunks(0, channels, (source + w0 * at(g, X + 4), target + ow * at(g, Y + 4),
                                     z + (unit * width + ow) * channels * 8,
                                     (d0 * at(g, IN + 1) + h0) * at(g, IN + 2) + w0, dt, ht, wt, room, g))

    def kernel(threads, x, y, z, g, scratch):
        parallel(threads, body, (x, y, z, g, scratch))
    return kernel


def max_backward_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, x, y, z, geometry, scratch): z, the input's gradient, from x, the input, and y, the output's gradient"""
    elem = ELEMS[elem_name]
    size, c_size = elem.size, compute_elem(elem).size

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        argmax, key_elem = _argmax_of_taps(source, target, masked), _keys(target)
        keys = wide(key_elem, target.lanes // key_elem.lanes)

        @inline
        def chunk(i, n, args):
            x, y, z, zw, dt, ht, wt, _, own, g = args
            _, best = argmax(x + i * size, n, dt, ht, wt, g)
            grad = load_n(source, y + i * size, n) if masked else load(source, y + i * size)
            if dt * ht * wt > FEW:
                store(keys, own, best)
                store(target, own + target.lanes * c_size, grad)
                for j in range(n):
                    place = z + load_scalar(key_elem, own + j * c_size) * zw + (i + j) * c_size
                    share_of_one = load_scalar(target, own + (target.lanes + j) * c_size)
                    store_scalar(target, place, load_scalar(target, place) + share_of_one)
                return
            for d in range(dt):
                for h in range(ht):
                    key = (d * at(g, DILATION) * at(g, IN + 1) + h * at(g, DILATION + 1)) * at(g, IN + 2)
                    for _w in range(wt):
                        place = z + key * zw + i * c_size
                        share = select(best == key, grad, 0.0)
                        if masked:
                            store_n(target, place, load_n(target, place, n) + share, n)
                        else:
                            store(target, place, load(target, place) + share)
                        key += at(g, DILATION + 2)
        return chunk
    body = _scatter_across(elem, step, 2)

    def kernel(threads, x, y, z, g, scratch):
        parallel(threads, body, (x, y, z, g, scratch))
    return kernel


def average_backward_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, y, z, geometry, scratch): z, the input's gradient, from y, the output's"""
    elem = ELEMS[elem_name]
    size, c_size = elem.size, compute_elem(elem).size

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def chunk(i, n, args):
            _, y, z, zw, dt, ht, wt, count, _own, g = args
            share = (load_n(source, y + i * size, n) if masked else load(source, y + i * size)) / count
            for d in range(dt):
                for h in range(ht):
                    place = z + (d * at(g, IN + 1) + h) * at(g, IN + 2) * zw + i * c_size
                    for _w in range(wt):
                        if masked:
                            store_n(target, place, load_n(target, place, n) + share, n)
                        else:
                            store(target, place, load(target, place) + share)
                        place += zw
        return chunk
    body = _scatter_across(elem, step, WIDTH)

    def kernel(threads, y, z, g, scratch):
        parallel(threads, body, (0, y, z, g, scratch))
    return kernel


# Unpooling ------------------------------------------------------------------------------------------------------------


def unpool(elem_name: str, backward: bool) -> Callable[..., Any]:
    """kernel(threads, N, C, n, m, indices, in, small: address and strides of N, C and pixels, large: the same, bad)

    n pixels of each plane of ``small`` go to those of ``large``, of m, that the indices name; backward: come from them.
    bad: gets a wrong index plus 1 where there is one.
    """
    elem = ELEMS[elem_name]

    @inline
    def body(thread, threads, batch, channels, n, m, i, ib, ic, ip, x, xb, xc, xp, y, yb, yc, yp, bad):
        first, end = over(thread, threads, batch * channels)
        for unit in range(first, end):
            b, c = unit // channels, unit % channels
            from_, to, at_ = x + b * xb + c * xc, y + b * yb + c * yc, i + b * ib + c * ic
            for pixel in range(n):
                index = load_scalar(INT64, at_ + pixel * ip)
                if index < 0 or index >= m:
                    store_scalar(INT64, bad, 1)
                    store_scalar(INT64, bad + 8, index)
                elif backward:
                    store_scalar(elem, from_ + pixel * xp, load_scalar(elem, to + index * yp))
                else:
                    store_scalar(elem, to + index * yp, load_scalar(elem, from_ + pixel * xp))

    def kernel(threads, batch, channels, n, m, i, ib, ic, ip, x, xb, xc, xp, y, yb, yc, yp, bad):
        parallel(threads, body, (batch, channels, n, m, i, ib, ic, ip, x, xb, xc, xp, y, yb, yc, yp, bad))
    return kernel
