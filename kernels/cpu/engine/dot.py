"""Streams: products that read each element of a matrix once, so that memory sets their pace.

``dot``: rows · vectors scalar products at once, for matrices whose rows lie along the summed index; each element of W that is
loaded serves ``vectors`` right-hand sides. ``add_rows``: y += Σ_k x[k] · W[k, :], for matrices whose rows lie across it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .simd import (
    Elem,
    Static,
    compute_elem,
    fma,
    i32,
    i64,
    load,
    load_n,
    load_scalar,
    load_vector,
    multiply_add,
    outline,
    spread,
    store,
    store_n,
)


class Dot(Static):
    """rows of W times ``vectors`` right-hand sides; W and the right-hand sides in ``elem``, the results in the compute type.

    ``unroll``: vectors along k that are summed side by side. A product of one row has one stream to read, but needs about eight
    independent sums to hide the latency of an addition.
    """

    def __init__(self, elem: Elem, rows: int, vectors: int, unroll: int = 1) -> None:
        self.elem, self.rows, self.vectors, self.unroll = elem, rows, vectors, unroll

    def __repr__(self) -> str:
        return f"{self.elem}:{self.rows}x{self.vectors}x{self.unroll}"


def _sums_of_lanes(builder: ir.IRBuilder, vectors: list[Any]) -> list[Any]:
    """Each vector's sum, two vectors' halves by one addition: a fixed tree, and half the instructions of one after the other"""
    lanes = vectors[0].type.count
    items = [(v, [i]) for i, v in enumerate(vectors)]  # a vector, and whose parts it has, one after the other
    part = lanes
    while part > 1:
        half, joined = part // 2, []
        for i in range(0, len(items), 2):
            (x, xs), (y, ys) = items[i], items[min(i + 1, len(items) - 1)]
            low = [base + start + lane for start in range(0, lanes, part) for base in (0, lanes) for lane in range(half)]
            index = ir.VectorType(i32, lanes)
            ends = (builder.shuffle_vector(x, y, ir.Constant(index, [lane + up for lane in low])) for up in (0, half))
            joined.append((builder.fadd(*ends), [owner for pair in zip(xs, ys, strict=True) for owner in pair]))
        items, part = joined, half
    places = {owner: (v, lane) for v, owners in items for lane, owner in enumerate(owners)}
    return [builder.extract_element(v, i32(lane)) for v, lane in map(places.__getitem__, range(len(vectors)))]


def _define(module: ir.Module, d: Dot) -> ir.Function:
    name = "fastnn_dot_" + "".join(c if c.isalnum() else "_" for c in repr(d))
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 7), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    k, w, w_row, x, x_row, y, y_row = function.args
    e, p = d.elem, compute_elem(d.elem)
    vt = p.vector.llvm
    zero = ir.Constant(vt, [0.0] * p.lanes)
    grid = [(r, v) for r in range(d.rows) for v in range(d.vectors)]

    def step(wp: Any, xp: Any, acc: list[Any], n: Any) -> list[Any]:
        xs = [load_vector(builder, e, builder.add(xp, builder.mul(x_row, i64(v))), n) for v in range(d.vectors)]
        new = []
        for r in range(d.rows):
            wr = load_vector(builder, e, builder.add(wp, builder.mul(w_row, i64(r))), n)
            new += [multiply_add(builder, wr, xs[v], acc[r * d.vectors + v]) for v in range(d.vectors)]
        return new

    def loop(count: Any, wp: Any, xp: Any, unroll: int, start: list[Any]) -> tuple[Any, Any, list[Any]]:
        """So many steps of ``unroll`` vectors; the addresses after them, and the sums."""
        before = builder.block
        body, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed(">", count, i64(0)), body, after)
        builder.position_at_end(body)
        left, w_at, x_at = (builder.phi(i64) for _ in range(3))
        acc = [builder.phi(vt) for _ in start]
        new: list[Any] = []
        for u in range(unroll):
            here = i64(u * e.bytes)
            new += step(builder.add(w_at, here), builder.add(x_at, here), acc[u * len(grid) : (u + 1) * len(grid)], None)
        next_left, stride = builder.sub(left, i64(1)), i64(unroll * e.bytes)
        following = [builder.add(w_at, stride), builder.add(x_at, stride), *new]
        for phi, first, then in zip((left, w_at, x_at, *acc), (count, wp, xp, *start), (next_left, *following), strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, body)
        builder.cbranch(builder.icmp_signed(">", next_left, i64(0)), body, after)
        builder.position_at_end(after)
        result = []
        for first, then in zip((wp, xp, *start), following, strict=True):
            phi = builder.phi(then.type)
            phi.add_incoming(first, before)
            phi.add_incoming(then, body)
            result.append(phi)
        return result[0], result[1], result[2:]

    whole = builder.ashr(k, i64(e.lanes.bit_length() - 1))
    rest = builder.and_(k, i64(e.lanes - 1))
    so_far = [zero] * len(grid)
    if d.unroll > 1:
        w, x, sums = loop(builder.sdiv(whole, i64(d.unroll)), w, x, d.unroll, so_far * d.unroll)
        while len(sums) > len(grid):  # halves onto halves
            half = len(sums) // 2
            sums = [builder.fadd(p, q) for p, q in zip(sums[:half], sums[half:], strict=True)]
        whole, so_far = builder.srem(whole, i64(d.unroll)), sums
    w, x, so_far = loop(whole, w, x, 1, so_far)
    tail, masked, done = builder.block, builder.append_basic_block("masked"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", rest, i64(0)), masked, done)
    builder.position_at_end(masked)
    more = step(w, x, so_far, rest)
    builder.branch(done)
    builder.position_at_end(done)
    for (r, v), a, b in zip(grid, so_far, more, strict=True):
        phi = builder.phi(vt)
        phi.add_incoming(a, tail)
        phi.add_incoming(b, masked)
        so_far[r * d.vectors + v] = phi
    for (r, v), total in zip(grid, _sums_of_lanes(builder, so_far), strict=True):
        address = builder.add(y, builder.add(builder.mul(y_row, i64(v)), i64(r * p.size)))
        builder.store(total, builder.inttoptr(address, p.memory.as_pointer()))
    builder.ret_void()
    return function


@intrinsic
def dot(typingctx, shape, k, w, w_row, x, x_row, y, y_row):
    """dot(shape, k, w, w_row, x, x_row, y, y_row): y[v][r] = Σ_k w[r][k] · x[v][k]; row strides in bytes."""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        builder.call(_define(builder.module, shape.value), args[1:])
        return context.get_dummy_value()
    return types.none(shape, *(types.int64,) * 7), codegen


@cache
def row_adder(e: Elem, factors: Elem | None = None) -> Any:
    """add_rows(k, n, w, w_row, x, x_step, y): y[0:n] += Σ x[i] · w[i][0:n]; x = 0 stands for ones. y in the compute type.

    ``factors``: x's elements, where they are others than w's.
    """
    p, xe = compute_elem(e), factors or e

    @outline
    def add_rows(k, n, w, w_row, x, x_step, y):
        one = spread(p, 1.0)
        i = 0
        while i < k:
            rows = 8 if k - i >= 8 else 1
            a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = one
            if x != 0:
                a0 = spread(p, load_scalar(xe, x + i * x_step))
                if rows == 8:
                    a1 = spread(p, load_scalar(xe, x + (i + 1) * x_step))
                    a2 = spread(p, load_scalar(xe, x + (i + 2) * x_step))
                    a3 = spread(p, load_scalar(xe, x + (i + 3) * x_step))
                    a4 = spread(p, load_scalar(xe, x + (i + 4) * x_step))
                    a5 = spread(p, load_scalar(xe, x + (i + 5) * x_step))
                    a6 = spread(p, load_scalar(xe, x + (i + 6) * x_step))
                    a7 = spread(p, load_scalar(xe, x + (i + 7) * x_step))
            r = w + i * w_row
            if rows == 8:
                for j in range(n // e.lanes):
                    q = r + j * e.bytes
                    s = fma(load(e, q), a0, load(p, y + j * p.bytes))
                    s = fma(load(e, q + w_row), a1, s)
                    s = fma(load(e, q + 2 * w_row), a2, s)
                    s = fma(load(e, q + 3 * w_row), a3, s)
                    t = load(e, q + 4 * w_row) * a4
                    t = fma(load(e, q + 5 * w_row), a5, t)
                    t = fma(load(e, q + 6 * w_row), a6, t)
                    t = fma(load(e, q + 7 * w_row), a7, t)
                    store(p, y + j * p.bytes, s + t)
                j = n // e.lanes
                m = n - j * e.lanes
                if m > 0:
                    q, z = r + j * e.bytes, y + j * p.bytes
                    s = fma(load_n(e, q, m), a0, load_n(p, z, m))
                    s = fma(load_n(e, q + w_row, m), a1, s)
                    s = fma(load_n(e, q + 2 * w_row, m), a2, s)
                    s = fma(load_n(e, q + 3 * w_row, m), a3, s)
                    t = load_n(e, q + 4 * w_row, m) * a4
                    t = fma(load_n(e, q + 5 * w_row, m), a5, t)
                    t = fma(load_n(e, q + 6 * w_row, m), a6, t)
                    t = fma(load_n(e, q + 7 * w_row, m), a7, t)
                    store_n(p, z, s + t, m)
            else:
                for j in range((n + e.lanes - 1) // e.lanes):
                    m = min(n - j * e.lanes, e.lanes)
                    z = y + j * p.bytes
                    store_n(p, z, fma(load_n(e, r + j * e.bytes, m), a0, load_n(p, z, m)), m)
            i += rows
    return add_rows
