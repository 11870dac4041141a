"""The register tile: the one inner loop that products, convolutions, recurrences and attention share.

A ``Tile`` computes C[rows × vecs·lanes] = init + Σ_k A[:, k] ⊗ B[k, :] with every accumulator in a register: for each k a
vector row of B is loaded, each element of A's column is broadcast, and rows·vecs fused multiply-adds are issued. Nothing is
packed or blocked here; the operands say where they lie:

* A: element (i, k) at ``a + i·a_row + k·a_k``. Rows as they are in memory and packed panels differ only in these strides.
* B: row k at ``b + k·b_k`` (packed panels, or rows as they are), or, for a table tile, at ``b + table[k]`` — an image read in
  place, one offset a filter tap.
* the start: zero, or what lies at ``init`` (C itself, a bias with row stride 0, a residual); 0 means zero. It is added at the
  end, after a prefetch at the start, so that its misses hide behind the loop.
* the result goes to ``c``, in the compute type: the output, or a scratch tile. Of an epilogue only the bias starts the sums;
  activation and residual are a second pass over some tiles while they are in L1, so that a tile is compiled once for all of them.
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
from .simd import BFloat, Elem, Static, i8, i32, i64, lane_mask, llvm_call, load_vector, multiply_add, splat, store_vector


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
        pairs = ir.VectorType(BFloat(), 2 * tile.elem.lanes)
        args = [acc, builder.bitcast(a, pairs), builder.bitcast(b, pairs)]
        return llvm_call(builder, f"llvm.x86.avx512bf16.dpbf16ps.{simd().width * 8}", acc.type, args, "")
    return multiply_add(builder, a, b, acc)


def _define(module: ir.Module, t: Tile) -> ir.Function:
    """The tile as an LLVM function: never inlined, so that its loop gets the registers for itself.

    It goes on to the next rows by itself: from loop to loop there are a dozen stores and hardly a branch. Calling it for each
    tile cost 100 cycles of mispredicted branches, and 400 where another hyper-thread disturbs the predictor.
    """
    name = "fastnn_tile_" + "".join(c if c.isalnum() else "_" for c in repr(t))
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 19), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    (blocks, n, stretch, a0, ar, ak, a_step, b0, bk, init0, init_row, init_step, c0, cr, c_step, last, ahead,
     ahead_k, b_group) = function.args
    vb = t.elem.lanes * t.elem.size
    vt = t.elem.vector.llvm
    slots = [(i, j) for i in range(t.rows) for j in range(t.vecs)]

    def lanes(j: int) -> Any:
        return last if t.masked and j == t.vecs - 1 else None

    def at(base: Any, row: Any, i: int, j: int) -> Any:
        return builder.add(base, builder.add(builder.mul(row, i64(i)), i64(j * vb)))

    def positive(value: Any) -> Any:
        return builder.icmp_signed(">", value, i64(0))

    # Where registers are few, the mask lies in memory that the compiler is not allowed to remember: in a register it would cost
    # an accumulator its own.
    mask = None
    if t.masked and simd().registers < 32:
        signs = ir.VectorType(ir.IntType(8 * t.elem.size), t.elem.lanes)
        mask = builder.alloca(signs)
        builder.store(builder.sext(lane_mask(builder, last, t.elem.lanes), signs), mask)

    def opaque(value: Any) -> Any:
        """The same number, which the compiler cannot see through: it would reach a row from the one before, by an addition at
        each k, instead of keeping the rows' distances in registers."""
        return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], side_effect=False)

    zero = ir.Constant(vt, [0.0] * t.elem.lanes)
    entry = builder.block
    block, part, several, usual, fours, between, loop, done, plain, start, after, following, end = map(
        builder.append_basic_block,
        ("block", "part", "several", "usual", "fours", "between", "k", "done", "plain", "init", "after", "next", "end"))
    offsets = [i64(0), *(opaque(builder.mul(ar, i64(i))) for i in range(1, t.rows))]
    panel = t.vecs // t.groups  # vectors of B next to each other
    across = [builder.add(builder.mul(b_group, i64(j // panel)), i64(j % panel * vb)) for j in range(t.vecs)]
    builder.branch(block)

    builder.position_at_end(block)
    to_do, a, init, c, ahead_block = (builder.phi(i64) for _ in range(5))
    for i, j in slots:
        llvm_call(builder, "llvm.prefetch", ir.VoidType(),
                  [builder.inttoptr(at(c, cr, i, j), i8.as_pointer()), i32(1), i32(3), i32(1)], "p0")
    builder.branch(part)

    builder.position_at_end(part)
    left, part_a, part_b, part_ahead, from_, from_row = (builder.phi(i64) for _ in range(6))
    length = builder.select(builder.icmp_signed("<", stretch, left), stretch, left)
    state = [length, part_a, part_b, part_ahead] + [zero] * len(slots)

    def phis(*incoming: tuple[Any, list[Any]]) -> list[Any]:
        nodes = [builder.phi(v.type) for v in incoming[0][1]]
        for source, values in incoming:
            for node, value in zip(nodes, values, strict=True):
                node.add_incoming(value, source)
        return nodes

    def again(nodes: list[Any], values: list[Any], source: Any) -> None:
        for node, value in zip(nodes, values, strict=True):
            node.add_incoming(value, source)

    def step(values: list[Any], ak: Any, bk: Any, fetched: int) -> list[Any]:
        """One k: the count, the pointers and the accumulators after it. What it fetches is for so many k, or none."""
        count, pa, pb, pf, *acc = values
        if fetched:
            llvm_call(builder, "llvm.prefetch", ir.VoidType(),
                      [builder.inttoptr(pf, i8.as_pointer()), i32(0), i32(2), i32(1)], "p0")
            pf = builder.add(pf, ahead_k if fetched == 1 else builder.mul(ahead_k, i64(fetched)))
        row = builder.add(b0, builder.load(builder.inttoptr(pb, i64.as_pointer()))) if t.table else pb
        exist = last
        if mask is not None:
            hidden = builder.asm(ir.FunctionType(mask.type, [mask.type]), "", "=r,0", [mask], side_effect=True)
            exist = builder.icmp_signed("<", builder.load(hidden), ir.Constant(signs, None))
        bs = [_load_b(builder, t, builder.add(row, across[j]), exist if lanes(j) is last else None) for j in range(t.vecs)]
        new: list[Any] = []
        for i in range(t.rows):
            ai = _splat_a(builder, t, builder.add(pa, offsets[i]))
            new += [_multiply_add(builder, t, ai, bs[j], acc[i * t.vecs + j]) for j in range(t.vecs)]
        return [builder.sub(count, i64(1)), builder.add(pa, ak), builder.add(pb, bk), pf, *new]

    def keep_apart(values: list[Any], address: bool) -> list[Any]:
        """Nothing, in code; the compiler must not mix one k's work with the next one's, for which there are no registers: nor,
        where A's elements lie any distance apart, for their addresses."""
        count, pa, pb, pf, *acc = values
        kept = [pa, *acc] if address else acc
        kinds = [v.type for v in kept]
        constraints = ["=r" if kind is i64 else "=x" for kind in kinds] + [*map(str, range(len(kept))), "~{memory}"]
        same = builder.asm(ir.FunctionType(ir.LiteralStructType(kinds), kinds), "", ",".join(constraints), kept,
                           side_effect=True)
        kept = [builder.extract_value(same, k) for k in range(len(kept))]
        if address:
            pa, *acc = kept
        else:
            acc = kept
        return [count, pa, pb, pf, *acc]

    # Four k at a time: fewer steps of pointers and branches, and so a sixth faster where another hyper-thread takes every second
    # slot of the core; and fewer still where the distances from k to k are the usual ones, those of A's rows and of B's panels.
    # Small tiles are edges; large ones have few such instructions, and no addresses to spare.
    by_fours = 8 <= len(slots) < 16 and simd().name == "avx2"
    builder.cbranch(builder.icmp_signed(">=", length, i64(4)), several, between) if by_fours else builder.branch(between)
    ends = [(part, state)]
    builder.position_at_end(several)
    any_k, usual_k = (ak, i64(8) if t.table else bk), (i64(t.elem.size), i64(8 if t.table else t.vecs * vb))
    as_usual = builder.icmp_signed("==", ak, usual_k[0])
    if not t.table:
        as_usual = builder.and_(as_usual, builder.icmp_signed("==", bk, usual_k[1]))
    builder.cbranch(as_usual, usual, fours)
    for these, distances in (usual, usual_k), (fours, any_k):
        builder.position_at_end(these)
        if not by_fours:
            builder.unreachable()
            continue
        first = phis((several, state))
        fetched = (1, 1, 1, 1) if these is fours else (2, 0, 2, 0)
        values = step(first, *distances, fetched[0])
        for number in fetched[1:]:
            values = step(keep_apart(values, these is fours), *distances, number)
        again(first, values, builder.block)
        ends.append((builder.block, values))
        builder.cbranch(builder.icmp_signed(">=", values[0], i64(4)), these, between)

    builder.position_at_end(between)
    rest = phis(*ends)
    builder.cbranch(positive(rest[0]), loop, done)
    builder.position_at_end(loop)
    first = phis((between, rest))
    values = step(first, *any_k, fetched=1)
    again(first, values, builder.block)
    back = builder.cbranch(positive(values[0]), loop, done)
    if len(slots) >= 8:
        no_unroll = module.add_metadata([module.add_metadata(["llvm.loop.unroll.disable"])])
        no_unroll.operands = [no_unroll, *no_unroll.operands]
        back.set_metadata("llvm.loop", no_unroll)

    builder.position_at_end(done)
    _, end_a, end_b, end_ahead, *result = phis((between, rest), (loop, values))
    builder.cbranch(builder.icmp_signed("==", from_, i64(0)), plain, start)
    builder.position_at_end(plain)
    for (i, j), v in zip(slots, result, strict=True):
        store_vector(builder, t.elem, at(c, cr, i, j), v, lanes(j))
    builder.branch(after)
    builder.position_at_end(start)
    for (i, j), v in zip(slots, result, strict=True):
        v = builder.fadd(v, load_vector(builder, t.elem, at(from_, from_row, i, j), lanes(j)))
        store_vector(builder, t.elem, at(c, cr, i, j), v, lanes(j))
    builder.branch(after)

    builder.position_at_end(after)
    remaining = builder.sub(left, length)
    builder.cbranch(positive(remaining), part, following)
    for phi, first, then in [(left, n, remaining), (part_a, a, end_a), (part_b, bk if t.table else b0, end_b),
                             (part_ahead, ahead_block, end_ahead), (from_, init, c), (from_row, init_row, cr)]:
        phi.add_incoming(first, block)
        phi.add_incoming(then, after)
    builder.position_at_end(following)
    fewer = builder.sub(to_do, i64(1))
    for phi, first, step in [(a, a0, a_step), (init, init0, init_step), (c, c0, c_step)]:
        phi.add_incoming(first, entry)
        phi.add_incoming(builder.add(phi, step), following)
    ahead_block.add_incoming(ahead, entry)
    ahead_block.add_incoming(end_ahead, following)
    to_do.add_incoming(blocks, entry)
    to_do.add_incoming(fewer, following)
    builder.cbranch(positive(fewer), block, end)
    builder.position_at_end(end)
    builder.ret_void()
    return function


@intrinsic
def multiply(typingctx, tile, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last):
    """multiply(tile, k, a, a_row, a_k, b, b_k | table, init, init_row, c, c_row, last): see the module. Strides in bytes."""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        _, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, last = args
        no = i64(0)
        builder.call(_define(builder.module, tile.value),
                     [i64(1), k, k, a, a_row, a_k, no, b, b_k, init, init_row, no, c, c_row, no, last, b, no, no])
        return context.get_dummy_value()
    return types.none(tile, *(types.int64,) * 11), codegen


@intrinsic
def multiply_groups(typingctx, tile, k, stretch, a, a_row, a_k, b, b_k, b_group, init, init_row, c, c_row):
    """multiply for a tile of groups, whose vectors are all whole; sums in stretches of k, as in multiply_blocks"""
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        _, k, stretch, a, a_row, a_k, b, b_k, b_group, init, init_row, c, c_row = args
        no = i64(0)
        builder.call(_define(builder.module, tile.value),
                     [i64(1), k, stretch, a, a_row, a_k, no, b, b_k, init, init_row, no, c, c_row, no, no, b, no, b_group])
        return context.get_dummy_value()
    return types.none(tile, *(types.int64,) * 12), codegen


@intrinsic
def multiply_blocks(typingctx, tile, blocks, k, stretch, a, a_row, a_k, a_step, b, b_k, init, init_row, init_step, c, c_row,
                    c_step, last, ahead, ahead_k):
    """multiply_blocks(tile, blocks, k, stretch, a, a_row, a_k, a_step, b, b_k | table, init, init_row, init_step, c, c_row,
    c_step, last, ahead, ahead_k): ``multiply`` for ``blocks`` tiles one below the other, ``…_step`` bytes apart (0 where init
    is 0), each sum in stretches of k between which it waits in C. With every k, what lies at ``ahead`` is fetched into L2 and
    ``ahead`` moves on by ``ahead_k``; with every second one where A's rows and B's panels lie as usual.
    """
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        builder.call(_define(builder.module, tile.value), [*args[1:], i64(0)])
        return context.get_dummy_value()
    return types.none(tile, *(types.int64,) * 18), codegen
