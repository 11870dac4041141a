"""Attention in Triton: the softmax of a block of scores between two products, kept on the chip.

Forward: Dao 2023, "FlashAttention-2", algorithm 1; for few queries the keys are split between programs and joined; where
products are asynchronous, those with values run under the next block's exponentials (BEHIND; Shah et al. 2024,
"FlashAttention-3", section 3.2). Backward: algorithm 2, with programs that own keys (their gradients), queries (theirs), or
elements of a mask: nothing is added atomically. Where a copy engine adds to memory, those that own keys add up the queries'
gradients there (SUMMED): five products in place of seven, in whatever order programs come.

A program's rows are queries, m_ what it may load, i their positions in the sequence, j those of keys. Logits are in units of
log 2; where they are a positive multiple of the products (LINEAR), the running maximum is that of the products, so that
the largest one's weight is exactly 1 in float32. Strides are in elements; whatever may exceed 2³¹ is computed in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .engine import functions
from .engine.functions import mix, tanh

# What a call needs, as bits of KIND: what it does not need is not compiled.
BOOLEAN = tl.constexpr(1)  # a mask of bytes
ADDITIVE = tl.constexpr(2)  # a mask of numbers
SLOPES = tl.constexpr(4)
SOFTCAP = tl.constexpr(8)
LEFT = tl.constexpr(16)
RIGHT = tl.constexpr(32)
PREFIX = tl.constexpr(64)
DROPOUT = tl.constexpr(128)
VARLEN = tl.constexpr(256)  # sequences one after the other, by offsets
LINEAR = tl.constexpr(512)
PACK = tl.constexpr(1024)  # the rows of a program are the queries of all heads that share keys
SPLIT = tl.constexpr(2048)  # several programs share a row's keys
LSE = tl.constexpr(4096)  # the log-sum-exp is wanted, or has a gradient
EVEN_D = tl.constexpr(8192)  # the sizes of keys and values are those of their blocks
EVEN_V = tl.constexpr(16384)
NEAR = tl.constexpr(32768)  # no two numbers of a block are 2³¹ apart
BEHIND = tl.constexpr(65536)  # the forward multiplies with a block's values after it has with the next keys; not with PREFIX
SUMMED = tl.constexpr(262144)  # the backward's programs that own keys add to the queries' gradients
TERMS = tl.constexpr(131072)  # the backward's numbers of a row are twice 16 of bfloat16, which matrix units subtract

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dropout_row(row, LK, k0, key0):
    """Of the index of a row's first weight: the low half, and the first mix for its high half and for the next one."""
    first = row * LK + k0
    high = (first >> 32).to(tl.uint32)
    key = key0.to(tl.uint32)
    return first.to(tl.uint32), mix(key ^ mix(high)), mix(key ^ mix(high + 1))


@triton.jit
def _kept(low, mixed, mixed_next, j, key1, least):
    """Which weights dropout keeps: as kernels/reference/activation.py's random_bits"""
    at = low + j.to(tl.uint32)
    a = tl.where(at < low, mixed_next, mixed)
    return mix(mix(at + a) ^ key1.to(tl.uint32)) >= least.to(tl.uint32)


@triton.jit
def _logits(s, i, j, m_i, lk, shift, mask_row, smk, slope, inner, outer, left, right, prefix, EDGE: tl.constexpr,
            KIND: tl.constexpr):
    """(logits, tanh's value for softcap) of products, -Inf where a row may not look. If LINEAR, products instead of logits.

    EDGE: some rows may see only a part of these keys.
    """
    t = s
    if LINEAR & KIND:
        x = s
    elif SOFTCAP & KIND:
        t = tanh(s * inner)
        x = t * outer
    else:
        x = s * outer
    if SLOPES & KIND:
        x -= slope * tl.abs((j - (i + shift)).to(tl.float32))
    if ADDITIVE & KIND:
        bias = tl.load(mask_row + j.to(tl.int64) * smk, mask=m_i & (j < lk), other=0.0).to(tl.float32)
        # The lowest numbers, which many write for -Inf, stay numbers.
        x += tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2_E, -3.0e38))
    if BOOLEAN & KIND:
        flag = tl.load(mask_row + j.to(tl.int64) * smk, mask=m_i & (j < lk), other=0)
        x = tl.where(flag != 0, x, float("-inf"))
    if EDGE:
        seen = j < lk
        if RIGHT & KIND:
            seen = seen & (j <= i + shift + right)
        if LEFT & KIND:
            seen = seen & (j >= i + shift - left)
        if PREFIX & KIND:
            seen = seen | ((j < prefix) & (j < lk))
            if RIGHT & KIND:
                seen = seen | ((i + shift >= 0) & (i + shift < prefix) & (right > 0) & (j < lk))
        x = tl.where(seen, x, float("-inf"))
    return x, t


@triton.jit
def _weights(s, dp, i, j, m_i, lk, shift, mask_row, smk, slope, offset, inverse, delta, drop_low, drop_a, drop_b, inner, outer,
             left, right, prefix, key1, least, keep, EDGE: tl.constexpr, KIND: tl.constexpr):
    """Of a block of products and of the weights' gradients: (weights, without those dropped; the gradients of the logits, and of
    the products over the scale)."""
    x, t = _logits(s, i, j, m_i, lk, shift, mask_row, smk, slope, inner, outer, left, right, prefix, EDGE, KIND)
    if LINEAR & KIND:
        w = tl.exp2(x * outer - offset)
    else:
        w = tl.exp2(x - offset)
    w *= inverse
    left_over = w
    if DROPOUT & KIND:
        kept = _kept(drop_low, drop_a, drop_b, j, key1, least)
        left_over = tl.where(kept, w, 0.0)
        dp = tl.where(kept, dp * keep, 0.0)
    ds = (dp - delta) * w
    if EDGE or (BOOLEAN | ADDITIVE) & KIND:
        ds = tl.where(x == float("-inf"), 0.0, ds)  # even where a gradient or a value is NaN
    dt = ds
    if SOFTCAP & KIND:
        dt = ds * (1.0 - t * t)
    return left_over, ds, dt


@triton.jit
def _place(pid, blocks, heads, tasks, offsets_q, offsets_k, LQ, LK, KIND: tl.constexpr):
    """(batch item, sequence, head, block, first query and how many, first key and how many) of a program

    With VARLEN ``tasks`` lists (sequence, block) pairs; blocks beyond a sequence's end have nothing to do.
    """
    h = pid // blocks
    block = pid % blocks
    if VARLEN & KIND:
        n = tl.load(tasks + 2 * block)
        block = tl.load(tasks + 2 * block + 1)
        q0 = tl.load(offsets_q + n).to(tl.int64)
        k0 = tl.load(offsets_k + n).to(tl.int64)
        lq = (tl.load(offsets_q + n + 1) - q0).to(tl.int32)
        lk = (tl.load(offsets_k + n + 1) - k0).to(tl.int32)
        b = n * 0
    else:
        n = h // heads
        b = n
        h = h % heads
        q0, k0, lq, lk = 0, 0, LQ, LK
    return b.to(tl.int64), n, h, block, q0, lq, k0, lk


@triton.jit
def _keys_seen(first, last, lq, lk, shift, left, right, prefix, KIND: tl.constexpr, BN: tl.constexpr):
    """Which keys rows from ``first`` to ``last`` see: those up to high_prefix, and from low to high; all rows see low_full to
    high_full."""
    low, high, low_full, high_full, high_prefix = 0, lk, 0, lk // BN * BN, 0
    if RIGHT & KIND:
        high = tl.minimum(lk, tl.maximum(0, last + shift + right + 1))
        high_full = tl.minimum(high_full, tl.maximum(0, first + shift + right + 1) // BN * BN)
    if LEFT & KIND:
        low = tl.maximum(0, first + shift - left) // BN * BN
        low_full = tl.cdiv(tl.maximum(0, last + shift - left), BN) * BN
    if PREFIX & KIND:
        high_prefix = tl.minimum(tl.cdiv(prefix, BN) * BN, lk)
        low = tl.maximum(low, tl.cdiv(high_prefix, BN) * BN)
        if RIGHT & KIND:  # who stands in the prefix sees all, but for the future
            high = tl.where((right > 0) & (first + shift < prefix) & (last + shift >= 0), lk, high)
    if VARLEN & KIND:  # a block beyond the sequence's end
        high = tl.where(first < lq, high, 0)
        high_prefix = tl.where(first < lq, high_prefix, 0)
        high_full = tl.where(first < lq, high_full, 0)
    return low, low_full, high_full, high, high_prefix


@triton.jit
def _stretch(n: tl.constexpr, low, low_full, high_full, high, high_prefix):
    """The keys of stretch n: the prefix, the rows' left edges, what all of them see, their right edges"""
    if n == 0:
        begin, end = 0, high_prefix
    elif n == 1:
        begin, end = low, tl.minimum(low_full, high)
    elif n == 2:
        begin, end = low_full, tl.minimum(high_full, high)
    else:
        begin, end = tl.maximum(low_full, high_full), high
    return begin, end


@triton.jit
def _there(m_rows, m_columns, WHOLE: tl.constexpr):
    """The mask of a matrix. WHOLE: all columns are there; only then does the compiler know that it may move them in vectors."""
    if WHOLE:
        return m_rows
    else:
        return m_rows & m_columns


@triton.jit
def _matrix(at, first, rows, step_rows, m_rows, columns, step_columns, m_columns, ALL_ROWS: tl.constexpr, WHOLE: tl.constexpr,
            KIND: tl.constexpr):
    """A matrix of what lies at rows (from the first on) and columns, zeros where there is nothing; rows and columns broadcast
    against each other."""
    if not NEAR & KIND:  # else addresses take half the registers
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    p = at + functions.wide(first) * step_rows + (rows * step_rows + columns * step_columns)
    if not ALL_ROWS:
        return tl.load(p, mask=_there(m_rows, m_columns, WHOLE), other=0.0)
    elif not WHOLE:
        return tl.load(p, mask=m_columns, other=0.0)
    else:
        return tl.load(p)


@triton.jit
def _products(q, k_at, start, skl, skd, D, lk, EDGE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
              BD: tl.constexpr):
    """Of rows with the block of keys from ``start`` on"""
    d = tl.arange(0, BD)[:, None]
    m_j = (start + tl.arange(0, BN) < lk)[None, :]
    k = _matrix(k_at, start, tl.arange(0, BN)[None, :], skl, m_j, d, skd, d < D, not EDGE, EVEN_D & KIND, KIND)
    return tl.dot(q, k, input_precision=PRECISION)


@triton.jit
def _exponentials(s, top, total, start, i, m_i, lk, shift, mask_row, smk, slope, drop_low, drop_a, drop_b, inner, outer, left,
                  right, prefix, key1, least, EDGE: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr):
    """Of a block of products: (its exponentials over the largest logit so far, those dropped 0; what shrinks the sums so far; the
    largest logit; the exponentials' sum)"""
    j = start + tl.arange(0, BN)[None, :]
    x, _ = _logits(s, i, j, m_i, lk, shift, mask_row, smk, slope, inner, outer, left, right, prefix, EDGE, KIND)
    new = tl.maximum(top, tl.max(x, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    shrink = top - base
    if not LINEAR & KIND:
        p = x - base[:, None]
    else:
        shrink *= outer
        if TYPE.primitive_bitwidth == 32:
            p = (x - base[:, None]) * outer  # the largest one's is exactly 0
        else:  # one instruction; all of a row miss by the same 2⁻²⁴ of the largest logit
            p = tl.fma(x, outer, -(base * outer)[:, None])
    p = tl.exp2(p)
    shrink = tl.exp2(shrink)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT & KIND:
        p = tl.where(_kept(drop_low, drop_a, drop_b, j, key1, least), p, 0.0)
    return p.to(TYPE), shrink, new, total


@triton.jit
def _gather(acc, p, shrink, v_at, start, svl, svd, DV, lk, EDGE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
            BN: tl.constexpr, BV: tl.constexpr):
    """The values of the block of keys from ``start`` on, weighed, on top of what was summed before"""
    e = tl.arange(0, BV)[None, :]
    m_j = (start + tl.arange(0, BN) < lk)[:, None]
    v = _matrix(v_at, start, tl.arange(0, BN)[:, None], svl, m_j, e, svd, e < DV, not EDGE, EVEN_V & KIND, KIND)
    return tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)


@triton.jit
def _attend(acc, top, total, p, shrink, q, k_at, v_at, skl, skd, svl, svd, D, DV, begin, end, i, m_i, lk, shift, mask_row, smk,
            slope, drop_low, drop_a, drop_b, inner, outer, left, right, prefix, key1, least, EDGE: tl.constexpr,
            KIND: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """The keys from ``begin`` to ``end``, on top of what was summed before.

    BEHIND: the values of the block before, weighed by ``p``, are gathered while this one's exponentials are taken.
    """
    for start in tl.range(begin, end, BN):
        s = _products(q, k_at, start, skl, skd, D, lk, EDGE, KIND, PRECISION, BN, BD)
        if BEHIND & KIND:
            acc = _gather(acc, p, shrink, v_at, start - BN, svl, svd, DV, lk, False, KIND, PRECISION, BN, BV)
            p, shrink, top, total = _exponentials(s, top, total, start, i, m_i, lk, shift, mask_row, smk, slope, drop_low, drop_a,
                                                  drop_b, inner, outer, left, right, prefix, key1, least, EDGE, KIND, BN,
                                                  v_at.dtype.element_ty)
        else:
            w, factor, top, total = _exponentials(s, top, total, start, i, m_i, lk, shift, mask_row, smk, slope, drop_low, drop_a,
                                                  drop_b, inner, outer, left, right, prefix, key1, least, EDGE, KIND, BN,
                                                  v_at.dtype.element_ty)
            acc = _gather(acc, w, factor, v_at, start, svl, svd, DV, lk, EDGE, KIND, PRECISION, BN, BV)
    return acc, top, total, p, shrink


@triton.jit
def _finish(acc, top, total, out_rows, m_rows, DV, lse, stats, rows, number, keep, KIND: tl.constexpr, BV: tl.constexpr):
    """Write rows whose exponentials are summed: ``top`` in units of log 2"""
    e = tl.arange(0, BV)[None, :]
    acc = tl.where(total[:, None] == 0.0, 0.0, acc * (keep / total)[:, None])
    tl.store(out_rows[:, None] + e, acc.to(out_rows.dtype.element_ty), mask=_there(m_rows[:, None], e < DV, EVEN_V & KIND))
    tl.store(stats + number, top, mask=m_rows)
    tl.store(stats + rows + number, total, mask=m_rows)
    if LSE & KIND:
        whole = tl.where(total == 0.0, float("-inf"), top * LN_2 + tl.log(total))
        tl.store(lse + number, whole, mask=m_rows)


@triton.jit(do_not_specialize=["heads", "group", "blocks", "LQ", "LK", "rows", "bottom", "left", "right", "prefix",
                               "key0", "key1", "least", "splits"])
def forward(q, k, v, mask, slopes, out, lse, stats, part, part_stats, tasks, offsets_q, offsets_k,
            sqb, sqh, sql, sqd, skb, skh, skl, skd, svb, svh, svl, svd, sob, soh, sol, smb, smh, smq, smk, sab, sah,
            heads, group, blocks, LQ, LK, rows, D, DV, inner, outer, bottom, left, right, prefix, key0, key1, least, keep,
            splits, KIND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
            BV: tl.constexpr):
    """A block of BM rows of one head, or with PACK of the heads that share keys, and one of ``splits`` shares of their keys.

    q … mask, out: as the operator has them, batch dimensions merged; slopes (batch, heads) float32; lse and stats: a number a
    row, ``rows`` in all; part (splits, rows, BV) and part_stats (splits, 2, rows): what the splits found.
    """
    pid = tl.program_id(0)
    split = pid % splits
    b, _, h, block, q0, lq, k0, lk = _place(pid // splits, blocks, heads // group if PACK & KIND else heads, tasks, offsets_q,
                                            offsets_k, LQ, LK, KIND)
    if not VARLEN & KIND:
        block = blocks - 1 - block  # the longest rows of a causal product first
    r = block * BM + tl.arange(0, BM)
    if PACK & KIND:
        i, head, kv_head = r % lq, (h * group + r // lq).to(tl.int64), h.to(tl.int64)
        m_rows = r < lq * group
        first, last = 0, lq - 1
    else:
        i, head, kv_head = r, h.to(tl.int64), (h // group).to(tl.int64)
        m_rows = r < lq
        first, last = block * BM, tl.minimum(block * BM + BM, lq) - 1
    at = (q0 + i).to(tl.int64)
    number = (b * heads + head) * LQ + at
    shift = (lk - lq) * bottom

    low, low_full, high_full, high, high_prefix = _keys_seen(first, last, lq, lk, shift, left, right, prefix, KIND, BN)
    end = high
    if SPLIT & KIND:
        chunk = tl.cdiv(tl.cdiv(tl.maximum(0, high - low), BN), splits) * BN
        low = low + split * chunk
        end = tl.minimum(high, low + chunk)
        high_prefix = tl.where(split == 0, high_prefix, 0)
    low_full = tl.maximum(low_full, low)

    d = tl.arange(0, BD)[None, :]
    q_rows = q + b * sqb + head * sqh + at * sql
    q_block = tl.load(q_rows[:, None] + d * sqd, mask=_there(m_rows[:, None], d < D, EVEN_D & KIND), other=0.0)
    k_at = k + b * skb + kv_head * skh + k0 * skl
    v_at = v + b * svb + kv_head * svh + k0 * svl
    mask_row, slope, drop_low, drop_a, drop_b = mask, 0.0, 0, 0, 0
    if (BOOLEAN | ADDITIVE) & KIND:
        mask_row = (mask + b * smb + head * smh + at * smq + k0 * smk)[:, None]
    if SLOPES & KIND:
        if PACK & KIND:
            slope = (tl.load(slopes + b * sab + head * sah, mask=m_rows, other=0.0) * LOG2_E)[:, None]
        else:
            slope = tl.load(slopes + b * sab + head * sah) * LOG2_E
    if DROPOUT & KIND:
        drop_low, drop_a, drop_b = _dropout_row(number[:, None], LK, k0, key0)

    acc = tl.zeros((BM, BV), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    p, shrink = 0.0, 0.0
    if BEHIND & KIND:  # the first block: of none the logits are all -Inf
        s = _products(q_block, k_at, low, skl, skd, D, end, True, KIND, PRECISION, BN, BD)
        p, shrink, top, total = _exponentials(s, top, total, low, i[:, None], m_rows[:, None], end, shift, mask_row, smk, slope,
                                              drop_low, drop_a, drop_b, inner, outer, left, right, prefix, key1, least, True,
                                              KIND, BN, v.dtype.element_ty)
        low += BN
        low_full = tl.maximum(low_full, low)
    for n in tl.static_range(4):
        if n > 1 or (n == 0 and PREFIX & KIND) or (n == 1 and LEFT & KIND):
            begin, stop = _stretch(n, low, low_full, high_full, end, high_prefix)
            acc, top, total, p, shrink = _attend(acc, top, total, p, shrink, q_block, k_at, v_at, skl, skd, svl, svd, D, DV,
                                                 begin, stop, i[:, None], m_rows[:, None], lk, shift, mask_row, smk, slope,
                                                 drop_low, drop_a, drop_b, inner, outer, left, right, prefix, key1, least,
                                                 n != 2, KIND, PRECISION, BN, BD, BV)
    if BEHIND & KIND:
        block_at = low + (tl.cdiv(tl.maximum(end - low, 0), BN) - 1) * BN
        acc = _gather(acc, p, shrink, v_at, block_at, svl, svd, DV, end, True, KIND, PRECISION, BN, BV)
    if LINEAR & KIND:
        top *= outer
    if SPLIT & KIND:
        e = tl.arange(0, BV)[None, :]
        split = split.to(tl.int64)
        tl.store(part + (split * rows + number)[:, None] * BV + e, acc, mask=m_rows[:, None])
        tl.store(part_stats + 2 * split * rows + number, top, mask=m_rows)
        tl.store(part_stats + (2 * split + 1) * rows + number, total, mask=m_rows)
    else:
        _finish(acc, top, total, out + b * sob + head * soh + at * sol, m_rows, DV, lse, stats, rows, number, keep, KIND, BV)


@triton.jit(do_not_specialize=["heads", "LQ", "rows", "splits"])
def join(part, part_stats, out, lse, stats, sob, soh, sol, heads, LQ, rows, DV, keep, splits, KIND: tl.constexpr,
         SPLITS: tl.constexpr, BV: tl.constexpr):
    """A row: the splits' sums, in their order, eight at a time. SPLITS: a power of two that holds their number"""
    number = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    step = functions.wide(rows)
    k = tl.arange(0, SPLITS)
    tops = tl.load(part_stats + 2 * k * step + number, mask=k < splits, other=float("-inf"))
    totals = tl.load(part_stats + (2 * k + 1) * step + number, mask=k < splits, other=0.0)
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp2(tops - base), 0)
    e = tl.arange(0, BV)[None, :]
    acc = tl.zeros((1, BV), tl.float32)
    for first in tl.range(0, splits, 8):
        at = first + tl.arange(0, 8)
        shares = tl.exp2(tl.load(part_stats + 2 * at * step + number, mask=at < splits, other=float("-inf")) - base)
        x = tl.load(part + (at * step + number)[:, None] * BV + e, mask=(at < splits)[:, None], other=0.0)
        acc += tl.sum(x * shares[:, None], 0)[None, :]
    b, head, i = number // LQ // heads, number // LQ % heads, number % LQ
    none = tl.zeros((1,), tl.float32)
    to = out + b * sob + head * soh + i * sol
    _finish(acc, none + top, none + total, to, number < rows, DV, lse, stats, rows, number, keep, KIND, BV)


@triton.jit
def _row_numbers(numbers, rows, number, m_rows, WIDE: tl.constexpr):
    """(offset, inverse, delta) of each row, as `backward_queries` found them. Its weights are exp2(logit - offset) · inverse, all
    0 where there is no row or it sees nothing; its logits' gradients (weights' gradients - delta) · weights. With numbers of 16
    bits the inverse is in the offset."""
    offset = tl.load(numbers + number, mask=m_rows, other=float("inf"))
    delta = tl.load(numbers + rows + number, mask=m_rows, other=0.0)
    inverse = 1.0
    if WIDE:
        inverse = tl.load(numbers + 2 * functions.wide(rows) + number, mask=m_rows, other=0.0)
    return offset, inverse, delta


@triton.jit
def _in_terms(x):
    """Three numbers of bfloat16 whose sum is x, but as float32"""
    high = x.to(tl.bfloat16).to(tl.float32)
    middle = (x - high).to(tl.bfloat16).to(tl.float32)
    return high, middle, x - high - middle


@triton.jit
def _find_row_numbers(g_block, o_block, g_lse, stats, numbers, number, rows, m_rows, outer, KIND: tl.constexpr,
                      WIDE: tl.constexpr):
    """(offset, inverse, delta) of rows; stored, (3, rows) as `_row_numbers` reads them, with TERMS (rows, 32) as
    `_from_row_numbers` does: delta is Σ grad · out less the log-sum-exp's gradient."""
    delta = tl.sum(g_block.to(tl.float32) * o_block.to(tl.float32), 1)
    if LSE & KIND:
        delta -= tl.load(g_lse + number, mask=m_rows, other=0.0).to(tl.float32)
    total = tl.load(stats + rows + number, mask=m_rows, other=0.0)
    offset = tl.load(stats + number, mask=m_rows, other=0.0)
    inverse = 1.0
    if WIDE:
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        tl.store(numbers + 2 * functions.wide(rows) + number, inverse, mask=m_rows)
        inverse = inverse[:, None]
    else:
        offset += tl.log2(total)
    if TERMS & KIND:  # apart from each other: in one product even a factor of 0 would let NaN and Inf through
        c = tl.arange(0, 32)[None, :]
        s0, s1, s2 = _in_terms(tl.where(total == 0.0, -3.0e38, -offset / outer)[:, None])
        d0, d1, d2 = _in_terms(-delta[:, None])
        terms = tl.where(c == 0, s0, tl.where(c == 1, s1, tl.where(c == 2, s2, 0.0)))
        terms = tl.where(c == 16, d0, tl.where(c == 17, d1, tl.where(c == 18, d2, terms)))
        tl.store(numbers + number[:, None] * 32 + c, terms.to(tl.bfloat16), mask=m_rows[:, None])
    offset = tl.where(total == 0.0, float("inf"), offset)
    if not TERMS & KIND:
        tl.store(numbers + number, offset, mask=m_rows)
        tl.store(numbers + rows + number, delta, mask=m_rows)
    return offset, inverse, delta


@triton.jit(do_not_specialize=["heads", "LQ", "rows"])
def backward_rows(out, g, g_lse, stats, numbers, sums, sob, soh, sol, sod, sgb, sgh, sgl, sgd, heads, LQ, rows, DV, outer,
                  KIND: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """The numbers of BM rows; and zeros, (rows, BD), to which `backward_keys` adds with SUMMED."""
    number = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_rows = number < rows
    b, head, i = number // LQ // heads, number // LQ % heads, number % LQ
    e = tl.arange(0, BV)[None, :]
    m_e = _there(m_rows[:, None], e < DV, EVEN_V & KIND)
    g_block = tl.load((g + b * sgb + head * sgh + i * sgl)[:, None] + e.to(tl.int64) * sgd, mask=m_e, other=0.0)
    o_block = tl.load((out + b * sob + head * soh + i * sol)[:, None] + e.to(tl.int64) * sod, mask=m_e, other=0.0)
    _find_row_numbers(g_block, o_block, g_lse, stats, numbers, number, rows, m_rows, outer, KIND, False)
    tl.store(sums + number[:, None] * BD + tl.arange(0, BD)[None, :], tl.zeros((BM, BD), tl.float32), mask=m_rows[:, None])


@triton.jit
def _from_row_numbers(terms, m_rows, m_keys, KIND: tl.constexpr, BM: tl.constexpr):
    """Where a block's sums begin: with the terms of each of BM columns' number; with SUMMED 0 in rows that are no keys, where
    exp2 of what is subtracted might be Inf. That is a product with ones: neither a register nor an instruction a number is spent
    on what is subtracted, and terms are loaded ahead as operands are."""
    x = tl.load(terms + (tl.arange(0, BM)[None, :] * 32 + tl.arange(0, 16)[:, None]), mask=m_rows, other=0.0)
    ones = tl.full((m_keys.shape[0], 16), 1.0, tl.float32)
    if SUMMED & KIND:
        ones = tl.where(m_keys, ones, 0.0)
    return tl.dot(ones.to(tl.bfloat16), x)


@triton.jit
def _queries_gradient(dq, q, g, k_at, v_at, skl, skd, svl, svd, D, DV, begin, end, i, m_i, lk, shift, mask_row, smk, slope,
                      offset, inverse, delta, drop_low, drop_a, drop_b, inner, outer, left, right, prefix, key1, least, keep,
                      EDGE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                      BV: tl.constexpr):
    d = tl.arange(0, BD)[:, None]
    e = tl.arange(0, BV)[:, None]
    for start in tl.range(begin, end, BN):
        j = (start + tl.arange(0, BN))[None, :]
        k = _matrix(k_at, start, tl.arange(0, BN)[None, :], skl, j < lk, d, skd, d < D, not EDGE, EVEN_D & KIND, KIND)
        v = _matrix(v_at, start, tl.arange(0, BN)[None, :], svl, j < lk, e, svd, e < DV, not EDGE, EVEN_V & KIND, KIND)
        s = tl.dot(q, k, input_precision=PRECISION)
        dp = tl.dot(g, v, input_precision=PRECISION)
        _, _, dt = _weights(s, dp, i, j, m_i, lk, shift, mask_row, smk, slope, offset, inverse, delta, drop_low, drop_a, drop_b,
                            inner, outer, left, right, prefix, key1, least, keep, EDGE, KIND)
        dq = tl.dot(dt.to(k.dtype), tl.trans(k), dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["heads", "group", "blocks", "LQ", "LK", "rows", "bottom", "left", "right", "prefix",
                               "key0", "key1", "least"])
def backward_queries(q, k, v, mask, slopes, out, g, g_lse, stats, numbers, dq, tasks, offsets_q, offsets_k,
                     sqb, sqh, sql, sqd, skb, skh, skl, skd, svb, svh, svl, svd, sob, soh, sol, sod, sgb, sgh, sgl, sgd, sxb,
                     sxh, sxl, smb, smh, smq, smk, sab, sah,
                     heads, group, blocks, LQ, LK, rows, D, DV, inner, outer, bottom, left, right, prefix, key0, key1, least,
                     keep, scale,
                     KIND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                     BV: tl.constexpr):
    """The gradient of BM queries (dq, strides sx_); and the numbers of their rows."""
    b, _, h, block, q0, lq, k0, lk = _place(tl.program_id(0), blocks, heads, tasks, offsets_q, offsets_k, LQ, LK, KIND)
    if not VARLEN & KIND:
        block = blocks - 1 - block
    i = block * BM + tl.arange(0, BM)
    head, kv_head, m_rows = h.to(tl.int64), (h // group).to(tl.int64), i < lq
    first, last = block * BM, tl.minimum(block * BM + BM, lq) - 1
    at = (q0 + i).to(tl.int64)
    number = (b * heads + head) * LQ + at
    shift = (lk - lq) * bottom

    low, low_full, high_full, high, high_prefix = _keys_seen(first, last, lq, lk, shift, left, right, prefix, KIND, BN)
    low_full = tl.maximum(low_full, low)

    d = tl.arange(0, BD)[None, :]
    e = tl.arange(0, BV)[None, :]
    m_d, m_e = _there(m_rows[:, None], d < D, EVEN_D & KIND), _there(m_rows[:, None], e < DV, EVEN_V & KIND)
    q_block = tl.load((q + b * sqb + head * sqh + at * sql)[:, None] + d * sqd, mask=m_d, other=0.0)
    g_block = tl.load((g + b * sgb + head * sgh + at * sgl)[:, None] + e * sgd, mask=m_e, other=0.0)
    o_block = tl.load((out + b * sob + head * soh + at * sol)[:, None] + e * sod, mask=m_e, other=0.0)
    offset, inverse, delta = _find_row_numbers(g_block, o_block, g_lse, stats, numbers, number, rows, m_rows, outer, KIND,
                                               q.dtype.element_ty.primitive_bitwidth == 32)

    k_at = k + b * skb + kv_head * skh + k0 * skl
    v_at = v + b * svb + kv_head * svh + k0 * svl
    mask_row, slope, drop_low, drop_a, drop_b = mask, 0.0, 0, 0, 0
    if (BOOLEAN | ADDITIVE) & KIND:
        mask_row = (mask + b * smb + head * smh + at * smq + k0 * smk)[:, None]
    if SLOPES & KIND:
        slope = tl.load(slopes + b * sab + head * sah) * LOG2_E
    if DROPOUT & KIND:
        drop_low, drop_a, drop_b = _dropout_row(number[:, None], LK, k0, key0)

    acc = tl.zeros((BM, BD), tl.float32)
    for n in tl.static_range(4):
        if n > 1 or (n == 0 and PREFIX & KIND) or (n == 1 and LEFT & KIND):
            begin, stop = _stretch(n, low, low_full, high_full, high, high_prefix)
            acc = _queries_gradient(acc, q_block, g_block, k_at, v_at, skl, skd, svl, svd, D, DV, begin, stop, i[:, None],
                                    m_rows[:, None], lk, shift, mask_row, smk, slope, offset[:, None],
                                    inverse, delta[:, None], drop_low, drop_a, drop_b, inner, outer, left, right, prefix,
                                    key1, least, keep, n != 2, KIND, PRECISION, BN, BD, BV)
    to = (dq + b * sxb + head * sxh + at * sxl)[:, None] + d
    tl.store(to, (acc * scale).to(dq.dtype.element_ty), mask=m_d)


@triton.jit
def _keys_gradient(dk, dv, to_q, k, v, q_at, g_at, sql, sqd, sgl, sgd, numbers, rows, number, begin, end, D, DV, LK, k0, j, lq,
                   lk, shift,
                   mask_at, smq, smk, slope, inner, outer, left, right, prefix, key0, key1, least, keep, EDGE: tl.constexpr,
                   KIND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """From the queries ``begin`` to ``end`` of one head; blocks lie transposed, a column a query, all zeros beyond the last. To
    ``to_q`` is added what these keys make of the queries' gradients, with SUMMED."""
    d = tl.arange(0, BD)[:, None]
    e = tl.arange(0, BV)[None, :]
    for start in tl.range(begin, end, BM):
        i = start + tl.arange(0, BM)
        q = _matrix(q_at, start, tl.arange(0, BM)[None, :], sql, (i < lq)[None, :], d, sqd, d < D, False, EVEN_D & KIND, KIND)
        g = _matrix(g_at, start, tl.arange(0, BM)[:, None], sgl, (i < lq)[:, None], e, sgd, e < DV, False, EVEN_V & KIND, KIND)
        mask_row, drop_low, drop_a, drop_b = mask_at, 0, 0, 0
        if (BOOLEAN | ADDITIVE) & KIND:
            mask_row = (mask_at + i.to(tl.int64) * smq)[None, :]
        if DROPOUT & KIND:
            drop_low, drop_a, drop_b = _dropout_row((number + i)[None, :], LK, k0, key0)
        if TERMS & KIND:
            terms = numbers + (number + start) * 32
            s = tl.dot(k, q, _from_row_numbers(terms, (i < lq)[None, :], j < lk, KIND, BM))
            dp = tl.dot(v, tl.trans(g), _from_row_numbers(terms + 16, (i < lq)[None, :], j < lk, KIND, BM))
            offset, inverse, delta = 0.0, 1.0, 0.0
        else:
            offset, inverse, delta = _row_numbers(numbers, rows, (number + i)[None, :], (i < lq)[None, :],
                                                  q_at.dtype.element_ty.primitive_bitwidth == 32)
            s = tl.dot(k, q, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        w, _, dt = _weights(s, dp, i[None, :], j, (i < lq)[None, :], lk, shift, mask_row, smk, slope, offset,
                            inverse, delta, drop_low, drop_a, drop_b, inner, outer, left, right, prefix,
                            key1, least, keep, EDGE, KIND)
        dv = tl.dot(w.to(g.dtype), g, dv, input_precision=PRECISION)
        if SUMMED & KIND and not (EDGE or TERMS & KIND):  # as above
            dt = tl.where(j < lk, dt, 0.0)
        dt = dt.to(q.dtype)
        dk = tl.dot(dt, tl.trans(q), dk, input_precision=PRECISION)
        if SUMMED & KIND:
            part = tl.dot(tl.trans(dt), k, input_precision=PRECISION)
            to_q.atomic_add([start, 0], part)
    return dk, dv


@triton.jit(do_not_specialize=["heads", "group", "blocks", "LQ", "LK", "rows", "bottom", "left", "right", "prefix",
                               "key0", "key1", "least"])
def backward_keys(q, k, v, mask, slopes, g, numbers, sums, dk, dv, tasks, offsets_q, offsets_k,
                  sqb, sqh, sql, sqd, skb, skh, skl, skd, svb, svh, svl, svd, sgb, sgh, sgl, sgd, syb, syh, syl, szb, szh, szl,
                  smb, smh, smq, smk, sab, sah,
                  heads, group, blocks, LQ, LK, rows, D, DV, inner, outer, bottom, left, right, prefix, key0, key1, least, keep,
                  scale, KIND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                  BV: tl.constexpr):
    """The gradients of BN keys (dk, strides sy_) and values (dv, sz_): of all queries of all heads that share them, in their
    order. With SUMMED their part of the queries' gradients over the scale is added to sums, (heads of all items, LQ, BD)."""
    b, _, h, block, q0, lq, k0, lk = _place(tl.program_id(0), blocks, heads // group, tasks, offsets_q, offsets_k, LQ, LK, KIND)
    kv_head = h.to(tl.int64)
    j = block * BN + tl.arange(0, BN)
    m_j = (j < lk)[:, None]
    at = (k0 + j).to(tl.int64)
    d, e = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :]
    m_d, m_e = _there(m_j, d < D, EVEN_D & KIND), _there(m_j, e < DV, EVEN_V & KIND)
    k_block = tl.load((k + b * skb + kv_head * skh + at * skl)[:, None] + d * skd, mask=m_d, other=0.0)
    v_block = tl.load((v + b * svb + kv_head * svh + at * svl)[:, None] + e * svd, mask=m_e, other=0.0)
    shift = (lk - lq) * bottom

    # The queries that see some of these keys, and those that see all.
    first, last = block * BN, tl.minimum(block * BN + BN, lk) - 1
    low, high, low_full, high_full, all_high = 0, lq, 0, lq, 0
    if RIGHT & KIND:
        low = tl.maximum(0, first - shift - right) // BM * BM
        low_full = tl.cdiv(tl.maximum(0, last - shift - right), BM) * BM
    if LEFT & KIND:
        high = tl.minimum(lq, tl.maximum(0, last - shift + left + 1))
        high_full = tl.minimum(high_full, tl.maximum(0, first - shift + left + 1) // BM * BM)
    if PREFIX & KIND:
        whole = first < prefix
        low, high = tl.where(whole, 0, low), tl.where(whole, lq, high)
        low_full, high_full = tl.where(whole, 0, low_full), tl.where(whole, 0, high_full)
        if RIGHT & KIND:  # queries in the prefix
            all_high = tl.where(whole | (right == 0), 0, tl.minimum(lq, tl.maximum(0, prefix - shift)))
            low = tl.maximum(low, tl.cdiv(all_high, BM) * BM)
    if VARLEN & KIND:
        high = tl.where(first < lk, high, 0)
        high_full = tl.where(first < lk, high_full, 0)
        all_high = tl.where(first < lk, all_high, 0)
    low_full = tl.maximum(low_full, low)

    dk_block = tl.zeros((BN, BD), tl.float32)
    dv_block = tl.zeros((BN, BV), tl.float32)
    for member in tl.range(0, group):
        head = kv_head * group + member
        number = (b * heads + head) * LQ + q0
        q_at, g_at, mask_at, slope = q + b * sqb + head * sqh + q0 * sql, g + b * sgb + head * sgh + q0 * sgl, mask, 0.0
        if (BOOLEAN | ADDITIVE) & KIND:
            mask_at = mask + b * smb + head * smh + q0 * smq + k0 * smk
        if SLOPES & KIND:
            slope = tl.load(slopes + b * sab + head * sah) * LOG2_E
        to_q = sums
        if SUMMED & KIND:  # it ends with the head's sequence: what lies beyond is another one's
            length = tl.maximum(lq, 1) if VARLEN & KIND else LQ
            to_q = tl.make_tensor_descriptor(sums + number * BD, [length, BD], [BD, 1], [BM, BD])
        for n in tl.static_range(4):
            if n == 2 or (n < 2 and RIGHT & KIND and (n or PREFIX & KIND)) or (n == 3 and (LEFT | PREFIX) & KIND):
                begin, stop = _stretch(n, low, low_full, high_full, high, all_high)
                dk_block, dv_block = _keys_gradient(dk_block, dv_block, to_q, k_block, v_block, q_at, g_at, sql, sqd, sgl, sgd,
                                                    numbers, rows, number, begin, stop, D, DV, LK, k0, j[:, None], lq, lk, shift,
                                                    mask_at, smq, smk, slope, inner, outer, left, right, prefix, key0, key1,
                                                    least, keep, n != 2, KIND, PRECISION, BM, BD, BV)
    to_k = (dk + b * syb + kv_head * syh + at * syl)[:, None] + d
    to_v = (dv + b * szb + kv_head * szh + at * szl)[:, None] + e
    tl.store(to_k, (dk_block * scale).to(dk.dtype.element_ty), mask=m_d)
    tl.store(to_v, (dv_block * keep).to(dv.dtype.element_ty), mask=m_e)


@triton.jit(do_not_specialize=["heads", "group", "blocks", "LQ", "LK", "rows", "bottom", "left", "right", "prefix",
                               "key0", "key1", "least", "nb", "nh", "k_blocks"])
def backward_mask(q, k, v, mask, slopes, g, numbers, dm, tasks, offsets_q, offsets_k,
                  sqb, sqh, sql, sqd, skb, skh, skl, skd, svb, svh, svl, svd, sgb, sgh, sgl, sgd, sdb, sdh, sdq, sdk,
                  smb, smh, smq, smk, sab, sah,
                  heads, group, blocks, LQ, LK, rows, D, DV, inner, outer, bottom, left, right, prefix, key0, key1, least, keep,
                  nb, nh, k_blocks, ALL_Q: tl.constexpr, ALL_K: tl.constexpr,
                  KIND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                  BV: tl.constexpr):
    """The gradient of a mask's elements (dm, strides sd_): BM queries, or all that share it (ALL_Q), by BN keys, or all (ALL_K);
    of nb batch items and nh heads that share it, in their order."""
    pid = tl.program_id(0)
    chunk = pid % k_blocks
    b0, n, h0, block, q0, lq, k0, lk = _place(pid // k_blocks, blocks, heads // nh, tasks, offsets_q, offsets_k, LQ, LK, KIND)
    shift = (lk - lq) * bottom
    i_begin, i_end = block * BM, tl.minimum(block * BM + BM, lq)
    if ALL_Q:
        i_begin, i_end = 0, lq
    j_begin = chunk * BN
    j_end = tl.minimum(j_begin + BN, lk)
    if ALL_K:
        j_begin, j_end = 0, lk
    acc = tl.zeros((BM, BN), tl.float32)
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    for shared in tl.range(0, nb * nh):
        b = b0 * nb + shared // nh
        head = (h0 * nh + shared % nh).to(tl.int64)
        kv_head = head // group
        slope = 0.0
        if SLOPES & KIND:
            slope = tl.load(slopes + b * sab + head * sah) * LOG2_E
        for i0 in tl.range(i_begin, i_end, BM):
            i = i0 + tl.arange(0, BM)
            m_rows = i < lq
            at = (q0 + i).to(tl.int64)
            number = (b * heads + head) * LQ + at
            q_block = tl.load((q + b * sqb + head * sqh + at * sql)[:, None] + d[None, :] * sqd,
                              mask=_there(m_rows[:, None], (d < D)[None, :], EVEN_D & KIND), other=0.0)
            g_block = tl.load((g + b * sgb + head * sgh + at * sgl)[:, None] + e[None, :] * sgd,
                              mask=_there(m_rows[:, None], (e < DV)[None, :], EVEN_V & KIND), other=0.0)
            offset, inverse, delta = _row_numbers(numbers, rows, number[:, None], m_rows[:, None],
                                                  q.dtype.element_ty.primitive_bitwidth == 32)
            mask_row = (mask + b * smb + head * smh + at * smq + k0 * smk)[:, None]
            drop_low, drop_a, drop_b = 0, 0, 0
            if DROPOUT & KIND:
                drop_low, drop_a, drop_b = _dropout_row(number[:, None], LK, k0, key0)
            j_low, j_high = j_begin, j_end
            if not PREFIX & KIND:  # what none of these rows sees
                if RIGHT & KIND:
                    j_high = tl.minimum(j_end, tl.maximum(0, tl.minimum(i0 + BM, lq) + shift + right))
                if LEFT & KIND:
                    j_low = tl.maximum(j_begin, tl.maximum(0, i0 + shift - left) // BN * BN)
            for j0 in tl.range(j_low, j_high, BN):
                j = (j0 + tl.arange(0, BN))
                at_k = (k0 + j).to(tl.int64)[None, :]
                k_block = tl.load(k + b * skb + kv_head * skh + at_k * skl + d[:, None] * skd,
                                  mask=_there((j < lk)[None, :], (d < D)[:, None], EVEN_D & KIND), other=0.0)
                v_block = tl.load(v + b * svb + kv_head * svh + at_k * svl + e[:, None] * svd,
                                  mask=_there((j < lk)[None, :], (e < DV)[:, None], EVEN_V & KIND), other=0.0)
                s = tl.dot(q_block, k_block, input_precision=PRECISION)
                dp = tl.dot(g_block, v_block, input_precision=PRECISION)
                _, ds, _ = _weights(s, dp, i[:, None], j[None, :], m_rows[:, None], lk, shift, mask_row, smk, slope,
                                    offset, inverse, delta, drop_low, drop_a, drop_b, inner,
                                    outer, left, right, prefix, key1, least, keep, True, KIND)
                acc += ds
    i, j = block * BM + tl.arange(0, BM), chunk * BN + tl.arange(0, BN)
    to = dm + (n.to(tl.int64) if VARLEN & KIND else b0) * sdb + h0 * sdh
    if ALL_Q and ALL_K:
        tl.store(to, tl.sum(tl.sum(acc, 1), 0).to(dm.dtype.element_ty))
    elif ALL_Q:
        tl.store(to + (k0 + j).to(tl.int64) * sdk, tl.sum(acc, 0).to(dm.dtype.element_ty), mask=j < lk)
    elif ALL_K:
        tl.store(to + (q0 + i).to(tl.int64) * sdq, tl.sum(acc, 1).to(dm.dtype.element_ty), mask=i < lq)
    else:
        tl.store(to + (q0 + i).to(tl.int64)[:, None] * sdq + (k0 + j).to(tl.int64)[None, :] * sdk, acc.to(dm.dtype.element_ty),
                 mask=(i < lq)[:, None] & (j < lk)[None, :])
