"""The register tile: the one inner loop that products, convolutions, recurrences and attention share.

A ``Tile`` computes C[rows × vecs·lanes] = init + Σ_k A[:, k] ⊗ B[k, :] with every accumulator in a register: for each k a
vector row of B is loaded, each element of A's column is broadcast, and rows·vecs fused multiply-adds are issued. Nothing is
packed or blocked here; the operands say where they lie:

* A: element (i, k) at ``a + i·a_row + k·a_k``. Rows as they are in memory and packed panels differ only in these strides.
* B: row k at ``b + k·b_k`` (packed panels, or rows as they are), or, for a table tile, at ``b + table[k]`` — an image read in
  place, one offset a filter tap.
* the start: zero, or what lies at ``init`` (C itself, a bias with row stride 0, a residual); 0 means zero. It is added at the
  end, after a prefetch at the start, so that its misses hide behind the loop.
* the result goes to ``c``, in the compute type: the output, or a scratch tile that an epilogue reads while it is in L1.
* ``pairs``: bfloat16 operands two k at a time (AVX512-BF16); then k counts pairs and A's element is a pair.
* ``groups``: B's vectors lie in so many panels, ``b_group`` bytes apart: a tile of one row has enough accumulators then.

Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008, section 5; the BLIS micro-kernel.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .host import simd
from .simd import Elem, Static, i8, i32, i64, llvm_call, load_vector, multiply_add, splat, store_vector


class _BFloat(ir.types._BaseFloatType):  # llvmlite has no bfloat of its own
    null, intrinsic_name = "0.0", "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def format_constant(self, value: float) -> str:
        return str(value)


_BFloat._create_instance()


class Tile(Static):
    """A tile's fixed part.

    Args:
        elem: what is computed with (float32 or float64); memory is of the same type, but for ``pairs``.
        rows, vecs: the tile's size in rows and vectors; rows · vecs accumulators have to fit the registers.
        masked: only the first ``last`` lanes of the last vector exist, in B, init and C alike.
        table: B is addressed by a table of byte offsets.
        pairs: bfloat16 pairs.
        groups: panels of B that the vectors are divided among.
    """

    def __init__(self, elem: Elem, rows: int, vecs: int, masked: bool = False, table: bool = False, pairs: bool = False,
                 groups: int = 1) -> None:
        self.elem, self.rows, self.vecs, self.masked, self.table, self.pairs = elem, rows, vecs, masked, table, pairs
        self.groups = groups

    def __repr__(self) -> str:
        flags = "".join(n[0] for n in ("masked", "table", "pairs") if getattr(self, n))
        return f"{self.elem}:{self.rows}x{self.vecs}{flags}" + (f"g{self.groups}" if self.groups > 1 else "")


def tile_size() -> tuple[int, int]:
    """Rows and vectors of the largest tile: 24 accumulators in 32 registers, 12 in 16; three loads of B feed it."""
    return (8, 3) if simd().registers == 32 else (4, 3)


def _splat_a(builder: ir.IRBuilder, tile: Tile, address: Any) -> Any:
    if tile.pairs:
        pair = builder.load(builder.inttoptr(address, i32.as_pointer()))
        pair.align = 2
        return splat(builder, pair, tile.elem.lanes)
    return splat(builder, builder.load(builder.inttoptr(address, tile.elem.memory.as_pointer())), tile.elem.lanes)


def _load_b(builder: ir.IRBuilder, tile: Tile, address: Any, n: Any) -> Any:
    if tile.pairs:  # packed panels only, so never cut short
        vector = builder.load(builder.inttoptr(address, ir.VectorType(i32, tile.elem.lanes).as_pointer()))
        vector.align = 4
        return vector
    return load_vector(builder, tile.elem, address, n)


def _multiply_add(builder: ir.IRBuilder, tile: Tile, a: Any, b: Any, acc: Any) -> Any:
    if tile.pairs:
        pairs = ir.VectorType(_BFloat(), 2 * tile.elem.lanes)
        args = [acc, builder.bitcast(a, pairs), builder.bitcast(b, pairs)]
        return llvm_call(builder, f"llvm.x86.avx512bf16.dpbf16ps.{simd().width * 8}", acc.type, args, "")
    return multiply_add(builder, a, b, acc)


def _define(module: ir.Module, t: Tile) -> ir.Function:
    """The tile as an LLVM function: never inlined, so that its loop gets the registers for itself."""
    name = "fastnn_tile_" + "".join(c if c.isalnum() else "_" for c in repr(t))
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 12), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    n, a0, ar, ak, b0, bk, init, init_row, c, cr, last, b_group = function.args
    vb = t.elem.lanes * t.elem.size
    vt = t.elem.vector.llvm
    slots = [(i, j) for i in range(t.rows) for j in range(t.vecs)]

    def lanes(j: int) -> Any:
        return last if t.masked and j == t.vecs - 1 else None

    def at(base: Any, row: Any, i: int, j: int) -> Any:
        return builder.add(base, builder.add(builder.mul(row, i64(i)), i64(j * vb)))

    for i, j in slots:
        llvm_call(builder, "llvm.prefetch", ir.VoidType(),
                  [builder.inttoptr(at(c, cr, i, j), i8.as_pointer()), i32(1), i32(3), i32(1)], "p0")
    offsets = [builder.mul(ar, i64(i)) for i in range(t.rows)]
    panel = t.vecs // t.groups  # vectors of B next to each other
    across = [builder.add(builder.mul(b_group, i64(j // panel)), i64(j % panel * vb)) for j in range(t.vecs)]
    zero = ir.Constant(vt, [0.0] * t.elem.lanes)

    entry = builder.block
    loop, done = builder.append_basic_block("k"), builder.append_basic_block("end")
    builder.cbranch(builder.icmp_signed(">", n, i64(0)), loop, done)
    builder.position_at_end(loop)
    count, pa, pb = (builder.phi(i64) for _ in range(3))
    acc = [builder.phi(vt) for _ in slots]
    row = builder.add(b0, builder.load(builder.inttoptr(pb, i64.as_pointer()))) if t.table else pb
    bs = [_load_b(builder, t, builder.add(row, across[j]), lanes(j)) for j in range(t.vecs)]
    new: list[Any] = []
    for i in range(t.rows):
        ai = _splat_a(builder, t, builder.add(pa, offsets[i]))
        new += [_multiply_add(builder, t, ai, bs[j], acc[i * t.vecs + j]) for j in range(t.vecs)]
    left = builder.sub(count, i64(1))
    steps = [(count, n, left), (pa, a0, builder.add(pa, ak)),
             (pb, bk if t.table else b0, builder.add(pb, i64(8) if t.table else bk))]
    steps += [(p, zero, v) for p, v in zip(acc, new, strict=True)]
    for phi, first, following in steps:
        phi.add_incoming(first, entry)
        phi.add_incoming(following, loop)
    again = builder.cbranch(builder.icmp_signed(">", left, i64(0)), loop, done)
    if len(slots) >= 16:  # enough independent chains: unrolling would only press on the address registers
        no_unroll = module.add_metadata([module.add_metadata(["llvm.loop.unroll.disable"])])
        no_unroll.operands = [no_unroll, *no_unroll.operands]
        again.set_metadata("llvm.loop", no_unroll)

    builder.position_at_end(done)
    result = []
    for v in new:
        phi = builder.phi(vt)
        phi.add_incoming(zero, entry)
        phi.add_incoming(v, loop)
        result.append(phi)

    plain, start = builder.append_basic_block("plain"), builder.append_basic_block("init")
    builder.cbranch(builder.icmp_signed("==", init, i64(0)), plain, start)
    builder.position_at_end(plain)
    for (i, j), v in zip(slots, result, strict=True):
        store_vector(builder, t.elem, at(c, cr, i, j), v, lanes(j))
    builder.ret_void()
    builder.position_at_end(start)
    for (i, j), v in zip(slots, result, strict=True):
        v = builder.fadd(v, load_vector(builder, t.elem, at(init, init_row, i, j), lanes(j)))
        store_vector(builder, t.elem, at(c, cr, i, j), v, lanes(j))
    builder.ret_void()
    return function


@intrinsic
def multiply(typingctx, tile, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last):
    """multiply(tile, k, a, a_row, a_k, b, b_k | table, init, init_row, c, c_row, last): see the module. Strides in bytes."""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        builder.call(_define(builder.module, tile.value), [*args[1:], i64(0)])
        return context.get_dummy_value()
    return types.none(tile, *(types.int64,) * 11), codegen


@intrinsic
def multiply_groups(typingctx, tile, k, a, a_row, a_k, b, b_k, b_group, init, init_row, c, c_row):
    """multiply for a tile of groups, whose vectors are all whole"""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        *most, b_group, init, init_row, c, c_row = args[1:]
        builder.call(_define(builder.module, tile.value), [*most, init, init_row, c, c_row, i64(0), b_group])
        return context.get_dummy_value()
    return types.none(tile, *(types.int64,) * 11), codegen
