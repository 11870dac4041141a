"""Packing: a strided block of a matrix, copied into the order in which the register tile reads it.

A panel holds ``width`` columns of an operand, k by k: element (k, w) at ``dst + (k · width + w) · size``, in the compute type,
zero where w is past the operand's edge. Any strides can be read: columns next to each other are copied vector by vector,
k next to each other is transposed in registers in squares, anything else is gathered element by element.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .simd import (
    INT32,
    INT64,
    UINT16,
    Elem,
    compute_elem,
    i64,
    inline,
    load,
    load_n,
    load_scalar,
    load_vector,
    outline,
    spread,
    store,
    store_scalar,
    store_vector,
    transpose_vectors,
)


def _transpose(full: bool) -> Any:
    def fn(typingctx, elem, src, src_row, dst, dst_row, rows, cols):
        e: Elem = elem.value
        p = compute_elem(e)

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            _, src, src_row, dst, dst_row, rows, cols = args

            def within(i: int, limit: Any, n: Any) -> Any:  # n lanes if row i exists, else none
                return None if full else builder.select(builder.icmp_signed(">", limit, i64(i)), n, i64(0))

            lines = [load_vector(builder, e, builder.add(src, builder.mul(src_row, i64(i))), within(i, rows, cols))
                     for i in range(e.lanes)]
            for j, column in enumerate(transpose_vectors(builder, lines)):
                store_vector(builder, p, builder.add(dst, builder.mul(dst_row, i64(j))), column, within(j, cols, i64(e.lanes)))
            return context.get_dummy_value()
        return types.none(elem, *(types.int64,) * 6), codegen
    fn.__doc__ = """transpose(elem, src, src_row, dst, dst_row, rows, cols): an L × L square, or its first rows and cols; the
    lanes past ``rows`` are written as zeros"""
    return intrinsic(fn)


_transpose_full, _transpose_part = _transpose(True), _transpose(False)


@cache
def packer(elem: Elem) -> Any:
    """pack(src, s_w, s_k, w, k, dst, width): w ≤ width columns, k rows; strides in bytes, width a multiple of the lanes."""
    p = compute_elem(elem)
    lanes, size, vector, out = elem.lanes, elem.size, elem.bytes, p.bytes

    @outline
    def pack(src, s_w, s_k, w, k, dst, width):
        row = width * p.size
        if s_w == size:
            whole = w // lanes
            rest = w - whole * lanes
            eights = k // 8 * 8 if whole * lanes == width else 0  # a loop of known length is unrolled, and asks nothing
            for i in range(0, eights, 8):
                s, d = src + i * s_k, dst + i * row
                for j in range(whole):
                    for h in range(8):
                        store(p, d + h * row + j * out, load(elem, s + h * s_k + j * vector))
            for i in range(eights, k):
                s, d = src + i * s_k, dst + i * row
                for j in range(whole):
                    store(p, d + j * out, load(elem, s + j * vector))
                for j in range(whole, width // lanes):
                    store(p, d + j * out, load_n(elem, s + j * vector, rest if j == whole else 0))
        elif s_k == size:
            for w0 in range(0, width, lanes):
                wn = max(0, min(lanes, w - w0))
                s, d = src + w0 * s_w, dst + w0 * p.size
                squares = k // lanes if wn == lanes else 0
                for i in range(squares):
                    _transpose_full(elem, s + i * vector, s_w, d + i * lanes * row, row, lanes, lanes)
                if squares > 0 and squares * lanes < k:  # the last square overlaps the one before
                    _transpose_full(elem, s + (k - lanes) * size, s_w, d + (k - lanes) * row, row, lanes, lanes)
                for k0 in range(squares * lanes, k if squares == 0 else 0, lanes):
                    _transpose_part(elem, s + k0 * size, s_w, d + k0 * row, row, wn, min(lanes, k - k0))
        else:
            for i in range(k):
                s, d = src + i * s_k, dst + i * row
                for j in range(width // lanes):
                    store(p, d + j * out, spread(p, 0))
                for j in range(w):
                    store_scalar(p, d + j * p.size, load_scalar(elem, s + j * s_w))
    return pack


@cache
def pair_packer() -> Any:
    """pack_pairs(src, s_w, s_k, w, k, dst, width): 16-bit elements, two k side by side in 32 bits; an odd last k gets a zero.

    Element (k, w) at ``dst + ((k // 2) · width + w) · 4 + (k % 2) · 2``; width a multiple of the 32-bit lanes.
    """
    pack_words = packer(INT32)
    lanes = INT32.lanes

    @inline
    def element(address):
        return types.int64(load_scalar(UINT16, address)) & 0xFFFF

    @outline
    def pack_pairs(src, s_w, s_k, w, k, dst, width):
        row = width * 4
        pairs = k // 2
        if s_k == 2:
            pack_words(src, s_w, 4, w, pairs, dst, width)
        elif s_w == 2:
            for i in range(pairs):
                s, d = src + 2 * i * s_k, dst + i * row
                for j in range(width // lanes):
                    n = max(0, min(lanes, w - j * lanes))
                    low, high = load_n(UINT16, s + j * lanes * 2, n), load_n(UINT16, s + s_k + j * lanes * 2, n)
                    store(INT32, d + j * lanes * 4, low | (high << 16))
        else:
            for i in range(pairs):
                s, d = src + 2 * i * s_k, dst + i * row
                for j in range(width):
                    value = element(s + j * s_w) | element(s + s_k + j * s_w) << 16 if j < w else 0
                    store_scalar(INT32, d + j * 4, types.int32(value))
        if k % 2:
            s, d = src + (k - 1) * s_k, dst + pairs * row
            for j in range(width):
                store_scalar(INT32, d + j * 4, types.int32(element(s + j * s_w) if j < w else 0))
    return pack_pairs


@inline
def sample(address, step, count):
    """A number of a few words that are ``step`` bytes apart, by which the host sees that a packed weight has changed"""
    total = 0
    for i in range(count):
        total = total * 1000003 + load_scalar(INT64, address + i * step)
    return total
