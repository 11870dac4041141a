"""Pooling, as compiled. Imported only to build a kernel.

Every pooling is three-dimensional: a missing dimension has size 1. A kernel finds sizes, strides and windows in the
*geometry*, an array of int64 (``Slot`` says what lies where; the host fills it), and is written twice, for the two
ways that images lie:

*along*: the pixels of a row lie next to each other (N, C, D, H, W). All rows that a window covers are first reduced to
one, vector by vector, in a buffer that has the padding at its ends; then the windows are reduced along that row. So
neither loop asks where the image ends, and a k × k window costs k + k operations instead of k · k.

*across*: the channels of a pixel lie next to each other (N, D, H, W, C): a vector holds channels and walks the window.

Where the maximum is: torch takes the first of equal ones in row-major order, and the last NaN if there is one. A backward is
told by *codes*: the pixel's number in its window, counted through all of SIZE, in a byte or in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

from .engine.region import parallel
from .engine.simd import (
    BYTES,
    ELEMS,
    INT64,
    WORDS,
    Elem,
    compute_elem,
    even_lanes,
    first_lanes,
    fma,
    inline,
    iota_like,
    load,
    load_n,
    load_scalar,
    load_steps,
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
    DILATION,
    DIVISOR,
    IN,
    INCLUDE_PAD,
    OUT,
    PAD,
    ROOM,
    ROW_ENTRY,
    ROWS,
    SIZE,
    STRIDE,
    WHOLE,
    C,
    N,
    X,
    Y,
)

WIDTH = 4  # vectors that are worked on at once
FAR = 2**30  # the place of what is not in the image
ENTRY = 24  # bytes of an entry in the list of windows that cover a pixel
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
def start(g, d, o):
    """Where the window of output o begins in dimension d, be it outside the image"""
    return o * at(g, IN + d) // at(g, OUT + d) if at(g, ADAPTIVE) else o * at(g, STRIDE + d) - at(g, PAD + d)


@inline
def covering(g, d, i):
    """(first, end) of the outputs in dimension d among whose windows are all that cover pixel i"""
    n, outputs = at(g, IN + d), at(g, OUT + d)
    if at(g, ADAPTIVE):
        return i * outputs // n, ((i + 1) * outputs + n - 1) // n
    stride, low = at(g, STRIDE + d), i + at(g, PAD + d)
    reach = (at(g, SIZE + d) - 1) * at(g, DILATION + d)
    return max(0, low - reach + stride - 1) // stride, min(outputs, low // stride + 1)


@inline
def tap_of(g, d, o, i):
    """The number of the tap by which the window of output o, one of ``covering``, meets pixel i; -1 if it is between two taps"""
    t, step = i - start(g, d, o), at(g, DILATION + d)
    return t if step == 1 else t // step if t % step == 0 else -1


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
        if i < n:
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
        def reduce(x, xd, xh, dt, ht, y, n):
            """y = the reduction of dt · ht rows"""
            total = spread(target, nothing)
            for d in range(dt):
                row = x + d * xd
                for _h in range(ht):
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
        whole, adaptive, divisor = at(g, WHOLE), at(g, ADAPTIVE), at(g, DIVISOR)
        counts = scratch + thread * at(g, ROOM)
        buffers = counts + (w_out + L) * c_size
        length = (w_out + L) * stride + k * at(g, DILATION + 2) + w_in + 2 * L
        fill_row(buffers, ROWS * length, nothing)
        for o in range(w_out + L):
            count = window(g, 2, o)[2] if o < w_out and not divisor else 1
            store_scalar(c_elem, counts + o * c_size, count)
        channels, depth, height = at(g, C), at(g, OUT), at(g, OUT + 1)
        xn, xc, yn, yc = at(g, X), at(g, X + 1), at(g, Y), at(g, Y + 1)
        if whole:
            scale = 1.0 / float(divisor if divisor else w_in)
            first, end = over(thread, threads, at(g, N) * channels)
            n, c = first // channels, first % channels
            for _plane in range(first, end):
                total = run_input(x + n * xn + c * xc, w_in)
                store_scalar(elem, y + n * yn + c * yc, total * scale if average else total)
                c += 1
                if c == channels:
                    c = 0
                    n += 1
            return
        # Of each row of a plane's outputs: where its window begins, where it goes, rows of the window, what an average divides by
        table = buffers + ROWS * length * c_size
        for od in range(depth):
            d0, dt, dc = window(g, 0, od)
            for oh in range(height):
                h0, ht, hc = window(g, 1, oh)
                entry = table + (od * height + oh) * ROW_ENTRY
                store_scalar(INT64, entry, d0 * at(g, X + 2) + h0 * at(g, X + 3))
                store_scalar(INT64, entry + 8, od * at(g, Y + 2) + oh * at(g, Y + 3))
                store_scalar(INT64, entry + 16, dt)
                store_scalar(INT64, entry + 24, ht)
                store_scalar(INT64, entry + 32, divisor if divisor else dc * hc)
        last = table + depth * height * ROW_ENTRY
        first, end = over(thread, threads, at(g, N) * channels * depth * height)
        plane = first // (depth * height)
        entry = table + first % (depth * height) * ROW_ENTRY
        n, c = plane // channels, plane % channels
        for unit in range(first, end, ROWS):
            rows, again, n2, c2 = min(ROWS, end - unit), entry, n, c
            for r in range(rows):
                source, here = x + n * xn + c * xc + load_scalar(INT64, entry), buffers + (r * length + pad) * c_size
                dt, ht = load_scalar(INT64, entry + 16), load_scalar(INT64, entry + 24)
                entry += ROW_ENTRY
                if entry == last:
                    entry, n, c = table, n + (c + 1) // channels, (c + 1) % channels
                i = 0
                while i + W <= w_in:
                    column_several(source + i * size, xd, xh, dt, ht, here + i * c_size, W)
                    i += W
                while i + L <= w_in:
                    column_one(source + i * size, xd, xh, dt, ht, here + i * c_size, L)
                    i += L
                if i < w_in and w_in >= L:
                    i = w_in - L
                    column_one(source + i * size, xd, xh, dt, ht, here + i * c_size, L)
                elif i < w_in:
                    column_rest(source, xd, xh, dt, ht, here, w_in)
            for r in range(rows):
                buffer, target = buffers + r * length * c_size, y + n2 * yn + c2 * yc + load_scalar(INT64, again + 8)
                scale = float(load_scalar(INT64, again + 32))
                again += ROW_ENTRY
                if again == last:
                    again, n2, c2 = table, n2 + (c2 + 1) // channels, (c2 + 1) % channels
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


def _keys(c: Elem, code_size: int) -> tuple[Elem, Elem]:
    """What an element's place is kept in: in registers, integers as wide as the values; in memory (0 bytes: no code, an index)"""
    return WORDS[c.size] if c.size == 4 else INT64, BYTES[c.size] if code_size == 1 else WORDS[c.size]


@inline
def key_steps(g, codes):
    """What the next tap in depth and in height adds to a key: to a code, or to an index in the plane"""
    if codes:
        return at(g, SIZE + 1) * at(g, SIZE + 2), at(g, SIZE + 2)
    return at(g, DILATION) * at(g, IN + 1) * at(g, IN + 2), at(g, DILATION + 1) * at(g, IN + 2)


@inline
def first_key(g, codes, od, d0, oh, h0):
    """The key of the first tap inside, at depth d0 and height h0, and at the left edge of the image or of the window"""
    if codes:
        depth = (d0 - start(g, 0, od)) // at(g, DILATION)
        return (depth * at(g, SIZE + 1) + (h0 - start(g, 1, oh)) // at(g, DILATION + 1)) * at(g, SIZE + 2)
    return (d0 * at(g, IN + 1) + h0) * at(g, IN + 2)


def argmax_along(elem_name: str, code_size: int) -> Callable[..., Any]:
    """kernel(threads, x, y, z, geometry, scratch): y = the maxima, z = their codes, of 1 or 4 bytes; 0: their indices"""
    elem = ELEMS[elem_name]
    c_elem = compute_elem(elem)
    codes = code_size > 0
    keys, code = _keys(c_elem, code_size)
    L, size, c_size = elem.lanes, elem.size, c_elem.size
    fill_row, fill_keys = fill(c_elem), fill(keys)
    far = FAR

    def column(vectors: int, masked: bool) -> Any:
        source, target, places = wide(elem, vectors), wide(c_elem, vectors), wide(keys, vectors)

        @inline
        def reduce(x, xd, xh, dt, ht, i, plane, row, values, indices, n):
            """For the elements from i on of dt · ht rows, the values and keys of the maxima"""
            v = spread(target, -inf)
            number = iota_like(v) + i
            if codes:
                number = number & 0
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
        step_d, step_h = key_steps(g, codes)
        adaptive = at(g, ADAPTIVE)
        length = (w_out + L) * stride + k * at(g, DILATION + 2) + w_in + 4 * L
        values = scratch + thread * at(g, ROOM)
        places = values + length * c_size
        chosen = places + length * c_size
        fill_row(values, length, -inf)
        fill_keys(places, length, far)
        first, end = over(thread, threads, at(g, N) * at(g, C) * at(g, OUT) * at(g, OUT + 1))
        channels = at(g, C)
        n, c, od, oh = first_row(g, first, channels)
        for unit in range(first, end):
            d0, dt, _ = window(g, 0, od)
            h0, ht, _ = window(g, 1, oh)
            base = first_key(g, codes, od, d0, oh, h0)
            source, target = row_of(g, X, x, n, c, d0, h0), row_of(g, Y, y, n, c, od, oh)
            where = z + unit * w_out * (code_size if codes else 8)
            n, c, od, oh = next_row(g, channels, n, c, od, oh)
            i, here, there = 0, values + pad * c_size, places + pad * c_size
            while i + 2 * L <= w_in:
                column_several(source + i * size, xd, xh, dt, ht, i, step_d, step_h, here + i * c_size, there + i * c_size, 2 * L)
                i += 2 * L
            while i + L <= w_in:
                column_one(source + i * size, xd, xh, dt, ht, i, step_d, step_h, here + i * c_size, there + i * c_size, L)
                i += L
            if i < w_in and w_in >= L:
                i = w_in - L
                column_one(source + i * size, xd, xh, dt, ht, i, step_d, step_h, here + i * c_size, there + i * c_size, L)
            elif i < w_in:
                column_rest(source, xd, xh, dt, ht, 0, step_d, step_h, here, there, w_in)
            if adaptive:
                for o in range(w_out):
                    w0, taps, _ = window(g, 2, o)
                    v, best = load_scalar(c_elem, values + w0 * c_size), load_scalar(keys, places + w0 * c_size)
                    for t in range(1, taps):
                        place = (w0 + t) * c_size
                        u, key = load_scalar(c_elem, values + place), load_scalar(keys, places + place) + (t if codes else 0)
                        if beyond(u, key, v, best):
                            v, best = u, key
                    store_scalar(elem, target + o * size, v)
                    store_scalar(keys, chosen + o * c_size, best)
            else:
                o = 0
                while o < w_out:
                    if o + L > w_out and w_out >= L:
                        o = w_out - L
                    place = o * stride * c_size
                    v = load_steps(c_elem, values + place, stride * c_size)
                    best = load_steps(keys, places + place, stride * c_size)
                    for t in range(1, k):
                        place += tap
                        if stride == 1:
                            u, key = load(c_elem, values + place), load(keys, places + place)
                        elif stride == 2:
                            u = even_lanes(load(c_elem, values + place), load(c_elem, values + place + L * c_size))
                            key = even_lanes(load(keys, places + place), load(keys, places + place + L * c_size))
                        else:
                            u = load_steps(c_elem, values + place, stride * c_size)
                            key = load_steps(keys, places + place, stride * c_size)
                        if codes:
                            key = key + t
                        better = beyond(u, key, v, best)
                        v, best = select(better, u, v), select(better, key, best)
                    if w_out >= L:
                        store(elem, target + o * size, v)
                    else:
                        store_n(elem, target, v, w_out)
                    if codes and w_out >= L:
                        store(code, where + o * code_size, select(best < far, best + base, 0))
                    else:
                        store(keys, chosen + o * c_size, best)
                    o += L
            if not codes:
                for o in range(w_out):
                    store_scalar(INT64, where + o * 8, base + load_scalar(keys, chosen + o * c_size))
            elif adaptive or w_out < L:
                for o in range(w_out):
                    key = load_scalar(keys, chosen + o * c_size)
                    store_scalar(code, where + o * code_size, key + base if key < far else 0)

    def kernel(threads, x, y, z, g, scratch):
        parallel(threads, body, (x, y, z, g, scratch))
    return kernel


def max_backward_along(elem_name: str, code_size: int) -> Callable[..., Any]:
    """kernel(threads, y, z, codes, geometry, scratch): z, the input's gradient, from y, the output's

    A thread has whole planes. The rows of z are zeroed right before the first window that reaches them adds to them. Where
    a code means is a sum of three numbers from tables: the tap's, the window's row's and its column's. The half types are
    summed in the compute type, in scratch memory.
    """
    elem = ELEMS[elem_name]
    c_elem = compute_elem(elem)
    code = BYTES[8] if code_size == 1 else WORDS[8]
    L, size, c_size, half = elem.lanes, elem.size, c_elem.size, elem.size != c_elem.size
    fill_row, narrow_plane = fill(c_elem), copy(c_elem, elem)
    nowhere = -(2**60)

    @inline
    def prepare(g, taps, columns, rows):
        h_in, w_in, kh, kw = at(g, IN + 1), at(g, IN + 2), at(g, SIZE + 1), at(g, SIZE + 2)
        volume = at(g, IN) * h_in * w_in
        dd, dh, dw = at(g, DILATION), at(g, DILATION + 1), at(g, DILATION + 2)
        for t in range(at(g, SIZE) * kh * kw):
            place = (t // kw // kh * dd * h_in + t // kw % kh * dh) * w_in + t % kw * dw
            store_scalar(INT64, taps + t * 8, place * c_size)
        for o in range(at(g, OUT + 2)):
            place = start(g, 2, o) * c_size if window(g, 2, o)[1] else nowhere
            store_scalar(INT64, columns + o * 8, place)
        filled = 0
        for od in range(at(g, OUT)):
            d0, dt, _ = window(g, 0, od)
            for oh in range(at(g, OUT + 1)):
                h0, ht, _ = window(g, 1, oh)
                inside = dt and ht
                if inside:  # what it reaches, in whole vectors
                    last = ((d0 + (dt - 1) * dd) * h_in + h0 + (ht - 1) * dh + 1) * w_in
                    filled = max(filled, min(volume, (last + L - 1) // L * L))
                place = (start(g, 0, od) * h_in + start(g, 1, oh)) * w_in * c_size
                store_scalar(INT64, rows, place if inside else nowhere)
                store_scalar(INT64, rows + 8, filled)
                rows += 16

    @inline
    def body(thread, threads, y, z, codes, g, scratch):
        w_out, height, yh, yw = at(g, OUT + 2), at(g, OUT + 1), at(g, Y + 3), at(g, Y + 4)
        outputs, volume = at(g, OUT) * height, at(g, IN) * at(g, IN + 1) * at(g, IN + 2)
        taps = scratch + thread * at(g, ROOM)
        columns = taps + at(g, SIZE) * at(g, SIZE + 1) * at(g, SIZE + 2) * 8
        rows = columns + w_out * 8
        whole = rows + outputs * 16
        prepare(g, taps, columns, rows)
        first, end = over(thread, threads, at(g, N) * at(g, C))
        where = codes + first * outputs * w_out * code_size
        for plane in range(first, end):
            gradient, image, oh = z + plane * volume * size, plane_of(g, Y, y, plane), 0
            total, filled = whole if half else gradient, 0
            source = image
            for r in range(outputs):
                if oh == height:
                    oh = 0
                    image += at(g, Y + 2)
                    source = image
                row, last = load_scalar(INT64, rows + r * 16), load_scalar(INT64, rows + r * 16 + 8)
                if last > filled:
                    fill_row(total + filled * c_size, last - filled, 0.0)
                    filled = last
                grad = source
                for o in range(w_out):
                    place = row + load_scalar(INT64, columns + o * 8) + load_scalar(INT64, taps + load_scalar(code, where) * 8)
                    if 0 <= place < volume * c_size:
                        store_scalar(c_elem, total + place, load_scalar(c_elem, total + place) + load_scalar(elem, grad))
                    where += code_size
                    grad += yw
                source += yh
                oh += 1
            fill_row(total + filled * c_size, volume - filled, 0.0)
            if half:
                narrow_plane(total, gradient, volume)

    def kernel(threads, y, z, codes, g, scratch):
        parallel(threads, body, (y, z, codes, g, scratch))
    return kernel


def average_backward_along(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, y, z, no codes, geometry, scratch): z, the input's gradient, from y, the output's"""
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

    def kernel(threads, y, z, codes, g, scratch):
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
            x, xd, xh, xw, dt, ht, wt, y, count = args
            total = spread(target, nothing)
            for d in range(dt):
                row = x + d * xd + i * size
                for _h in range(ht):
                    part, place = spread(target, nothing) if average else total, row
                    for _w in range(wt):
                        part = both(part, load_n(source, place, n) if masked else load(source, place))
                        place += xw
                    total = both(total, part) if average else part
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
                chunks(c0, c1, (source + w0 * at(g, X + 4), xd, xh, xw, dt, ht, wt, target + ow * at(g, Y + 4),
                                float(divisor if divisor else dc * hc * wc)))

    def kernel(threads, x, y, g, scratch):
        parallel(threads, body, (x, y, g, scratch))
    return kernel


def _argmax_of_taps(source: Elem, target: Elem, masked: bool) -> Any:
    """argmax(x, n, dt, ht, wt, xd, xh, xw, kd, kh, kw): the maximum of a window and its key, counted from the first tap inside"""
    @inline
    def argmax(x, n, dt, ht, wt, xd, xh, xw, kd, kh, kw):
        v = spread(target, -inf)
        none = iota_like(v) & 0
        best = none
        for d in range(dt):
            for h in range(ht):
                place, key = x + d * xd + h * xh, d * kd + h * kh
                for _w in range(wt):
                    u = load_n(source, place, n) if masked else load(source, place)
                    better = (u > v) | (u != u)
                    v, best = select(better, u, v), select(better, none + key, best)
                    place += xw
                    key += kw
        return v, best
    return argmax


def argmax_across(elem_name: str, code_size: int) -> Callable[..., Any]:
    """kernel(threads, x, y, z, geometry, scratch): y = the maxima, z = their codes, of 1 or 4 bytes; 0: their indices"""
    elem = ELEMS[elem_name]
    size, codes, z_size = elem.size, code_size > 0, code_size if code_size else 8

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        argmax = _argmax_of_taps(source, target, masked)
        key, code = _keys(compute_elem(elem), code_size)
        vectors = target.lanes // key.lanes
        keys, code, key_size = wide(key, vectors), wide(code, vectors), key.size

        @inline
        def chunk(i, n, args):
            x, y, z, base, dt, ht, wt, xd, xh, xw, kd, kh, kw, scratch = args
            v, best = argmax(x + i * size, n, dt, ht, wt, xd, xh, xw, kd, kh, kw)
            if masked:
                store_n(source, y + i * size, v, n)
            else:
                store(source, y + i * size, v)
            if codes and not masked:
                store(code, z + i * z_size, best + base)
            else:
                store(keys, scratch, best)
                for j in range(n):
                    found = base + load_scalar(key, scratch + j * key_size)
                    if codes:
                        store_scalar(code, z + (i + j) * z_size, found)
                    else:
                        store_scalar(INT64, z + (i + j) * z_size, found)
        return chunk
    chunks = _chunks(elem, step, 2)

    @inline
    def body(thread, threads, x, y, z, g, scratch):
        width, channels, room = at(g, OUT + 2), at(g, C), scratch + thread * at(g, ROOM)
        xd, xh, xw = at(g, X + 2) * at(g, DILATION), at(g, X + 3) * at(g, DILATION + 1), at(g, X + 4) * at(g, DILATION + 2)
        (kd, kh), kw = key_steps(g, codes), 1 if codes else at(g, DILATION + 2)
        first, end = over(thread, threads, at(g, N) * at(g, OUT) * at(g, OUT + 1))
        n, c, od, oh = first_row(g, first, 1)
        for unit in range(first, end):
            d0, dt, _ = window(g, 0, od)
            h0, ht, _ = window(g, 1, oh)
            base = first_key(g, codes, od, d0, oh, h0)
            source, target = row_of(g, X, x, n, 0, d0, h0), row_of(g, Y, y, n, 0, od, oh)
            n, c, od, oh = next_row(g, 1, n, c, od, oh)
            for ow in range(width):
                w0, wt, _ = window(g, 2, ow)
                left = (w0 - start(g, 2, ow)) // at(g, DILATION + 2) if codes else w0
                chunks(0, channels, (source + w0 * at(g, X + 4), target + ow * at(g, Y + 4),
                                     z + (unit * width + ow) * channels * z_size, base + left, dt, ht, wt, xd, xh, xw, kd, kh, kw,
                                     room))

    def kernel(threads, x, y, z, g, scratch):
        parallel(threads, body, (x, y, z, g, scratch))
    return kernel


def backward_across(elem_name: str, code_size: int) -> Callable[..., Any]:
    """kernel(threads, y, z, codes, geometry, scratch): z, the input's gradient, from y, the output's; code_size 0: of averages

    Each pixel gathers what the windows that cover it give. They are listed first: where their gradients and their codes lie,
    and the code that means this pixel, or what an average is multiplied by.
    """
    elem = ELEMS[elem_name]
    c_elem = compute_elem(elem)
    size, average = elem.size, code_size == 0

    def step(source: Elem, target: Elem, masked: bool) -> Any:
        code = wide(_keys(c_elem, code_size)[1], target.lanes // c_elem.lanes)

        @inline
        def chunk(i, n, args):
            y, codes, z, entry, entries = args
            total = spread(target, 0.0)
            for _e in range(entries):
                place = y + load_scalar(INT64, entry) + i * size
                share = load_n(source, place, n) if masked else load(source, place)
                if average:
                    total = fma(share, load_scalar(c_elem, entry + 16), total)
                else:
                    place = codes + load_scalar(INT64, entry + 8) + i * code_size
                    meant = (load_n(code, place, n) if masked else load(code, place)) == load_scalar(INT64, entry + 16)
                    total = total + select(meant, share, 0.0)
                entry += ENTRY
            if masked:
                store_n(source, z + i * size, total, n)
            else:
                store(source, z + i * size, total)
        return chunk
    chunks = _chunks(elem, step, WIDTH)

    @inline
    def body(thread, threads, y, z, codes, g, scratch):
        depth, height, width, channels, block = at(g, IN), at(g, IN + 1), at(g, IN + 2), at(g, C), at(g, BLOCK)
        h_out, w_out, yw, divisor = at(g, OUT + 1), at(g, OUT + 2), at(g, Y + 4), at(g, DIVISOR)
        blocks = (channels + block - 1) // block
        columns = scratch + thread * at(g, ROOM)  # the width's windows: where each begins, and what it counts
        rows = columns + w_out * 16
        for o in range(w_out):
            store_scalar(INT64, columns + o * 16, start(g, 2, o))
            store_scalar(INT64, columns + o * 16 + 8, window(g, 2, o)[2])
        first, end = over(thread, threads, at(g, N) * blocks * depth * height)
        for unit in range(first, end):
            h, image = unit % height, unit // height
            d, b, n = image % depth, image // depth % blocks, image // depth // blocks
            c0, c1 = b * block, min(channels, b * block + block)
            pixels = rows  # the list of a pixel's windows, after that of the windows that cover its row
            d_first, d_end = covering(g, 0, d)
            h_first, h_end = covering(g, 1, h)
            for od in range(d_first, d_end):
                td = tap_of(g, 0, od, d)
                for oh in range(h_first, h_end):
                    th = tap_of(g, 1, oh, h)
                    if td >= 0 and th >= 0:
                        store_scalar(INT64, pixels, od * at(g, Y + 2) + oh * at(g, Y + 3))
                        store_scalar(INT64, pixels + 8, (od * h_out + oh) * w_out)
                        count = window(g, 0, od)[2] * window(g, 1, oh)[2]
                        key = (td * at(g, SIZE + 1) + th) * at(g, SIZE + 2)
                        store_scalar(INT64, pixels + 16, count if average else key)
                        pixels += ENTRY
            source, where = y + n * at(g, Y), codes + n * at(g, OUT) * h_out * w_out * channels * code_size
            target = z + (n * depth + d) * height * width * channels * size + h * width * channels * size
            for w in range(width):
                entry = pixels
                w_first, w_end = covering(g, 2, w)
                row = rows
                while row < pixels:
                    for ow in range(w_first, w_end):
                        t, dilation = w - load_scalar(INT64, columns + ow * 16), at(g, DILATION + 2)
                        if dilation > 1:
                            t = t // dilation if t % dilation == 0 else -1
                        if t >= 0:
                            store_scalar(INT64, entry, load_scalar(INT64, row) + ow * yw)
                            if average:
                                count = load_scalar(INT64, row + 16) * load_scalar(INT64, columns + ow * 16 + 8)
                                store_scalar(c_elem, entry + 16, 1.0 / float(divisor if divisor else count))
                            else:
                                store_scalar(INT64, entry + 8, (load_scalar(INT64, row + 8) + ow) * channels * code_size)
                                store_scalar(INT64, entry + 16, load_scalar(INT64, row + 16) + t)
                            entry += ENTRY
                    row += ENTRY
                chunks(c0, c1, (source, where, target, pixels, (entry - pixels) // ENTRY))
                target += channels * size

    def kernel(threads, y, z, codes, g, scratch):
        parallel(threads, body, (y, z, codes, g, scratch))
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
