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
    evens,
    first_lanes,
    inline,
    iota_like,
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
from .pool_slots import (
    ADAPTIVE,
    BLOCK,
    C,
    DILATION,
    DIVISOR,
    IN,
    INCLUDE_PAD,
    INDICES,
    N,
    OUT,
    PAD,
    ROOM,
    SCRATCH,
    SIZE,
    STRIDE,
    WHOLE,
    X,
    Y,
)

WIDTH = 4  # vectors that are worked on at once
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
    """A reduction: of two vectors, of two scalars, of a vector's lanes."""

    nothing: float
    both: Any
    two: Any
    lanes: Any


@inline
def _larger(a, b):
    """The larger, or a NaN if there is one"""
    return select(b != b, b, maximum_fast(b, a))


@inline
def _larger_scalar(a, b):
    return b if b > a or b != b else a


@inline
def _sum(a, b):
    return a + b


MAXIMUM = Combine(-inf, _larger, _larger_scalar, reduce_max)
SUM = Combine(0.0, _sum, _sum, reduce_add)


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
    several, L, W, size = wide(elem, WIDTH), elem.lanes, elem.lanes * WIDTH, elem.size
    nothing, both, two, lanes = combine

    @inline
    def run(address, n):
        rest, i = spread(elem, nothing), 0
        total = lanes(rest)
        if n >= W:
            sums = spread(several, nothing)
            while i + W <= n:
                stop, part = min(n, i + W * CHAIN), spread(several, nothing)
                while i + W <= stop:
                    part = both(part, load(several, address + i * size))
                    i += W
                sums = both(sums, part)
            total = lanes(sums)
        while i + L <= n:
            rest = both(rest, load(elem, address + i * size))
            i += L
        if i < n:
            last = load_n(elem, address + i * size, n - i)
            rest = both(rest, select(first_lanes(elem, n - i), last, nothing))
        return two(total, lanes(rest))
    return run


# Along ----------------------------------------------------------------------------------------------------------------


def pool_along(elem_name: str, average: bool) -> Callable[..., Any]:
    """kernel(threads, x, y, geometry)"""
    elem = ELEMS[elem_name]
    c = compute_elem(elem)
    combine = SUM if average else MAXIMUM
    nothing, both, two = combine.nothing, combine.both, combine.two
    several, c_several = wide(elem, WIDTH), wide(c, WIDTH)
    L, W, size, c_size = elem.lanes, elem.lanes * WIDTH, elem.size, c.size
    run_input, run_buffer, fill_row = whole_run(elem, combine), whole_run(c, combine), fill(c)

    def column(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def reduce(x, xd, xh, dt, ht, y, n):
            """y = the reduction of dt · ht rows"""
            total = spread(target, nothing)
            for d in range(dt):
                row = x + d * xd
                for _h in range(ht):
                    total = both(total, load_n(source, row, n) if masked else load(source, row))
                    row += xh
            if masked:
                store_n(target, y, total, n)
            else:
                store(target, y, total)
        return reduce
    column_several, column_one, column_rest = column(several, c_several, False), column(elem, c, False), column(elem, c, True)

    @inline
    def finish(v, counts, scale, o):
        return v / (load(c, counts + o * c_size) * scale) if average else v

    @inline
    def put(y, v, o, n):
        if o + L <= n:
            store(elem, y + o * size, v)
        else:
            store_n(elem, y + o * size, v, n - o)

    @inline
    def body(thread, threads, x, y, g):
        w_in, w_out, k, stride, pad, step = at(g, IN + 2), at(g, OUT + 2), at(g, SIZE + 2), at(g, STRIDE + 2), at(g, PAD + 2), at(g, DILATION + 2)
        xd, xh = at(g, X + 2) * at(g, DILATION), at(g, X + 3) * at(g, DILATION + 1)
        whole, adaptive, divisor = at(g, WHOLE), at(g, ADAPTIVE), at(g, DIVISOR)
        counts = at(g, SCRATCH) + thread * at(g, ROOM)
        buffer = counts + (w_out + L) * c_size
        fill_row(buffer, (w_out + L) * stride + k * step + w_in + 2 * L, nothing)
        for o in range(w_out + L):
            count = window(g, 2, o)[2] if o < w_out and not divisor else 1
            store_scalar(c, counts + o * c_size, count)
        depth, height = at(g, OUT), at(g, OUT + 1)
        rows = depth * height
        first, end = over(thread, threads, at(g, N) * at(g, C) * rows)
        for unit in range(first, end):
            plane, row = unit // rows, unit % rows
            od, oh = row // height, row % height
            d0, dt, dc = window(g, 0, od)
            h0, ht, hc = window(g, 1, oh)
            scale = float(divisor if divisor else dc * hc)
            source = plane_of(g, X, x, plane) + d0 * at(g, X + 2) + h0 * at(g, X + 3)
            target = plane_of(g, Y, y, plane) + od * at(g, Y + 2) + oh * at(g, Y + 3)
            if whole:
                total = run_input(source, w_in)
                store_scalar(elem, target, total / (load_scalar(c, counts) * scale) if average else total)
                continue
            here, i = buffer + pad * c_size, 0
            while i + W <= w_in:
                column_several(source + i * size, xd, xh, dt, ht, here + i * c_size, W)
                i += W
            while i + L <= w_in:
                column_one(source + i * size, xd, xh, dt, ht, here + i * c_size, L)
                i += L
            if i < w_in:
                column_rest(source + i * size, xd, xh, dt, ht, here + i * c_size, w_in - i)
            o = 0
            if adaptive or stride > 2:
                for o in range(w_out):
                    start, taps = o * stride, k
                    if adaptive:
                        start, taps, _ = window(g, 2, o)
                    place = buffer + start * c_size
                    if step == 1:
                        total = run_buffer(place, taps)
                    else:
                        total = load_scalar(c, place)
                        for t in range(1, taps):
                            total = two(total, load_scalar(c, place + t * step * c_size))
                    store_scalar(elem, target + o * size, total / (load_scalar(c, counts + o * c_size) * scale) if average else total)
            elif stride == 2:
                while o < w_out:
                    place = buffer + o * 2 * c_size
                    v = evens(load(c, place), load(c, place + L * c_size))
                    for t in range(1, k):
                        there = place + t * step * c_size
                        v = both(v, evens(load(c, there), load(c, there + L * c_size)))
                    put(target, finish(v, counts, scale, o), o, w_out)
                    o += L
            else:
                while o < w_out:
                    place = buffer + o * c_size
                    v = load(c, place)
                    for t in range(1, k):
                        v = both(v, load(c, place + t * step * c_size))
                    put(target, finish(v, counts, scale, o), o, w_out)
                    o += L

    def kernel(threads, x, y, g):
        parallel(threads, body, (x, y, g))
    return kernel


def _keys(c: Elem) -> Elem:
    """What an element's place, counted from the first row of its window, is kept in: integers as wide as the values"""
    return INT32 if c.size == 4 else INT64


def argmax_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, x, y, z, geometry): where geometry says INDICES, y = the maxima and z = their indices; else
    y is the gradient of the output, and z, that of the input, gets each of its elements where the maximum is."""
    elem = ELEMS[elem_name]
    c = compute_elem(elem)
    keys = _keys(c)
    L, size, c_size, half = elem.lanes, elem.size, c.size, elem.size != c.size
    fill_row, fill_keys, narrow_plane = fill(c), fill(keys), copy(c, elem)
    far = 2**31 - 1

    def column(vectors: int, masked: bool) -> Any:
        source, target, places = wide(elem, vectors), wide(c, vectors), wide(keys, vectors)

        @inline
        def reduce(x, xd, xh, dt, ht, i, plane, row, values, indices, n):
            """For the elements from i on of dt · ht rows, the values and places of the maxima"""
            v = spread(target, -inf)
            number = iota_like(v) + i
            best = number + far
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
                store_n(target, values, v, n)
                store_n(places, indices, best, n)
            else:
                store(target, values, v)
                store(places, indices, best)
        return reduce
    column_several, column_one, column_rest = column(2, False), column(1, False), column(1, True)

    @inline
    def body(thread, threads, x, y, z, g):
        w_in, w_out, k, stride, pad, step = at(g, IN + 2), at(g, OUT + 2), at(g, SIZE + 2), at(g, STRIDE + 2), at(g, PAD + 2), at(g, DILATION + 2)
        xd, xh = at(g, X + 2) * at(g, DILATION), at(g, X + 3) * at(g, DILATION + 1)
        step_h, step_d = at(g, DILATION + 1) * w_in, at(g, DILATION) * at(g, IN + 1) * w_in
        adaptive, indices = at(g, ADAPTIVE), at(g, INDICES)
        length = (w_out + L) * stride + k * step + w_in + 4 * L
        values = at(g, SCRATCH) + thread * at(g, ROOM)
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
        for unit in range(first, end):
            plane, row = unit // rows, unit % rows
            od, oh = row // height, row % height
            d0, dt, _ = window(g, 0, od)
            h0, ht, _ = window(g, 1, oh)
            base = (d0 * at(g, IN + 1) + h0) * w_in - pad
            source = plane_of(g, X, x, plane) + d0 * at(g, X + 2) + h0 * at(g, X + 3)
            target = plane_of(g, Y, y, plane) + od * at(g, Y + 2) + oh * at(g, Y + 3)
            i = 0
            while i + 2 * L <= w_in:
                column_several(source + i * size, xd, xh, dt, ht, i + pad, step_d, step_h, values + (pad + i) * c_size, places + (pad + i) * c_size, 2 * L)
                i += 2 * L
            while i + L <= w_in:
                column_one(source + i * size, xd, xh, dt, ht, i + pad, step_d, step_h, values + (pad + i) * c_size, places + (pad + i) * c_size, L)
                i += L
            if i < w_in:
                column_rest(source + i * size, xd, xh, dt, ht, i + pad, step_d, step_h, values + (pad + i) * c_size, places + (pad + i) * c_size, w_in - i)
            o = 0
            if adaptive or stride > 2:
                for o in range(w_out):
                    start, taps = o * stride, k
                    if adaptive:
                        start, taps, _ = window(g, 2, o)
                    v, best = load_scalar(c, values + start * c_size), load_scalar(keys, places + start * c_size)
                    for t in range(1, taps):
                        there = (start + t * step) * c_size
                        u, key = load_scalar(c, values + there), load_scalar(keys, places + there)
                        if beyond(u, key, v, best):
                            v, best = u, key
                    store_scalar(keys, chosen + o * c_size, best)
                    if indices:
                        store_scalar(elem, target + o * size, v)
            else:
                while o < w_out:
                    there = o * stride * c_size
                    v, best = load(c, values + there), load(keys, places + there)
                    if stride == 2:
                        v = evens(v, load(c, values + there + L * c_size))
                        best = evens(best, load(keys, places + there + L * c_size))
                    for t in range(1, k):
                        there += step * c_size
                        u, key = load(c, values + there), load(keys, places + there)
                        if stride == 2:
                            u = evens(u, load(c, values + there + L * c_size))
                            key = evens(key, load(keys, places + there + L * c_size))
                        better = beyond(u, key, v, best)
                        v, best = select(better, u, v), select(better, key, best)
                    store(keys, chosen + o * c_size, best)
                    if indices:
                        store_n(elem, target + o * size, v, w_out - o)
                    o += L
            if indices:
                target = z + ((plane * depth + od) * height + oh) * w_out * 8
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
                    store_scalar(c, place, load_scalar(c, place) + load_scalar(elem, target + o * size))
            if half and row == rows - 1:
                narrow_plane(total, gradient, volume)

    def kernel(threads, x, y, z, g):
        parallel(threads, body, (x, y, z, g))
    return kernel


def average_backward_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, y, z, geometry): z, the input's gradient, from y, the output's"""
    elem = ELEMS[elem_name]
    c = compute_elem(elem)
    L, size, c_size, half = elem.lanes, elem.size, c.size, elem.size != c.size
    fill_row, narrow_plane, add_row = fill(c), copy(c, elem), copy(c, c, add=True)

    @inline
    def body(thread, threads, y, z, g):
        w_in, w_out, pad, divisor = at(g, IN + 2), at(g, OUT + 2), at(g, PAD + 2), at(g, DIVISOR)
        shares = at(g, SCRATCH) + thread * at(g, ROOM)
        line = shares + (w_out + L) * c_size
        whole = line + (w_in + L) * c_size
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
                    fill_row(line, w_in, 0.0)
                    for o in range(w_out):
                        w0, wt, wc = window(g, 2, o)
                        count = divisor if divisor else dc * hc * wc
                        share = load_scalar(elem, source + o * size) / count
                        place, t = line + w0 * c_size, 0
                        while t + L <= wt:
                            store(c, place + t * c_size, load(c, place + t * c_size) + share)
                            t += L
                        while t < wt:
                            store_scalar(c, place + t * c_size, load_scalar(c, place + t * c_size) + share)
                            t += 1
                    for d in range(d0, d0 + dt):
                        for h in range(h0, h0 + ht):
                            add_row(line, total + (d * at(g, IN + 1) + h) * w_in * c_size, w_in)
            if half:
                narrow_plane(total, gradient, volume)

    def kernel(threads, y, z, g):
        parallel(threads, body, (y, z, g))
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
    """kernel(threads, x, y, geometry)"""
    elem = ELEMS[elem_name]
    combine = SUM if average else MAXIMUM
    nothing, both, size = combine.nothing, combine.both, elem.size

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def chunk(i, n, args):
            x, xd, xh, xw, dt, ht, wt, y, count = args
            total = spread(target, nothing)
            for d in range(dt):
                row = x + d * xd + i * size
                for _h in range(ht):
                    part, place = spread(target, nothing), row
                    for _w in range(wt):
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
    def body(thread, threads, x, y, g):
        depth, height, width, channels, block = at(g, OUT), at(g, OUT + 1), at(g, OUT + 2), at(g, C), at(g, BLOCK)
        xd, xh, xw = at(g, X + 2), at(g, X + 3), at(g, X + 4)
        blocks, pixels, divisor = (channels + block - 1) // block, depth * height * width, at(g, DIVISOR)
        first, end = over(thread, threads, at(g, N) * blocks * pixels)
        for unit in range(first, end):
            image, pixel = unit // pixels, unit % pixels
            n, c0 = image // blocks, image % blocks * block
            od, oh, ow = pixel // width // height, pixel // width % height, pixel % width
            d0, dt, dc = window(g, 0, od)
            h0, ht, hc = window(g, 1, oh)
            w0, wt, wc = window(g, 2, ow)
            source = x + n * at(g, X) + d0 * xd + h0 * xh + w0 * xw
            target = y + n * at(g, Y) + od * at(g, Y + 2) + oh * at(g, Y + 3) + ow * at(g, Y + 4)
            chunks(c0, min(channels, c0 + block),
                   (source, xd * at(g, DILATION), xh * at(g, DILATION + 1), xw * at(g, DILATION + 2), dt, ht, wt, target, float(divisor if divisor else dc * hc * wc)))

    def kernel(threads, x, y, g):
        parallel(threads, body, (x, y, g))
    return kernel


def _scatter_across(elem: Elem, step: Callable[[Elem, Elem, bool], Any], vectors: int) -> Any:
    """body(thread, threads, x, y, z, g): adds to z, the input's gradient, what step makes of every window. A thread has
    whole images of a block of channels; the half types' sums are kept in the compute type until they are complete."""
    c = compute_elem(elem)
    size, c_size, half = elem.size, c.size, elem.size != c.size
    chunks, fill_row, narrow_row = _chunks(elem, step, vectors), fill(c), copy(c, elem)

    @inline
    def body(thread, threads, x, y, z, g):
        depth, height, width, channels, block = at(g, OUT), at(g, OUT + 1), at(g, OUT + 2), at(g, C), at(g, BLOCK)
        h_in, w_in, divisor = at(g, IN + 1), at(g, IN + 2), at(g, DIVISOR)
        scratch, blocks, volume = at(g, SCRATCH) + thread * at(g, ROOM), (channels + block - 1) // block, at(g, IN) * h_in * w_in
        first, end = over(thread, threads, at(g, N) * blocks)
        for unit in range(first, end):
            n, c0 = unit // blocks, unit % blocks * block
            c1 = min(channels, c0 + block)
            gradient = z + n * volume * channels * size
            # The sums' first channel and their pixels' distance
            total, zw = (scratch - c0 * c_size, block * c_size) if half else (gradient, channels * c_size)
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
                        chunks(c0, c1, (source, target, total + ((d0 * h_in + h0) * w_in + w0) * zw, zw, dt, ht, wt,
                                        float(divisor if divisor else dc * hc * wc), g))
            if half:
                for pixel in range(volume):
                    narrow_row(total + pixel * zw + c0 * c_size, gradient + (pixel * channels + c0) * size, c1 - c0)
    return body


@inline
def _taps(g, t, ht, wt):
    """Where tap number t of a window is, counted from its first: in the input (bytes), and in elements of a plane"""
    d, h, w = t // wt // ht, t // wt % ht, t % wt
    d, h, w = d * at(g, DILATION), h * at(g, DILATION + 1), w * at(g, DILATION + 2)
    return d * at(g, X + 2) + h * at(g, X + 3) + w * at(g, X + 4), (d * at(g, IN + 1) + h) * at(g, IN + 2) + w


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
    """kernel(threads, x, y, z, geometry): y = the maxima, z = their indices"""
    elem = ELEMS[elem_name]
    size = elem.size

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        argmax, keys = _argmax_of_taps(source, target, masked), wide(_keys(target), target.lanes // _keys(compute_elem(elem)).lanes)
        key, key_size = _keys(compute_elem(elem)), _keys(compute_elem(elem)).size

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
    def body(thread, threads, x, y, z, g):
        depth, height, width, channels = at(g, OUT), at(g, OUT + 1), at(g, OUT + 2), at(g, C)
        pixels, scratch = depth * height * width, at(g, SCRATCH) + thread * at(g, ROOM)
        first, end = over(thread, threads, at(g, N) * pixels)
        for unit in range(first, end):
            n, pixel = unit // pixels, unit % pixels
            od, oh, ow = pixel // width // height, pixel // width % height, pixel % width
            d0, dt, _ = window(g, 0, od)
            h0, ht, _ = window(g, 1, oh)
            w0, wt, _ = window(g, 2, ow)
            source = x + n * at(g, X) + d0 * at(g, X + 2) + h0 * at(g, X + 3) + w0 * at(g, X + 4)
            target = y + n * at(g, Y) + od * at(g, Y + 2) + oh * at(g, Y + 3) + ow * at(g, Y + 4)
            chunks(0, channels, (source, target, z + unit * channels * 8, (d0 * at(g, IN + 1) + h0) * at(g, IN + 2) + w0, dt, ht, wt, scratch, g))

    def kernel(threads, x, y, z, g):
        parallel(threads, body, (x, y, z, g))
    return kernel


def max_backward_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, x, y, z, geometry): z, the input's gradient, from x, the input, and y, the output's gradient"""
    elem = ELEMS[elem_name]
    size, c_size = elem.size, compute_elem(elem).size

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        argmax = _argmax_of_taps(source, target, masked)

        @inline
        def chunk(i, n, args):
            x, y, z, zw, dt, ht, wt, _, g = args
            _, best = argmax(x + i * size, n, dt, ht, wt, g)
            grad = load_n(source, y + i * size, n) if masked else load(source, y + i * size)
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

    def kernel(threads, x, y, z, g):
        parallel(threads, body, (x, y, z, g))
    return kernel


def average_backward_across(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, y, z, geometry): z, the input's gradient, from y, the output's"""
    elem = ELEMS[elem_name]
    size, c_size = elem.size, compute_elem(elem).size

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        @inline
        def chunk(i, n, args):
            _, y, z, zw, dt, ht, wt, count, g = args
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

    def kernel(threads, y, z, g):
        parallel(threads, body, (0, y, z, g))
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
