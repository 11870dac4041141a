"""Attention, as compiled: the softmax of a block of scores between two register-tile products. Imported only to build a kernel.

Forward: Dao 2023, "FlashAttention-2", algorithm 1; backward: algorithm 2, with a task that owns a head's keys instead of atomic
sums. Sizes in elements, strides in bytes, addresses int64; ``attention_fields`` lists what ``f`` and the table point to.

Logits are kept in units of log 2. Keys are packed transposed in panels of two vectors, values as rows, once for all the blocks
that read them; a block of queries is copied into rows of the compute type, so that every operand of a tile is contiguous.
Where the CPU multiplies pairs of bfloat16 all stay bfloat16: two numbers of a head lie side by side, and two keys' values.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log
from typing import Any

from .activation_code import dropper
from .attention_fields import BOOLEAN, FIELDS, NO_MASK, SAME, TABLE
from .engine.dot import Dot, dot, row_adder
from .engine.host import simd
from .engine.pack import packer, pair_packer
from .engine.region import parallel_tasks
from .engine.simd import (
    BYTES,
    ELEMS,
    FLOAT64,
    INT64,
    UINT16,
    Elem,
    absolute,
    compute_elem,
    first_lane,
    first_lanes,
    flushed,
    fma,
    fold_add,
    inline,
    iota_like,
    load,
    load_n,
    load_scalar,
    maximum_fast,
    outline,
    prefetch,
    reduce_add,
    reduce_max,
    reduce_max_fast,
    select,
    spread,
    store,
    store_n,
    store_scalar,
    to_float,
    wide,
)
from .engine.tile import Tile, multiply_blocks
from .engine.vecmath import exp2_below, exp2_below_short, tanh
from .engine.vecmath import log as natural_log

ROWS = 12 if simd().registers == 32 else 6  # of a tile of two vectors: 24 accumulators, or 12
FEW = 4  # rows of a tile where all queries are few
CHAIN = 256  # products that one accumulator sums up, as matmul_code's
LOG2_E, LN_2 = 1 / log(2), log(2)
LOWEST = {4: -2e38, 8: -1e308}  # by size: what a mask adds at least, if it is not -Inf; times LOG2_E it is finite
WIDTH, BACK_WIDTH = 4, 2  # vectors of a row that are computed as one

(HEADS, GROUP, PAIRS, D, DV, QH, QL, QD, KH, KL, KD, VH, VL, VD, OH, OL, MH, MQ, MK, AH, MASK_KIND, PLAIN, ROW_H, ALL_ROWS, LEFT,
 RIGHT, BOTTOM, PREFIX, DROP, DROP_H, DROP_L, KEY0, KEY1, BQ, BK, BH, POS_BLOCKS, HEAD_BLOCKS, SPLITS, DIRECT, WAVE, CHUNKS,
 PACK_K, PACK_V, PACK, OWN, PART, GH, GL, XH, XL, YH, YL, ZH, ZL, BIAS_Q, BIAS_K, BIAS_H, BIAS_CHAIN, PARTS,
 DQ_PART) = (8 * i for i in range(len(FIELDS)))
(T_Q, T_K, T_V, T_O, T_MASK, T_SLOPE, T_ROW, T_LQ, T_LK, T_DROP, T_G, T_DQ, T_DK, T_DV, T_BIAS, T_DQ_ROW, T_DQ_H) = (
    8 * i for i in range(len(TABLE)))
TABLE_ROW = 8 * len(TABLE)
# What is known of a row of a block: numbers of eight bytes each.
LO, HI, MASK, INDEX, SLOPE, PLACE, OFFSET, SUM = range(0, 64, 8)
ROW = 72


@inline
def at(f, field):
    return load_scalar(INT64, f + field)


@inline
def up(n, unit):
    return (n + unit - 1) // unit * unit


def part_store(e: Elem) -> Any:
    """put(address, x, n): the first n lanes, or all. A masked store costs as much as ten others where there is no AVX-512."""
    @inline
    def put(address, x, n):
        if n >= e.lanes:
            store(e, address, x)
        else:
            store_n(e, address, x, n)
    return put


def rounder(p: Elem) -> Any:
    """p_of(x): a number in the compute type"""
    @inline
    def p_of(x):
        return first_lane(spread(p, x))
    return p_of


def fetching_product(p: Elem, height: int, pairs: bool = False) -> Any:
    """multiply(tiles, vecs, k, a, a_row, a_k, b, b_k, b_panel, add, c, c_row, ahead, ahead_k, ahead_panel): C (+)= A B, tiles of
    ``height`` rows; B in panels of two vectors ``b_panel`` bytes apart, rows of a panel b_k apart. With each k of a panel what
    lies at ``ahead`` is fetched, which moves on by ahead_k, from panel to panel by ahead_panel. Pairs: of bfloat16; k counts
    them."""
    two, one = Tile(p, height, 2, pairs=pairs), Tile(p, height, 1, pairs=pairs)
    panel = 2 * p.bytes

    @outline
    def multiply(tiles, vecs, k, a, a_row, a_k, b, b_k, b_panel, add, c, c_row, ahead, ahead_k, ahead_panel):
        if tiles <= 0 or k <= 0:
            return
        parts = (k + CHAIN - 1) // CHAIN
        stretch = (k + parts - 1) // parts
        step = c_row * height
        for j in range((vecs + 1) // 2):
            cj, bj = c + j * panel, b + j * b_panel
            init, init_row, init_step = (cj, c_row, step) if add else (0, 0, 0)
            if vecs - 2 * j >= 2:
                multiply_blocks(two, tiles, k, stretch, a, a_row, a_k, height * a_row, bj, b_k, init, init_row, init_step, cj,
                                c_row, step, p.lanes, ahead + j * ahead_panel, ahead_k)
            else:
                multiply_blocks(one, tiles, k, stretch, a, a_row, a_k, height * a_row, bj, b_k, init, init_row, init_step, cj,
                                c_row, step, p.lanes, bj, 0)
    return multiply


def product(p: Elem, pairs: bool = False) -> Any:
    """multiply(tiles, vecs, k, a, a_row, a_k, b, b_k, b_panel, add, c, c_row): the same with tiles of ROWS rows, which fetch the
    next panel of B."""
    fetching, panel = fetching_product(p, ROWS, pairs), 2 * p.bytes

    @inline
    def multiply(tiles, vecs, k, a, a_row, a_k, b, b_k, b_panel, add, c, c_row):
        fetching(tiles, vecs, k, a, a_row, a_k, b, b_k, b_panel, add, c, c_row, b + b_panel, panel // max(1, tiles), b_panel)
    return multiply


def rows_of(e: Elem) -> Any:
    """prepare(f, entry, mask, slopes, h0, nh, i0, nq, shift, st): what is known of a block's rows, written to st."""
    p = compute_elem(e)

    @outline
    def prepare(f, entry, mask, slopes, h0, nh, i0, nq, shift, st):
        lk = at(entry, T_LK)
        left, right = at(f, LEFT), at(f, RIGHT)
        prefix = at(f, PREFIX) if right > 0 else 0  # of these positions a window hides nothing on the right
        for h in range(nh):
            for i in range(nq):
                row = st + (h * nq + i) * ROW
                place = i0 + i + shift
                store_scalar(INT64, row + LO, min(max(place - left, 0), lk) if left >= 0 else 0)
                inside = right >= 0 and not 0 <= place < prefix
                store_scalar(INT64, row + HI, min(max(place + right + 1, 0), lk) if inside else lk)
                store_scalar(FLOAT64, row + SLOPE, 0.0)
                if at(f, PLAIN) and at(f, DROP) == 0:
                    continue
                store_scalar(INT64, row + MASK, mask + at(entry, T_MASK) + (h0 + h) * at(f, MH) + (i0 + i) * at(f, MQ))
                store_scalar(INT64, row + INDEX, at(entry, T_DROP) + (h0 + h) * at(f, DROP_H) + (i0 + i) * at(f, DROP_L))
                if slopes != 0:
                    slope = float(load_scalar(p, slopes + at(entry, T_SLOPE) + (h0 + h) * at(f, AH)))
                    store_scalar(FLOAT64, row + SLOPE, slope * LOG2_E)
                store_scalar(FLOAT64, row + PLACE, float(place))
    return prepare


def logit(e: Elem) -> Any:
    """(known(f, row), logits(known, s, j, j0, n, scale, softcap)): the logits of columns j … of a block of n from key j0 on, -Inf
    where the row may not look, and tanh's value for softcap. ``known`` is read once, as stores might change memory."""
    p = compute_elem(e)
    flags, lowest = BYTES[p.size], LOWEST[p.size]

    @inline
    def known(f, row):
        return (load_scalar(INT64, row + LO), load_scalar(INT64, row + HI), at(f, PREFIX), load_scalar(FLOAT64, row + SLOPE),
                load_scalar(FLOAT64, row + PLACE), at(f, MASK_KIND), load_scalar(INT64, row + MASK), at(f, MK))

    @inline
    def logits(known, s, j, j0, n, scale, softcap):
        lo, hi, prefix, slope, place, kind, mask, step = known
        x = load(p, s + j * p.size)
        t = x
        if softcap != 0.0:
            t = tanh(x * (scale / softcap))
            x = t * (softcap * LOG2_E)
        else:
            x = x * (scale * LOG2_E)
        here = iota_like(x) + (j0 + j)
        if slope != 0.0:
            x = x - absolute(to_float(here) - place) * slope
        seen = (here >= lo) & (here < hi) | (here < prefix)
        seen = seen & first_lanes(p, n - j)
        if kind != NO_MASK:
            m = mask + (j0 + j) * step
            left = min(n - j, p.lanes) if step != 0 else 1
            whole = left == p.lanes
            if kind == BOOLEAN:
                flag = load(flags, m) if whole else load_n(flags, m, left)
                if step == 0:
                    flag = (here & 0) + first_lane(flag)
                seen = seen & (flag != 0)
            else:
                if kind == SAME:
                    bias = load(e, m) if whole else load_n(e, m, left)
                else:
                    bias = load(p, m) if whole else load_n(p, m, left)
                if step == 0:
                    bias = spread(p, first_lane(bias))
                # Lowest numbers, which many write for -Inf, stay numbers.
                x = select(bias == -inf, -inf, fma(maximum_fast(spread(p, lowest), bias), LOG2_E, x))
        return select(seen, x, -inf), t
    return known, logits


def only_biased(e: Elem) -> Any:
    """biased(f, row, softcap): whether logits are scaled products plus numbers of the queries' dtype that lie next to each other,
    for all keys between the row's ends."""
    @inline
    def biased(f, row, softcap):
        return at(f, MASK_KIND) == SAME and at(f, MK) == e.size and softcap == 0.0 and load_scalar(FLOAT64, row + SLOPE) == 0.0
    return biased


def attention(elem_name: str, *flags: str) -> Callable[..., Any]:
    """kernel(threads, fields, table, q, k, v, mask, slopes, out, lse, stats, packed, scratch, partial, scale, softcap, keep)

    flags: "pairs": both products multiply pairs of bfloat16, of numbers of a head and of keys; weights are rounded, in place.
    There is no dropout then.
    """
    e, pairs = ELEMS[elem_name], "pairs" in flags
    p = compute_elem(e)
    lowest = LOWEST[p.size]
    several, biases = wide(p, WIDTH), wide(e, WIDTH)
    L, W, size = p.lanes, p.lanes * WIDTH, p.size
    panel = 2 * L  # keys of a packed panel
    pack, multiply, prepare = pair_packer() if pairs else packer(e), product(p, pairs), rows_of(e)
    copy_rows, operand = packer(UINT16 if pairs else e), e.size if pairs else size
    multiply_few = fetching_product(p, FEW)
    (known, logits), biased = logit(e), only_biased(e)
    p_of, put = rounder(p), part_store(e)
    drop_keys, gone = dropper(size == 8)
    add_rows, part_vectors = row_adder(e, p), e.size != p.size
    d1, d2, d4 = Dot(e, 2, 1, 2), Dot(e, 2, 2), Dot(e, 2, 4)
    one1, one2, one4 = Dot(e, 1, 1, 2), Dot(e, 1, 2), Dot(e, 1, 4)

    @inline
    def deep(k):
        """What a tile counts as k"""
        return (k + 1) // 2 if pairs else k

    @outline
    def largest(s, n):
        best, j = spread(several, -inf), 0
        while j + W <= n:
            best = maximum_fast(load(several, s + j * size), best)
            j += W
        top = reduce_max_fast(best)
        if j < n:
            rest = spread(p, top)
            while j < n:
                rest = maximum_fast(select(first_lanes(p, n - j), load(p, s + j * size), -inf), rest)
                j += L
            top = reduce_max_fast(rest)
        return top

    @outline
    def shape(f, row, s, n, j0, scale, softcap):
        """The logits in place of the products; the largest of them"""
        best, of_row = spread(p, -inf), known(f, row)
        for j in range(0, n, L):
            x, _ = logits(of_row, s, j, j0, n, scale, softcap)
            store(p, s + j * size, x)
            best = maximum_fast(x, best)
        return reduce_max(best)

    @outline
    def shape_biased(s, n, bias, factor):
        """The same where there is a bias and nothing else"""
        best, j = spread(several, -inf), 0
        while j + W <= n:
            x = fma(load(biases, bias + j * e.size), LOG2_E, load(several, s + j * size) * factor)
            store(several, s + j * size, x)
            best = maximum_fast(x, best)
            j += W
        top = reduce_max(best)
        while j < n:
            x = fma(load_n(e, bias + j * e.size, min(L, n - j)), LOG2_E, load(p, s + j * size) * factor)
            store(p, s + j * size, x)
            top = max(top, reduce_max(select(first_lanes(p, n - j), x, -inf)))
            j += L
        return top

    @outline
    def shape_lowest(s, n, bias):
        """Of a row whose logits are all -Inf: those of the lowest biases, to which nothing can be added, are not"""
        best, low = spread(p, -inf), spread(p, lowest)
        for j in range(0, n, L):
            x, added = load(p, s + j * size), load_n(e, bias + j * e.size, min(L, n - j))
            x = select((x == -inf) & (added < low) & (added != -inf) & first_lanes(p, n - j), low * LOG2_E, x)
            store(p, s + j * size, x)
            best = maximum_fast(select(first_lanes(p, n - j), x, -inf), best)
        return reduce_max(best)

    def exponentials_as(lies: Elem) -> Any:
        """exponentials(s, n, room, factor, offset): exp2 in place, as they lie then; zeros up to ``room``; the sum"""
        lies = flushed(lies)
        weights, weight = wide(lies, WIDTH), lies.size
        exp2 = exp2_below if lies.size == size else exp2_below_short

        @outline
        def exponentials(s, n, room, factor, offset):
            total, j = spread(p, 0.0), 0
            while j + W <= n:
                x = exp2(load(several, s + j * size) * factor - offset)  # not fused, so that it is 0 at the largest
                store(weights, s + j * weight, x)
                total = total + fold_add(p, x)  # one sum in a register; four would be kept in memory
                j += W
            while j < n:
                x = select(first_lanes(p, n - j), exp2(load(p, s + j * size) * factor - offset), 0.0)
                store(lies, s + j * weight, x)
                total = total + x
                j += L
            while j < room:
                store(lies, s + j * weight, spread(p, 0.0))
                j += L
            return reduce_add(total)
        return exponentials

    @outline
    def drop_some(f, s, n, index):
        low, key, next_key = drop_keys(index, at(f, KEY0))
        key1, least = at(f, KEY1), at(f, DROP)
        for j in range(0, n, W):  # what lies behind the row is 0, or nobody's
            x = load(several, s + j * size)
            store(several, s + j * size, select(gone(x, low, j, 1, key, next_key, key1, least), 0.0, x))

    # Where keys are read as they lie weights are numbers of the compute type; in pairs they fill their row's first half.
    exponentials = exponentials_as(p)
    exponentials_of_pairs = exponentials_as(e) if pairs else exponentials

    @inline
    def fetch(address, n):
        for j in range(0, n * e.size, 64):
            prefetch(address + j)

    @outline
    def weigh(f, st, rows, s, s_row, o, o_row, vecs, j0, n, first, next_q, next_k, next_v, scale, softcap):
        """The block's products become weights; what was summed before is scaled to the new offsets. With each row, one of the
        queries, keys and values that come next is fetched, if there is one."""
        plain = at(f, PLAIN)
        prefix = at(f, PREFIX)
        for r in range(rows):
            row, sr = st + r * ROW, s + r * s_row
            if next_q != 0:
                fetch(next_q + r * at(f, QL), at(f, D))
                fetch(next_k + r * at(f, KL), at(f, D))
                fetch(next_v + r * at(f, VL), at(f, DV))
            lo, hi = load_scalar(INT64, row + LO), load_scalar(INT64, row + HI)
            here = max(0, min(n, hi - j0))
            factor = p_of(scale * LOG2_E)
            whole = lo <= j0 and (prefix <= j0 or hi >= prefix)
            if plain and whole:
                top = largest(sr, here) * factor
            else:
                if whole and biased(f, row, softcap):
                    bias = load_scalar(INT64, row + MASK) + j0 * e.size
                    top = shape_biased(sr, here, bias, factor)
                    if top == -inf:
                        top = shape_lowest(sr, here, bias)
                else:
                    here = n
                    top = shape(f, row, sr, n, j0, scale, softcap)
                factor = p_of(1.0)
            old = -inf if first else load_scalar(FLOAT64, row + OFFSET)
            new = max(float(top), old)
            base = 0.0 if new == -inf else new
            if pairs and at(f, DIRECT) == 0:
                total = float(exponentials_of_pairs(sr, here, n, factor, base))
            else:
                total = float(exponentials(sr, here, n, factor, base))
            if not first:
                before = load_scalar(FLOAT64, row + SUM)
                if new > old and old > -inf:
                    shrink = first_lane(exp2_below(spread(p, old - new)))
                    before = before * shrink
                    for j in range(vecs):
                        at_o = o + r * o_row + j * p.bytes
                        store(p, at_o, load(p, at_o) * shrink)
                total = total + before
            store_scalar(FLOAT64, row + OFFSET, new)
            store_scalar(FLOAT64, row + SUM, total)
            if at(f, DROP) != 0:
                drop_some(f, sr, here, load_scalar(INT64, row + INDEX) + j0)

    @inline
    def dots(n, d, k, k_row, x, x_row, count, s, s_row):
        """Products of n keys as they lie with ``count`` queries as they lie, two keys at a time, as four or eight rows side by
        side are read slower. The next n are fetched meanwhile."""
        v = 0
        while v < count:
            many = 4 if count - v >= 4 else 2 if count - v >= 2 else 1
            for j in range(0, n, 2):
                rest = (d, k + j * k_row, k_row, x + v * x_row, x_row, s + v * s_row + j * size, s_row)
                if v == 0:
                    fetch(k + (n + j) * k_row, d)
                    fetch(k + (n + j + 1) * k_row, d)
                if many == 4:
                    if n - j > 1:
                        dot(d4, *rest)
                    else:
                        dot(one4, *rest)
                elif many == 2:
                    if n - j > 1:
                        dot(d2, *rest)
                    else:
                        dot(one2, *rest)
                elif n - j > 1:
                    dot(d1, *rest)
                else:
                    dot(one1, *rest)
            v += many

    @outline
    def add_values(n, dv, v, v_row, s, o, start):
        """o (+)= n values as they lie times their weights, two at a time, while the next n are fetched"""
        if start:
            for j in range(0, dv, L):
                store(p, o + j * size, spread(p, 0.0))
        for i in range(0, n, 2):
            fetch(v + (n + i) * v_row, dv)
            fetch(v + (n + i + 1) * v_row, dv)
            row, x, y, next_ = v + i * v_row, spread(p, load_scalar(p, s + i * size)), spread(p, 0.0), 0
            if i + 1 < n:
                y, next_ = spread(p, load_scalar(p, s + (i + 1) * size)), v_row
            for j in range(0, dv // L * L, L):
                at_v, at_o = row + j * e.size, o + j * size
                store(p, at_o, fma(load(e, at_v), x, fma(load(e, at_v + next_), y, load(p, at_o))))
            j = dv // L * L
            if j < dv:
                at_v, at_o = row + j * e.size, o + j * size
                store(p, at_o, fma(load_n(e, at_v, dv - j), x, fma(load_n(e, at_v + next_, dv - j), y, load(p, at_o))))

    @outline
    def finish(f, entry, st, h0, nh, i0, nq, o, o_row, out, lse, stats, keep):
        dv = at(f, DV)
        for h in range(nh):
            for i in range(nq):
                row = st + (h * nq + i) * ROW
                offset, total = load_scalar(FLOAT64, row + OFFSET), load_scalar(FLOAT64, row + SUM)
                inverse = 0.0 if total == 0.0 else keep / total
                src = o + (h * nq + i) * o_row
                dst = out + at(entry, T_O) + (h0 + h) * at(f, OH) + (i0 + i) * at(f, OL)
                for j in range(0, dv, L):
                    x = load(p, src + j * size) * inverse
                    if total == 0.0:
                        x = spread(p, 0.0)
                    put(dst + j * e.size, x, dv - j)
                number = at(entry, T_ROW) + (h0 + h) * at(f, ROW_H) + i0 + i
                store_scalar(p, stats + number * size, p_of(offset))
                store_scalar(p, stats + (number + at(f, ALL_ROWS)) * size, p_of(total))
                if lse != 0:
                    whole = -inf if total == 0.0 else offset * LN_2 + first_lane(natural_log(spread(FLOAT64, total)))
                    store_scalar(p, lse + number * size, p_of(whole))

    @inline
    def addresses(f, own):
        """A thread's scratch memory: what is known of rows, queries, weights, sums; and the strides of their rows"""
        rows = up(at(f, BQ) * at(f, BH), ROWS)
        q_row = up(at(f, D), L) * size
        s_row = (at(f, BK) + 64 // size) * size
        st = own
        q = st + rows * ROW
        s = q + rows * q_row
        return st, q, q_row, s, s_row, s + rows * s_row, up(at(f, DV), L) * size

    @outline
    def pack_chunk(number, j0, f, table, k, v, to_k):
        """128 keys and values of a pair"""
        b = number // (at(f, HEADS) // at(f, GROUP))
        hk = number - b * (at(f, HEADS) // at(f, GROUP))
        entry = table + b * TABLE_ROW
        lk, d, dv = at(entry, T_LK), at(f, D), at(f, DV)
        to_v = to_k + at(f, PACK_K)
        kp, vp = k + at(entry, T_K) + hk * at(f, KH), v + at(entry, T_V) + hk * at(f, VH)
        for j in range(j0, min(lk, j0 + 128), panel):
            pack(kp + j * at(f, KL), at(f, KL), at(f, KD), min(panel, lk - j), d, to_k + j * deep(d) * size, panel)
        n = min(128, lk - j0)
        for c in range(0, dv if n > 0 else 0, panel):
            pack(vp + j0 * at(f, VL) + c * at(f, VD), at(f, VD), at(f, VL), min(panel, dv - c), n,
                 to_v + c * at(f, PACK_V) + deep(j0) * panel * size, panel)

    @inline
    def pack_task(t, task, f, table, k, v, packed, first):
        pair = task // at(f, CHUNKS)
        pack_chunk(first + pair, (task - pair * at(f, CHUNKS)) * 128, f, table, k, v, packed + pair * at(f, PACK))

    @outline
    def block(t, task, f, table, q, k, v, mask, slopes, out, lse, stats, to_k, scratch, partial, first, ahead, scale, softcap,
              keep):
        pos_blocks, splits, head_blocks = at(f, POS_BLOCKS), at(f, SPLITS), at(f, HEAD_BLOCKS)
        rest = task // pos_blocks
        i0 = (pos_blocks - 1 - (task - rest * pos_blocks)) * at(f, BQ)  # the longest rows of a causal product first
        split = rest % splits
        rest = rest // splits
        pair = rest // head_blocks
        group, kv_heads = at(f, GROUP), at(f, HEADS) // at(f, GROUP)
        b = (first + pair) // kv_heads
        hk = first + pair - b * kv_heads
        h0 = hk * group + (rest - pair * head_blocks) * at(f, BH)
        nh = min(at(f, BH), (hk + 1) * group - h0)
        entry = table + b * TABLE_ROW
        lq, lk = at(entry, T_LQ), at(entry, T_LK)
        nq = min(at(f, BQ), lq - i0)
        if nq > 0:
            d, dv, bk = at(f, D), at(f, DV), at(f, BK)
            rows = nh * nq
            tiles = (rows + ROWS - 1) // ROWS
            st, qs, q_row, s, s_row, o, o_row = addresses(f, scratch + t * at(f, OWN))
            vecs = o_row // p.bytes
            shift = lk - lq if at(f, BOTTOM) else 0
            prepare(f, entry, mask, slopes, h0, nh, i0, nq, shift, st)
            qp = q + at(entry, T_Q) + h0 * at(f, QH) + i0 * at(f, QL)
            direct = at(f, DIRECT)
            as_they_lie = d % 2 == 0 if pairs else not part_vectors
            if as_they_lie and not direct and nh == 1 and nq % ROWS == 0 and at(f, QD) == operand:
                qs, q_row = qp, at(f, QL)  # whole tiles read them where they lie
            elif not direct:
                for h in range(nh):
                    copy_rows(qp + h * at(f, QH), at(f, QD), at(f, QL), d, nq, qs + h * nq * q_row, q_row // operand)
            to_v = to_k + at(f, PACK_K)
            kp, vp = k + at(entry, T_K) + hk * at(f, KH), v + at(entry, T_V) + hk * at(f, VH)
            prefix = min(at(f, PREFIX), lk)
            # Two stretches of keys: the prefix that all see, and what the block's window covers.
            low = load_scalar(INT64, st + LO)
            high = load_scalar(INT64, st + (nq - 1) * ROW + HI)
            spans = at(f, RIGHT) > 0 and i0 + shift < prefix and i0 + nq + shift > 0  # some queries of the prefix
            if spans:
                high = lk
            low = min(low // panel * panel, high)
            if low <= up(prefix, panel):
                low, high, prefix = 0, max(high, prefix), 0
            begin, end = lk * split // splits // panel * panel, lk * (split + 1) // splits // panel * panel
            if split == splits - 1:
                end = lk
            trim = nh == 1 and at(f, RIGHT) >= 0 and not spans
            next_q, next_k, next_v = 0, 0, 0
            if 0 <= ahead < at(f, PAIRS):
                next_b = ahead // kv_heads
                next_h = ahead - next_b * kv_heads
                there = table + next_b * TABLE_ROW
                next_q = q + at(there, T_Q) + next_h * group * at(f, QH) + i0 * at(f, QL)
                next_k = k + at(there, T_K) + next_h * at(f, KH) + i0 * at(f, KL)
                next_v = v + at(there, T_V) + next_h * at(f, VH) + i0 * at(f, VL)
            nothing = True
            for stretch in range(2):
                j0 = max(begin, low if stretch else 0)
                stop = min(end, high if stretch else prefix)
                while j0 < stop:
                    n = min(bk, stop - j0)
                    if direct:
                        for h in range(nh if at(f, BQ) > 1 else 1):
                            count, x_row = (nq, at(f, QL)) if at(f, BQ) > 1 else (nh, at(f, QH))
                            dots(n, d, kp + j0 * at(f, KL), at(f, KL), qp + h * at(f, QH), x_row, count,
                                 s + h * nq * s_row, s_row)
                    else:
                        for j in range(j0, j0 + n, panel):
                            # Rows whose window ends before this panel are skipped, a tile at a time.
                            skip = 0
                            if trim and j >= at(f, PREFIX):
                                skip = min(tiles, max(0, j - i0 - shift - at(f, RIGHT)) // ROWS)
                            multiply(tiles - skip, 2, deep(d), qs + skip * ROWS * q_row, q_row, size,
                                     to_k + j * deep(d) * size, panel * size, 0, False,
                                     s + skip * ROWS * s_row + (j - j0) * size, s_row)
                    weigh(f, st, rows, s, s_row, o, o_row, vecs, j0, n, nothing, next_q, next_k, next_v, scale, softcap)
                    if direct:
                        v_at, v_row = vp + j0 * at(f, VL), at(f, VL)
                        if rows == 1:
                            add_values(n, dv, v_at, v_row, s, o, nothing)
                        elif part_vectors or dv % L != 0:
                            for r in range(rows):
                                for i in range(n * r // rows, n * (r + 1) // rows):
                                    fetch(v_at + (n + i) * v_row, dv)
                                if nothing:
                                    for j in range(vecs):
                                        store(p, o + r * o_row + j * p.bytes, spread(p, 0.0))
                                add_rows(n, dv, v_at, v_row, s + r * s_row, size, o + r * o_row)
                        else:  # the next n are fetched row by row, or, where they do not lie in line, column by column
                            in_line = v_row == dv * size
                            multiply_few((rows + FEW - 1) // FEW, vecs, n, s, s_row, size, v_at, v_row, panel * size,
                                         not nothing, o, o_row, v_at + n * v_row, panel * size if in_line else v_row,
                                         (n if in_line else 1) * panel * size)
                    else:
                        v_at, v_row, v_panel = to_v + deep(j0) * panel * size, panel * size, panel * at(f, PACK_V)
                        whole = tiles
                        if trim and j0 + n > max(at(f, PREFIX), i0 + shift + at(f, RIGHT) + 1):
                            whole = 0
                            for tile in range(tiles):  # as many keys as its last row sees, or one of weight 0
                                last = min(nq, (tile + 1) * ROWS) - 1
                                seen = min(n, max(load_scalar(INT64, st + last * ROW + HI), at(f, PREFIX)) - j0)
                                multiply(1, vecs, deep(max(1, seen)), s + tile * ROWS * s_row, s_row, size, v_at, v_row,
                                         v_panel, not nothing, o + tile * ROWS * o_row, o_row)
                        multiply(whole, vecs, deep(n), s, s_row, size, v_at, v_row, v_panel, not nothing, o, o_row)
                    nothing = False
                    j0 += n
            if nothing:
                for r in range(rows):
                    store_scalar(FLOAT64, st + r * ROW + OFFSET, -inf)
                    store_scalar(FLOAT64, st + r * ROW + SUM, 0.0)
                    for j in range(vecs):
                        store(p, o + r * o_row + j * p.bytes, spread(p, 0.0))
            if splits == 1:
                finish(f, entry, st, h0, nh, i0, nq, o, o_row, out, lse, stats, keep)
            else:
                to = partial + task * at(f, PART)
                for r in range(rows):
                    store_scalar(FLOAT64, to, load_scalar(FLOAT64, st + r * ROW + OFFSET))
                    store_scalar(FLOAT64, to + 8, load_scalar(FLOAT64, st + r * ROW + SUM))
                    to += 64
                    for j in range(vecs):
                        store(p, to, load(p, o + r * o_row + j * p.bytes))
                        to += p.bytes

    @inline
    def block_task(t, task, f, table, q, k, v, mask, slopes, out, lse, stats, packed, scratch, partial, first, alone, scale,
                   softcap, keep):
        """A block; alone: a pair, whose keys and values are packed by the thread that needs them, into memory that stays in its
        L2, and meanwhile what its next pair will read is fetched"""
        blocks = at(f, POS_BLOCKS) * at(f, HEAD_BLOCKS) * at(f, SPLITS)
        number, end, pair, ahead = task, task + 1, task // blocks, -1
        to_k = packed + pair * at(f, PACK)
        if alone != 0:
            number, end, ahead = task * blocks, (task + 1) * blocks, task + alone
            to_k = packed + t * at(f, PACK)
            for chunk in range(at(f, CHUNKS)):
                pack_chunk(task, chunk * 128, f, table, k, v, to_k)
        while number < end:
            block(t, number, f, table, q, k, v, mask, slopes, out, lse, stats, to_k, scratch, partial, first, ahead, scale,
                  softcap, keep)
            number += 1

    @inline
    def join_task(t, task, f, table, out, lse, stats, scratch, partial, first, keep):
        """The splits of a block, in their order"""
        pos_blocks, splits, head_blocks = at(f, POS_BLOCKS), at(f, SPLITS), at(f, HEAD_BLOCKS)
        rest = task // pos_blocks
        position = task - rest * pos_blocks
        i0 = (pos_blocks - 1 - position) * at(f, BQ)
        pair = rest // head_blocks
        group, kv_heads = at(f, GROUP), at(f, HEADS) // at(f, GROUP)
        b = (first + pair) // kv_heads
        hk = first + pair - b * kv_heads
        h0 = hk * group + (rest - pair * head_blocks) * at(f, BH)
        nh = min(at(f, BH), (hk + 1) * group - h0)
        entry = table + b * TABLE_ROW
        nq = min(at(f, BQ), at(entry, T_LQ) - i0)
        if nq > 0:
            st, _, _, _, _, o, o_row = addresses(f, scratch + t * at(f, OWN))
            vecs = o_row // p.bytes
            for r in range(nh * nq):
                top, total = -inf, 0.0
                src = partial + (rest * splits * pos_blocks + position) * at(f, PART) + r * (64 + o_row)
                for split in range(splits):
                    top = max(top, load_scalar(FLOAT64, src + split * pos_blocks * at(f, PART)))
                for j in range(vecs):
                    store(p, o + r * o_row + j * p.bytes, spread(p, 0.0))
                for split in range(splits):
                    here = src + split * pos_blocks * at(f, PART)
                    share = load_scalar(FLOAT64, here + 8)
                    if share != 0.0:
                        shrink = first_lane(exp2_below(spread(FLOAT64, load_scalar(FLOAT64, here) - top)))
                        total += share * shrink
                        for j in range(vecs):
                            to = o + r * o_row + j * p.bytes
                            store(p, to, fma(load(p, here + 64 + j * p.bytes), shrink, load(p, to)))
                store_scalar(FLOAT64, st + r * ROW + OFFSET, top)
                store_scalar(FLOAT64, st + r * ROW + SUM, total)
            finish(f, entry, st, h0, nh, i0, nq, o, o_row, out, lse, stats, keep)

    def kernel(threads, f, table, q, k, v, mask, slopes, out, lse, stats, packed, scratch, partial, scale, softcap, keep):
        first, alone = 0, 0 if at(f, WAVE) else threads
        while first < at(f, PAIRS):
            pairs = at(f, PAIRS) if alone else min(at(f, WAVE), at(f, PAIRS) - first)
            if not (alone or at(f, DIRECT)):
                parallel_tasks(threads, pairs * at(f, CHUNKS), pack_task, (f, table, k, v, packed, first))
            blocks = pairs * at(f, HEAD_BLOCKS) * at(f, POS_BLOCKS)
            parallel_tasks(threads, pairs if alone else blocks * at(f, SPLITS), block_task,
                           (f, table, q, k, v, mask, slopes, out, lse, stats, packed, scratch, partial, first, alone, scale,
                            softcap, keep))
            if at(f, SPLITS) > 1:
                parallel_tasks(threads, blocks, join_task, (f, table, out, lse, stats, scratch, partial, first, keep))
            first += pairs
    return kernel


def attention_backward(elem_name: str) -> Callable[..., Any]:
    """kernel(threads, fields, table, chains, q, k, v, mask, slopes, out, stats, g, g_lse, dq, dk, dv, bias, delta, sums, scratch,
    scale, softcap, keep)

    chains: where each chain's pairs begin in a list of pairs, which follows. A chain is worked through in its order, by one
    thread for each part of the keys, and has a copy of the mask's gradient to itself: nothing depends on who was first.
    delta: a number a row; sums: the queries' gradient in the compute type, for each part of the keys.
    """
    e = ELEMS[elem_name]
    p = compute_elem(e)
    lowest = LOWEST[p.size]
    several, biases = wide(p, BACK_WIDTH), wide(e, BACK_WIDTH)
    L, W, size = p.lanes, p.lanes * BACK_WIDTH, p.size
    panel = 2 * L
    pack, multiply, prepare = packer(e), product(p), rows_of(e)
    (known, logits), biased = logit(e), only_biased(e)
    p_of, put = rounder(p), part_store(e)
    drop_keys, gone = dropper(size == 8)

    @inline
    def delta_task(t, task, f, table, out, g, g_lse, delta):
        """Σ grad · out of a head's rows, less the gradient of the log-sum-exp"""
        heads, dv = at(f, HEADS), at(f, DV)
        b = task // heads
        h = task - b * heads
        entry = table + b * TABLE_ROW
        for i in range(at(entry, T_LQ)):
            x = g + at(entry, T_G) + h * at(f, GH) + i * at(f, GL)
            y = out + at(entry, T_O) + h * at(f, OH) + i * at(f, OL)
            total = spread(p, 0.0)
            for j in range(0, dv, L):
                n = min(L, dv - j)
                total = fma(load_n(e, x + j * e.size, n), load_n(e, y + j * e.size, n), total)
            number = (at(entry, T_ROW) + h * at(f, ROW_H) + i) * size
            less = load_scalar(p, g_lse + number) if g_lse != 0 else first_lane(spread(p, 0.0))
            store_scalar(p, delta + number, reduce_add(total) - less)

    @outline
    def slopes_plain(s, g, here, n, factor, offset, inverse, delta):
        """Weights in place of products, the logits' gradients in place of the weights' ones; zeros from ``here`` to n"""
        j = 0
        while j + W <= here:
            x = exp2_below(load(several, s + j * size) * factor - offset) * inverse
            store(several, s + j * size, x)
            store(several, g + j * size, (load(several, g + j * size) - delta) * x)
            j += W
        while j < n:
            seen = first_lanes(p, here - j)
            x = select(seen, exp2_below(load(p, s + j * size) * factor - offset) * inverse, 0.0)
            store(p, s + j * size, x)
            store(p, g + j * size, select(seen, (load(p, g + j * size) - delta) * x, 0.0))
            j += L

    @outline
    def slopes_dropped(f, s, g, here, n, factor, offset, inverse, delta, keep, index):
        """The same where weights are dropped"""
        low, key, next_key = drop_keys(index, at(f, KEY0))
        key1, least, j = at(f, KEY1), at(f, DROP), 0
        while j + W <= here:
            x = exp2_below(load(several, s + j * size) * factor - offset) * inverse
            dropped = gone(x, low, j, 1, key, next_key, key1, least)
            store(several, s + j * size, select(dropped, 0.0, x))
            store(several, g + j * size, (select(dropped, 0.0, load(several, g + j * size) * keep) - delta) * x)
            j += W
        while j < n:
            seen = first_lanes(p, here - j)
            x = select(seen, exp2_below(load(p, s + j * size) * factor - offset) * inverse, 0.0)
            dropped = gone(x, low, j, 1, key, next_key, key1, least)
            store(p, s + j * size, select(dropped, 0.0, x))
            store(p, g + j * size, select(seen, (select(dropped, 0.0, load(p, g + j * size) * keep) - delta) * x, 0.0))
            j += L

    @outline
    def slopes_biased(s, g, here, n, mask, mask_row, factor, offset, inverse, delta, bias, bias_row):
        """The same where a bias is added; ``bias``: 0, or where the logits' gradients are added. The next row's are fetched."""
        j = 0
        while j + W <= here:
            prefetch(mask + mask_row + j * e.size)
            x = fma(load(biases, mask + j * e.size), LOG2_E, load(several, s + j * size) * factor)
            weight = exp2_below(x - offset) * inverse
            store(several, s + j * size, weight)
            ds = select(x == -inf, 0.0, (load(several, g + j * size) - delta) * weight)
            store(several, g + j * size, ds)
            if bias != 0:
                prefetch(bias + bias_row + j * size)
                store(several, bias + j * size, load(several, bias + j * size) + ds)
            j += W
        while j < n:
            left = max(0, min(L, here - j))
            x = fma(load_n(e, mask + j * e.size, left), LOG2_E, load(p, s + j * size) * factor)
            x = select(first_lanes(p, left), x, -inf)
            weight = select(x == -inf, 0.0, exp2_below(x - offset) * inverse)
            store(p, s + j * size, weight)
            ds = select(x == -inf, 0.0, (load(p, g + j * size) - delta) * weight)
            store(p, g + j * size, ds)
            if bias != 0 and left > 0:
                store_n(p, bias + j * size, load_n(p, bias + j * size, left) + ds, left)
            j += L

    @outline
    def slopes_shaped(f, row, s, g, j0, n, scale, softcap, keep, offset, inverse, delta, bias):
        total, of_row = spread(p, 0.0), known(f, row)
        drops, key1, least, each = at(f, DROP) != 0, at(f, KEY1), at(f, DROP), bias != 0 and at(f, BIAS_K) != 0
        low, key, next_key = drop_keys(load_scalar(INT64, row + INDEX) + j0, at(f, KEY0))
        for j in range(0, n, L):
            x, t = logits(of_row, s, j, j0, n, scale, softcap)
            weight = exp2_below(x - offset) * inverse
            weight = select(x == -inf, 0.0, weight)
            dp = load(p, g + j * size) * keep
            left = weight
            if drops:
                dropped = gone(x, low, j, 1, key, next_key, key1, least)
                left, dp = select(dropped, 0.0, left), select(dropped, 0.0, dp)
            store(p, s + j * size, left)
            ds = select(x == -inf, 0.0, (dp - delta) * weight)
            if each:
                to = bias + (j0 + j) * size
                if n - j >= L:
                    store(p, to, load(p, to) + ds)
                else:
                    store_n(p, to, load_n(p, to, n - j) + ds, n - j)
            total = total + ds
            if softcap != 0.0:
                ds = ds * (1.0 - t * t)
            store(p, g + j * size, ds)
        if bias != 0 and not each:
            store_scalar(p, bias, load_scalar(p, bias) + reduce_add(total))

    @inline
    def clear(address, rows, row):
        for r in range(rows):
            for j in range(0, row, p.bytes):
                store(p, address + r * row + j, spread(p, 0.0))

    @outline
    def write(dst, step, src, row, rows, n, factor):
        for r in range(rows):
            for j in range(0, n, L):
                put(dst + r * step + j * e.size, load(p, src + r * row + j * size) * factor, n - j)

    @inline
    def scores(tiles, d, a, a_row, b, s, s_row, j0, n, i0, reach, trim):
        """A block's products with keys or values, without what its window leaves out on the right"""
        for j in range(0, n, panel):
            skip = min(tiles, max(0, j0 + j - i0 - reach) // ROWS) if trim else 0
            multiply(tiles - skip, 2, d, a + skip * ROWS * a_row, a_row, size, b + j * d * size, panel * size, 0, False,
                     s + skip * ROWS * s_row + j * size, s_row)

    @inline
    def transposed(n, vecs, nq, s, s_row, b, b_row, c, j0, i0, reach, trim):
        """C += Sᵀ B, for each tile of keys from the first query on that sees one of them"""
        if trim:
            for tile in range((n + ROWS - 1) // ROWS):
                skip = min(nq, max(0, j0 + tile * ROWS - i0 - reach))
                multiply(1, vecs, nq - skip, s + skip * s_row + tile * ROWS * size, size, s_row, b + skip * b_row, b_row,
                         panel * size, True, c + tile * ROWS * b_row, b_row)
        else:
            multiply((n + ROWS - 1) // ROWS, vecs, nq, s, size, s_row, b, b_row, panel * size, True, c, b_row)

    @inline
    def chain_task(t, task, f, table, chains, q, k, v, mask, slopes, stats, g, dk, dv, bias, delta, sums, scratch,
                   scale, softcap, keep):
        parts = at(f, PARTS)
        chain = task // parts
        part = task - chain * parts
        d, dv_size, bq, bk, group = at(f, D), at(f, DV), at(f, BQ), at(f, BK), at(f, GROUP)
        kv_heads = at(f, HEADS) // group
        dq_row, dv_row, s_row = up(d, panel) * size, up(dv_size, panel) * size, (bk + 64 // size) * size
        q_row, g_row = dq_row | 64, dv_row | 64  # an odd number of lines, so that a column of rows meets every set of L1
        rows, keys = up(bq, ROWS), up(bk, ROWS)
        st = scratch + t * at(f, OWN)
        qs = st + rows * ROW
        gs = qs + rows * q_row
        s = gs + rows * g_row
        dp = s + rows * s_row
        k_t = dp + rows * s_row
        k_rows = k_t + up(bk, panel) * d * size
        v_t = k_rows + bk * dq_row
        dks = v_t + up(bk, panel) * dv_size * size
        dvs = dks + keys * q_row
        left, right = at(f, LEFT), at(f, RIGHT)
        for number in range(at(chains, 8 * chain), at(chains, 8 * chain + 8)):
            pair = at(chains, 8 * number)
            b = pair // kv_heads
            hk = pair - b * kv_heads
            entry = table + b * TABLE_ROW
            lq, lk = at(entry, T_LQ), at(entry, T_LK)
            shift = lk - lq if at(f, BOTTOM) else 0
            reach = shift + right
            dqs = sums + part * at(f, DQ_PART) + at(entry, T_DQ_ROW)
            for h in range(hk * group, (hk + 1) * group):
                clear(dqs + h * at(entry, T_DQ_H), at(entry, T_DQ_H) // dq_row, dq_row)
            kp, vp = k + at(entry, T_K) + hk * at(f, KH), v + at(entry, T_V) + hk * at(f, VH)
            j0 = lk * part // parts // panel * panel
            end = lk if part == parts - 1 else lk * (part + 1) // parts // panel * panel
            while j0 < end:
                n = min(bk, end - j0)
                for j in range(0, n, panel):
                    w = min(panel, n - j)
                    pack(kp + (j0 + j) * at(f, KL), at(f, KL), at(f, KD), w, d, k_t + j * d * size, panel)
                    pack(vp + (j0 + j) * at(f, VL), at(f, VL), at(f, VD), w, dv_size, v_t + j * dv_size * size, panel)
                for c in range(0, d, panel):
                    pack(kp + j0 * at(f, KL) + c * at(f, KD), at(f, KD), at(f, KL), min(panel, d - c), n, k_rows + c * bk * size,
                         panel)
                clear(dks, keys, q_row)
                clear(dvs, keys, g_row)
                low, high, whole = 0, lq, 0
                if j0 >= at(f, PREFIX):  # else all queries see some of these keys
                    whole = max(0, min(lq, at(f, PREFIX) - shift)) if right > 0 and at(f, PREFIX) else 0  # that see all
                    low = max(0, j0 - reach) if right >= 0 else 0
                    high = min(lq, j0 + n - shift + left) if left >= 0 else lq
                for h in range(hk * group, (hk + 1) * group):
                    i0 = low // bq * bq if whole == 0 else 0
                    while i0 < high:
                        nq = min(bq, lq - i0)
                        tiles = (nq + ROWS - 1) // ROWS
                        trim = right >= 0 and j0 >= at(f, PREFIX) and j0 + n > i0 + reach and i0 >= whole
                        pack(q + at(entry, T_Q) + h * at(f, QH) + i0 * at(f, QL), at(f, QD), at(f, QL), d, nq, qs, q_row // size)
                        pack(g + at(entry, T_G) + h * at(f, GH) + i0 * at(f, GL), e.size, at(f, GL), dv_size, nq, gs,
                             g_row // size)
                        prepare(f, entry, mask, slopes, h, 1, i0, nq, shift, st)
                        scores(tiles, d, qs, q_row, k_t, s, s_row, j0, n, i0, reach, trim)
                        scores(tiles, dv_size, gs, g_row, v_t, dp, s_row, j0, n, i0, reach, trim)
                        for r in range(nq):
                            row = st + r * ROW
                            at_row = (at(entry, T_ROW) + h * at(f, ROW_H) + i0 + r) * size
                            offset = load_scalar(p, stats + at_row)
                            total = load_scalar(p, stats + at_row + at(f, ALL_ROWS) * size)
                            inverse = 0.0 if total == 0.0 else 1.0 / total
                            if total == 0.0:
                                offset = total
                            lo, hi = load_scalar(INT64, row + LO), load_scalar(INT64, row + HI)
                            s_r, dp_r, delta_r = s + r * s_row, dp + r * s_row, load_scalar(p, delta + at_row)
                            whole = lo <= j0 and (at(f, PREFIX) <= j0 or hi >= at(f, PREFIX))
                            here, factor, to = max(0, min(n, hi - j0)), p_of(scale * LOG2_E), 0
                            if bias != 0:
                                to = (bias + chain * at(f, BIAS_CHAIN) + at(entry, T_BIAS) + h * at(f, BIAS_H)
                                      + (i0 + r) * at(f, BIAS_Q))
                            drops = at(f, DROP) != 0
                            if at(f, PLAIN) and whole and drops:
                                slopes_dropped(f, s_r, dp_r, here, n, factor, offset, inverse, delta_r, keep,
                                               load_scalar(INT64, row + INDEX) + j0)
                            elif at(f, PLAIN) and whole:
                                slopes_plain(s_r, dp_r, here, n, factor, offset, inverse, delta_r)
                            elif (whole and not drops and biased(f, row, softcap) and (bias == 0 or at(f, BIAS_K) != 0)
                                  and offset > lowest):
                                slopes_biased(s_r, dp_r, here, n, load_scalar(INT64, row + MASK) + j0 * e.size, at(f, MQ), factor,
                                              offset, inverse, delta_r, to + j0 * size if to else 0, at(f, BIAS_Q))
                            else:
                                slopes_shaped(f, row, s_r, dp_r, j0, n, scale, softcap, keep, offset, inverse, delta_r, to)
                        transposed(n, dv_row // p.bytes, nq, s, s_row, gs, g_row, dvs, j0, i0, reach, trim)
                        transposed(n, dq_row // p.bytes, nq, dp, s_row, qs, q_row, dks, j0, i0, reach, trim)
                        to_q = dqs + h * at(entry, T_DQ_H) + i0 * dq_row
                        if trim:
                            for tile in range(tiles):
                                seen = min(n, i0 + min(nq, (tile + 1) * ROWS) + reach - j0)
                                multiply(1, dq_row // p.bytes, seen, dp + tile * ROWS * s_row, s_row, size, k_rows, panel * size,
                                         bk * panel * size, True, to_q + tile * ROWS * dq_row, dq_row)
                        else:
                            multiply(tiles, dq_row // p.bytes, n, dp, s_row, size, k_rows, panel * size, bk * panel * size, True,
                                     to_q, dq_row)
                        i0 += bq
                        if whole <= i0 < low // bq * bq:
                            i0 = low // bq * bq
                write(dk + at(entry, T_DK) + hk * at(f, YH) + j0 * at(f, YL), at(f, YL), dks, q_row, n, d, scale)
                write(dv + at(entry, T_DV) + hk * at(f, ZH) + j0 * at(f, ZL), at(f, ZL), dvs, g_row, n, dv_size, keep)
                j0 += n

    @inline
    def finish_task(t, task, f, table, dq, sums, scale):
        """The parts of a head's queries' gradients, in their order"""
        heads, d = at(f, HEADS), at(f, D)
        b = task // heads
        h = task - b * heads
        entry = table + b * TABLE_ROW
        q_row = up(d, panel) * size
        src = sums + at(entry, T_DQ_ROW) + h * at(entry, T_DQ_H)
        n = at(entry, T_LQ)
        for part in range(1, at(f, PARTS)):
            for j in range(0, n * q_row, p.bytes):
                store(p, src + j, load(p, src + j) + load(p, src + part * at(f, DQ_PART) + j))
        write(dq + at(entry, T_DQ) + h * at(f, XH), at(f, XL), src, q_row, n, d, scale)

    def kernel(threads, f, table, sequences, chains, number, q, k, v, mask, slopes, out, stats, g, g_lse, dq, dk, dv, bias, delta,
               sums, scratch, scale, softcap, keep):
        heads = sequences * at(f, HEADS)
        parallel_tasks(threads, heads, delta_task, (f, table, out, g, g_lse, delta))
        parallel_tasks(threads, number * at(f, PARTS), chain_task,
                       (f, table, chains, q, k, v, mask, slopes, stats, g, dk, dv, bias, delta, sums, scratch, scale, softcap,
                        keep))
        parallel_tasks(threads, heads, finish_task, (f, table, dq, sums, scale))
    return kernel
