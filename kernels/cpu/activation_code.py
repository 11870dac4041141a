"""Elementwise kernels, as compiled: one walk over the elements for all of them. Imported only to build a kernel.

Every kernel has this signature (strides in bytes, sizes in elements):

    (outer, rows, n, block, threads, inputs a, b, c, outputs y, z: address, outer stride, row stride each,
     index: outer, row and inner step, k0, k1, k2, p0, p1)

Elements lie next to each other along n (an input may instead have one value for a whole row). Threads share the rows,
or where there are few of them blocks of ``block`` elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .engine.activations import ACTIVATIONS, leaky_relu, leaky_relu_backward, logistic, logistic_and_slope
from .engine.region import parallel
from .engine.simd import (
    ELEMS,
    compute_elem,
    inline,
    iota_like,
    load,
    load_n,
    load_scalar,
    select,
    shift_right_logical,
    spread,
    store,
    store_n,
    wide,
)
from .engine.vecmath import Constant, of

# Vectors computed as one: enough to hide the latency of a polynomial. Their constants and some spills come from L1, at no cost.
WIDTH = 4
MOST_LANES = WIDTH * 16


@inline
def _load_whole(E, address, n):
    return load(E, address)


@inline
def _store_whole(E, address, value, n):
    store(E, address, value)


def elementwise(f: Callable[..., Any], inputs: str, outputs: str, one_a_row: int = 0) -> Callable[..., Any]:
    """A kernel that writes f(a, b, c, index, k0, k1, k2, p0, p1) -> (y, z).

    Args:
        inputs, outputs: names of the element types, separated by blanks; missing inputs are given as a.
        one_a_row: the number of the input (2 or 3) that has one value a row; 0 if none has.
    """
    ins, outs = [ELEMS[e] for e in inputs.split()], [ELEMS[e] for e in outputs.split()]
    count, both = len(ins), len(outs) == 2
    A, B, C = (*ins, *ins[:1] * (3 - count))
    Y, Z = outs[0], outs[-1]
    L = A.lanes
    a_size, b_size, c_size, y_size, z_size = (e.size for e in (A, B, C, Y, Z))
    b_row, c_row = one_a_row == 2, one_a_row == 3

    def one(vectors: int) -> Callable[..., Any]:
        """The step at element i over at most n elements: one vector, masked, or several whole ones."""
        a_elem, b_elem, c_elem, y_elem, z_elem = (wide(e, vectors) for e in (A, B, C, Y, Z))
        fetch, put = (_load_whole, _store_whole) if vectors > 1 else (load_n, store_n)

        @inline
        def step_at(i, n, a, b, c, y, z, index, step, k0, k1, k2, p0, p1):
            va = vb = vc = fetch(a_elem, a + i * a_size, n)
            if count > 1:
                vb = spread(b_elem, load_scalar(b_elem, b)) if b_row else fetch(b_elem, b + i * b_size, n)
            if count > 2:
                vc = spread(c_elem, load_scalar(c_elem, c)) if c_row else fetch(c_elem, c + i * c_size, n)
            vy, vz = f(va, vb, vc, index + i * step, step, k0, k1, k2, p0, p1)
            put(y_elem, y + i * y_size, vy, n)
            if both:
                put(z_elem, z + i * z_size, vz, n)
        return step_at

    several, masked, W = one(WIDTH), one(1), L * WIDTH

    @inline
    def body(thread, threads, rows, n, block, units, a, ao, ar, b, bo, br, c, co, cr, y, yo, yr, z, zo, zr,
             io, ir, step, k0, k1, k2, p0, p1):
        blocks = (n + block - 1) // block
        first, end = units * thread // threads, units * (thread + 1) // threads
        at = first % blocks
        row = first // blocks % rows
        out = first // blocks // rows
        for _unit in range(first, end):
            i, stop = at * block, min(n, at * block + block)
            ra, rb, rc = a + out * ao + row * ar, b + out * bo + row * br, c + out * co + row * cr
            ry, rz, index = y + out * yo + row * yr, z + out * zo + row * zr, out * io + row * ir
            while i + W <= stop:
                several(i, W, ra, rb, rc, ry, rz, index, step, k0, k1, k2, p0, p1)
                i += W
            while i < stop:
                masked(i, stop - i, ra, rb, rc, ry, rz, index, step, k0, k1, k2, p0, p1)
                i += L
            at += 1
            if at == blocks:
                at = 0
                row += 1
                if row == rows:
                    row = 0
                    out += 1

    def kernel(outer, rows, n, block, threads, a, ao, ar, b, bo, br, c, co, cr, y, yo, yr, z, zo, zr, io, ir, step,
               k0, k1, k2, p0, p1):
        units = outer * rows * ((n + block - 1) // block)
        parallel(threads, body, (rows, n, block, units, a, ao, ar, b, bo, br, c, co, cr, y, yo, yr, z, zo, zr,
                                 io, ir, step, k0, k1, k2, p0, p1))
    return kernel


def activation(elem: str, name: str) -> Callable[..., Any]:
    forward = ACTIVATIONS[name][1]

    @inline
    def f(x, b, c, i, step, k0, k1, k2, p0, p1):
        return forward(x, p0, p1), x
    return elementwise(f, elem, elem)


def activation_backward(elem: str, name: str) -> Callable[..., Any]:
    backward = ACTIVATIONS[name][2]

    @inline
    def f(g, x, c, i, step, k0, k1, k2, p0, p1):
        return backward(g, x, p0, p1), x
    return elementwise(f, f"{elem} {elem}", elem)


@inline
def _prelu(x, weight, c, i, step, k0, k1, k2, p0, p1):
    return leaky_relu(x, weight, p1), x


@inline
def _prelu_backward(g, x, weight, i, step, k0, k1, k2, p0, p1):
    return leaky_relu_backward(g, x, weight, p1), select(x > 0.0, 0.0, x * g)


def prelu(elem: str, one_a_row: bool) -> Callable[..., Any]:
    return elementwise(_prelu, f"{elem} {elem}", elem, 2 if one_a_row else 0)


def prelu_backward(elem: str, one_a_row: bool) -> Callable[..., Any]:
    """The second output, in the compute type, is what each element adds to its weight's gradient."""
    outputs = f"{elem} {compute_elem(ELEMS[elem]).name}"
    return elementwise(_prelu_backward, f"{elem} {elem} {elem}", outputs, 3 if one_a_row else 0)


@inline
def _glu(a, b, c, i, step, k0, k1, k2, p0, p1):
    return a * logistic(b), a


@inline
def _glu_backward(g, a, b, i, step, k0, k1, k2, p0, p1):
    s, slope = logistic_and_slope(b)
    return g * s, g * a * slope


def glu(elem: str) -> Callable[..., Any]:
    return elementwise(_glu, f"{elem} {elem}", elem)


def glu_backward(elem: str) -> Callable[..., Any]:
    return elementwise(_glu_backward, f"{elem} {elem} {elem}", f"{elem} {elem}")


# Dropout's random bits: a hash of the element's index. The constants are Wellons' "lowbias32".
LOW = Constant(-1, 0xFFFFFFFF)  # keeps the low 32 bits where lanes are wider
MULTIPLY_1, MULTIPLY_2 = Constant(0x7FEB352D, 0x7FEB352D), Constant(0x846CA68B - (1 << 32), 0x846CA68B)


@inline
def between(h):
    """Wellons' hash but for its first step and its last, both h ^ h >> 16 (nullprogram.com/blog/2018/07/31)"""
    h = (h * of(MULTIPLY_1, h)) & of(LOW, h)
    return ((h ^ shift_right_logical(h, 15)) * of(MULTIPLY_2, h)) & of(LOW, h)


@inline
def mix_scalar(h):
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def dropper(double: bool) -> Any:
    """(keys, gone), by which the bits of a number i of 64 bits are hash(hash(i's low half + key) ^ key1).

    keys(i, key0): (i's low half, what i's high half makes of key0, what the next high half does); key0, key1: the seed's low
    half and the hash of its high half.
    gone(like, low, j, step, key, next, key1, least): where the bits are below ``least``, for the numbers that are j, j + step,
    … past the one whose keys these are, in like's lanes.
    """
    sign = 0 if double else 1 << 31  # lanes of 32 bits compare signed

    @inline
    def keys(i, key0):
        high = i >> 32
        return i & 0xFFFFFFFF, mix_scalar(key0 ^ mix_scalar(high)), mix_scalar(key0 ^ mix_scalar(high + 1))

    @inline
    def gone(like, low, j, step, key, next_, key1, least):
        ahead = iota_like(like) * step
        h = (ahead + (low + j + key)) & of(LOW, ahead)
        if low + j + MOST_LANES * step >= 1 << 32:  # some may be past a multiple of 2^32
            wrapped = (((ahead + (low + j)) & of(LOW, ahead)) ^ sign) < (low - sign)
            h = (h + select(wrapped, (ahead & 0) + (next_ - key), 0)) & of(LOW, h)
        # One hash's last step and the next one's first undo each other, but for the key between them; and the last step leaves
        # the high half as it is, so that the low half matters only where the high half is least's.
        h = between(between(h ^ shift_right_logical(h, 16)) ^ (key1 ^ (key1 >> 16)))
        return (h ^ ((least >> 16) ^ sign)) < (least - sign)
    return keys, gone


def dropout(elem: str) -> Callable[..., Any]:
    """k0, k1: the keys of ``dropper``; k2: what 32 bits have to reach to keep an element."""
    keys, gone = dropper(elem == "float64")

    @inline
    def f(x, b, c, i, step, k0, k1, k2, p0, p1):
        low, key, next_key = keys(i, k0)
        return select(gone(x, low, 0, step, key, next_key, k1, k2), 0.0, x * p0), x
    return elementwise(f, elem, elem)
