"""Matrix products, as compiled: blocking around the register tile, packing, epilogue, and the memory-bound vector products.

Imported only when a kernel has to be built. Sizes are in elements, strides in bytes, addresses are int64.

The loop nest (Goto & van de Geijn 2008; van Zee & van de Geijn, "BLIS", ACM TOMS 41(3), 2015) without the packing of A: the
tile broadcasts A's elements straight from its rows, so A needs a copy only if it has to be converted or its columns are far
apart. B is packed panel by panel just before its first use, once for keeps (``pack_weight``), or not at all when the
product is too small to repay it.
"""

from __future__ import annotations

from typing import Any

from .engine.activations import apply
from .engine.dot import Dot, dot, row_adder
from .engine.host import simd
from .engine.pack import packer, pair_packer
from .engine.region import parallel, parallel_tasks
from .engine.simd import ELEMS, INT64, Elem, compute_elem, flushed, fma, inline, load_n, load_scalar, outline, spread, store_n
from .engine.tile import Tile, multiply_blocks, tile_size

ROWS, VECS = tile_size()
GROUP = 16  # tiles that are computed before their epilogue, while they are in L1
# Products that one accumulator sums up. In a longer chain the rounding errors show, above all where terms are alike: at k = 1023
# random positive terms were 26 ulp off, not 7. It costs a few percent.
CHAIN = 256
STRETCH = 128  # rows that are summed, eight at a time, before their sum is added to that of the others


def tiles(p: Any, pairs: bool, masked: bool = True) -> Any:
    """run(rows, vecs, last, blocks, k, …): so many tiles of that size, one below the other; ``last`` > 0 says how many lanes of
    their last vector exist, if there are ``masked`` tiles at all.

    Rows are 8, 4, 2 or 1, as the machine's tile allows. Where a masked load costs nothing (AVX-512) there are masked tiles only.
    """
    sizes = [r for r in (8, 4, 2, 1) if r <= ROWS]
    cheap_masks = not masked or simd().name == "avx512"
    grid = {(r, v, m): Tile(p, r, v, masked=masked and (m or cheap_masks), pairs=pairs)
            for r in sizes for v in (1, 2, 3) for m in (False, True)}

    def rows_function(r: int) -> Any:
        t1, t2, t3 = (grid[r, v, False] for v in (1, 2, 3))
        m1, m2, m3 = (grid[r, v, True] for v in (1, 2, 3))

        @inline
        def run(vecs, last, blocks, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, ahead, ahead_k):
            parts = (k + CHAIN - 1) // CHAIN
            rest = ((k + parts - 1) // parts if parts > 1 else k, a, a_row, a_k, r * a_row, b, b_k, init, init_row, r * init_row,
                    c, c_row, r * c_row, last if last > 0 else p.lanes, ahead, ahead_k)
            if last == 0 or cheap_masks:
                if vecs == 3:
                    multiply_blocks(t3, blocks, k, *rest)
                elif vecs == 2:
                    multiply_blocks(t2, blocks, k, *rest)
                else:
                    multiply_blocks(t1, blocks, k, *rest)
            elif vecs == 3:
                multiply_blocks(m3, blocks, k, *rest)
            elif vecs == 2:
                multiply_blocks(m2, blocks, k, *rest)
            else:
                multiply_blocks(m1, blocks, k, *rest)
        return run

    run1, run2, run4 = rows_function(1), rows_function(2), rows_function(4)
    run8 = rows_function(8) if ROWS == 8 else run4

    @inline
    def run(rows, vecs, last, blocks, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, ahead, ahead_k):
        rest = (vecs, last, blocks, k, a, a_row, a_k, b, b_k, init, init_row, c, c_row, ahead, ahead_k)
        if rows == 8:
            run8(*rest)
        elif rows == 4:
            run4(*rest)
        elif rows == 2:
            run2(*rest)
        else:
            run1(*rest)
    return run


def _epilogue(e: Elem, pairs: bool = False) -> Any:
    """The last step of every product: C = act(alpha · S + bias + beta · R), from the sums S to the output. (Pairs have taken
    subnormal numbers for 0 in the product already.)"""
    p = compute_elem(e)
    to = flushed(e) if pairs else e
    lanes = p.lanes

    @outline
    def finish(rows, vecs, last, src, src_row, c, c_row, alpha, bias, beta, res, res_m, res_n, act, p0, p1):
        for i in range(rows):
            for j in range(vecs):
                n = last if last > 0 and j == vecs - 1 else lanes
                v = load_n(p, src + i * src_row + j * p.bytes, n) * alpha
                if bias != 0:
                    v = v + load_n(e, bias + j * e.bytes, n)
                if res != 0:
                    r = res + i * res_m + j * lanes * res_n
                    if res_n == 0:
                        v = fma(spread(p, load_scalar(e, r)), beta, v)
                    else:
                        v = fma(load_n(e, r, n), beta, v)
                if act != 0:
                    v = apply(act, v, p0, p1)
                store_n(to, c + i * c_row + j * e.bytes, v, n)
    return finish


def product(elem_name: str, pairs: bool) -> Any:
    """The blocked product C = act(alpha · A B + bias + beta · R), for one dtype; see ``matmul.multiply`` for the arguments."""
    e = ELEMS[elem_name]
    p = compute_elem(e)
    lanes, pb = p.lanes, p.bytes
    unit = 4 if pairs else p.size  # bytes of one k of packed A and of one lane of packed B
    a_width = max(lanes, ROWS)
    half = e is not p
    run = tiles(p, pairs)
    pack = pair_packer() if pairs else packer(e)
    finish = _epilogue(e, pairs)
    scratch_row = VECS * pb

    @outline
    def pack_part(q, n, k, k0, i0, i1, kn, b, b_k, b_n, cut, dst):
        """Rows i0 … i1 of panel q of the rows k0 … k0 + kn of B."""
        vectors = (n + lanes - 1) // lanes
        first = q * vectors // cut
        vecs = (q + 1) * vectors // cut - first
        col = first * lanes
        i_k = k0 + i0 if not pairs else 2 * (k0 + i0)
        ks = min(i1 - i0 if not pairs else 2 * (i1 - i0), k - i_k)
        pack(b + i_k * b_k + col * b_n, b_n, b_k, min(vecs * lanes, n - col), ks,
             dst + (col * kn + i0 * vecs * lanes) * unit, vecs * lanes)

    @outline
    def block(m, m0, m1, m2, q0, q1, q2, cut, n, k, k0, k1, a, a_m, a_k, b, b_k, b_n, packed, base, deep, direct,
              c, c_m, bias, bias_m, alpha, beta, res, res_m, res_n, act, p0, p1, epilogue, mc, kc, pack_a, ws):
        """Rows m0 … m1 of m and panels q0 … q1 of the ``cut`` that the columns are cut into, as evenly as vectors can be; k0 … k1
        of the sum. Where A is packed, the block's next rows are fetched into L2 meanwhile, or those from m2 on, with which the
        thread probably goes on. ``packed`` are B's panels from k = ``base`` on, ``deep`` long; 0: they are packed here, for the
        first rows, or, if panels q1 … q2 come next, at once, and meanwhile the rows of those are fetched into L2.
        """
        vectors = (n + lanes - 1) // lanes
        v0 = q0 * vectors // cut
        depth = (k + 1) // 2 if pairs else k  # what the tile counts as k
        scratch = ws
        a_block = ws + GROUP * ROWS * scratch_row
        b_block = a_block + (((mc + a_width - 1) // a_width * a_width) * kc * unit if pack_a else 0)
        b_step = 2 if pairs else 1
        while True:
            kn = min(kc, k1 - k0)
            final = k0 + kn >= depth
            fetch = fetch_end = 0
            if q2 > 0:
                for i in range(0, kn, 8):  # along all panels: see pack_rows
                    for q in range(q0, q1):
                        pack_part(q, n, k, k0, i, min(kn, i + 8), kn, b, b_k, b_n, cut, b_block - v0 * lanes * kn * unit)
                if k0 + kn < k1:  # the next rows
                    fetch = b + (k0 + kn) * b_k + v0 * lanes * e.size
                    fetch_end = fetch + (q1 * vectors // cut - v0) * lanes * e.size
                elif q2 > q1:
                    fetch = b + q1 * vectors // cut * lanes * e.size
                    fetch_end = b + min(n, q2 * vectors // cut * lanes) * e.size
            for mb in range(m0, m1, mc):
                mn = min(mc, m1 - mb)
                ahead_m = mb + mc if mb + mc < m1 else m2
                lines = (min(mc, m - ahead_m) * a_m + 63) // 64 if a_m == e.size else 0
                if pack_a:
                    piece = 32 if a_k != e.size else max(1, kn)  # columns: along all panels, see pack_rows
                    for j in range(0, kn, piece):
                        ks = min(min(piece, kn - j) * b_step, k - (k0 + j) * b_step)
                        for i in range(0, mn, a_width):
                            pack(a + (mb + i) * a_m + (k0 + j) * b_step * a_k, a_m, a_k, min(a_width, mn - i), ks,
                                 a_block + (i * kn + j * a_width) * unit, a_width)
                for q in range(q0, q1):
                    first = q * vectors // cut
                    vecs = (q + 1) * vectors // cut - first
                    col = first * lanes
                    cols = min(vecs * lanes, n - col)
                    last = cols - (vecs - 1) * lanes if cols < vecs * lanes else 0
                    if direct:
                        bp = b + k0 * b_k + col * b_n
                        bk = b_k
                    else:
                        bk = vecs * lanes * unit
                        if packed != 0:
                            bp = packed + (first * lanes * deep + (k0 - base) * vecs * lanes) * unit
                        else:
                            bp = b_block + (first - v0) * lanes * kn * unit
                            if mb == m0 and q2 == 0:
                                ks = min(kn * b_step, k - k0 * b_step)
                                pack(b + k0 * b_step * b_k + col * b_n, b_n, b_k, cols, ks, bp, vecs * lanes)
                    # While this panel is used, the next one is fetched into L2, a part with each tile.
                    ahead_k = bk * ROWS // mn if mn >= ROWS and not direct else 0
                    i = 0
                    while i < mn:
                        rows = 8 if ROWS == 8 and mn - i >= 8 else 4 if mn - i >= 4 else 2 if mn - i >= 2 else 1
                        blocks = min(GROUP, (mn - i) // ROWS) if rows == ROWS else 1
                        cp = c + (mb + i) * c_m + col * e.size
                        if pack_a:
                            blocks = 1
                            ap = a_block + (i // a_width * a_width * kn + i % a_width) * unit
                            ar, ak = unit, a_width * unit
                        else:
                            ap = a + (mb + i) * a_m + k0 * b_step * a_k
                            ar, ak = a_m, a_k * b_step
                        if k0 > 0:
                            init, init_row = cp, c_m
                        elif bias_m != 0:
                            init, init_row = bias + (mb + i) * bias_m, bias_m
                        else:
                            init, init_row = (bias + col * p.size if bias != 0 else 0), 0
                        ahead, ahead_step = bp + kn * bk + i // ROWS * kn * ahead_k, ahead_k
                        if pack_a and i == 0 and q - q0 < lines:  # a line of each of A's columns
                            ahead, ahead_step = a + ahead_m * a_m + k0 * b_step * a_k + (q - q0) * 64, a_k * b_step
                        if fetch < fetch_end:  # a line of each row
                            blocks, ahead, ahead_step = 1, fetch, b_k
                            fetch += 64
                        rp = res + (mb + i) * res_m + col * res_n if res != 0 else 0
                        if half:
                            run(rows, vecs, 0, blocks, kn, ap, ar, ak, bp, bk, 0, 0, scratch, scratch_row, ahead,
                                ahead_step)
                            bias_at = bias + col * e.size if bias != 0 else 0
                            finish(rows * blocks, vecs, last, scratch, scratch_row, cp, c_m, alpha, bias_at, beta,
                                   rp, res_m, res_n, act, p0, p1)
                        else:
                            run(rows, vecs, last, blocks, kn, ap, ar, ak, bp, bk, init, init_row, cp, c_m, ahead,
                                ahead_step)
                            if epilogue and final:
                                finish(rows * blocks, vecs, last, cp, c_m, cp, c_m, alpha, 0, beta,
                                       rp, res_m, res_n, act, p0, p1)
                        i += rows * blocks
            k0 += kn
            if k0 >= k1:
                break

    @inline
    def pack_columns(t, q, n, k, k0, kn, b, b_k, b_n, cut, dst):
        pack_part(q, n, k, k0, 0, kn, kn, b, b_k, b_n, cut, dst)

    @inline
    def pack_rows(t, task, n, k, k0, kn, b, b_k, b_n, cut, dst):
        """Eight rows at a time along all panels: from panel to panel each row would be in another page, and in one cache set."""
        for i in range(task * 32, min(kn, task * 32 + 32), 8):
            for q in range(cut):
                pack_part(q, n, k, k0, i, min(kn, i + 8), kn, b, b_k, b_n, cut, dst)

    @inline
    def body(t, task, nt, tm, tn, group, table, m, n, k, k0, k1, a, a_b, a_m, a_k, b, b_b, b_k, b_n, packed, base, deep, cut,
             direct, c, c_b, c_m, bias, bias_m, alpha, beta, res, res_b, res_m, res_n, act, p0, p1, epilogue, mc, kc,
             pack_a, ws, ws_size):
        step = 64 // e.size if pack_a and a_k != e.size else ROWS  # whole lines of A's columns
        units = (m + step - 1) // step
        batch = task // (tm * tn)
        rest = task - batch * (tm * tn)
        mi = rest // tn
        ni = rest - mi * tn
        if table != 0:
            ao, bo = load_scalar(INT64, table + batch * 24), load_scalar(INT64, table + batch * 24 + 8)
            ro = load_scalar(INT64, table + batch * 24 + 16)
        else:
            ao, bo, ro = batch * a_b, batch * b_b, batch * res_b
        m0, m1 = units * mi // tm * step, min(m, units * (mi + 1) // tm * step)
        m2 = units * min(tm, (rest + nt) // tn) // tm * step  # a thread's next rows, more often than not
        ri = res + ro if res != 0 else 0
        q0, end = cut * ni // tn, cut * (ni + 1) // tn
        while True:  # once, or a group of panels at a time
            q1 = min(end, q0 + group) if group > 0 else end
            q2 = min(end, q1 + group) if group > 0 else 0
            block(m, m0, m1, m2, q0, q1, q2, cut, n, k, k0, k1,
                  a + ao, a_m, a_k, b + bo, b_k, b_n, packed, base, deep, direct, c + batch * c_b, c_m, bias, bias_m, alpha, beta,
                  ri, res_m, res_n, act, p0, p1, epilogue, mc, kc, pack_a, ws + t * ws_size)
            q0 = q1
            if q0 >= end:
                break

    def kernel(nt, tasks, tm, tn, group, table, m, n, k, a, a_b, a_m, a_k, b, b_b, b_k, b_n, packed, shared, cut, direct,
               c, c_b, c_m, bias, bias_m, res, res_b, res_m, res_n, act, epilogue, mc, kc, pack_a, ws, ws_size,
               alpha, beta, p0, p1):
        depth = (k + 1) // 2 if pairs else k
        k0 = 0
        while True:  # once, or, where all threads share B's panels, once for each kc of the sum
            k1 = min(depth, k0 + kc) if shared != 0 else depth
            deep = k1 - k0
            if shared != 0:
                if b_n == e.size:
                    parallel_tasks(nt, (deep + 31) // 32, pack_rows, (n, k, k0, deep, b, b_k, b_n, cut, shared))
                else:
                    parallel_tasks(nt, cut, pack_columns, (n, k, k0, deep, b, b_k, b_n, cut, shared))
            parallel_tasks(nt, tasks, body, (
                nt, tm, tn, group, table, m, n, k, k0, k1, a, a_b, a_m, a_k, b, b_b, b_k, b_n, packed + shared, k0, deep, cut,
                direct, c, c_b, c_m, bias, bias_m, alpha, beta, res, res_b, res_m, res_n, act, p0, p1, epilogue, mc, kc,
                pack_a, ws, ws_size))
            k0 = k1
            if k0 >= depth:
                break
    return kernel


def rows_dot(elem_name: str) -> Any:
    """y[v, r] = epilogue(Σ_k W[r, k] · x[v, k]) with both read along k: a matrix and one or a few vectors."""
    e = ELEMS[elem_name]
    p = compute_elem(e)
    finish = _epilogue(e)
    chunk = 64  # results that wait for the epilogue
    row = chunk * p.size
    d41, d42, d44 = Dot(e, 4, 1, 2), Dot(e, 4, 2), Dot(e, 4, 4)  # four streams: one or eight read slower
    d11, d12, d14 = Dot(e, 1, 1, 2), Dot(e, 1, 2), Dot(e, 1, 4)  # as d41 sums: a row has the same bits anywhere

    @inline
    def body(t, task, m, n, k, w, w_b, w_n, x, x_b, x_m, c, c_b, c_m, bias, alpha, beta, res, res_b, res_m, res_n,
             act, p0, p1, ws):
        scratch = ws + t * 8 * row
        chunks = (n + chunk - 1) // chunk
        batch = task // chunks
        r0 = (task - batch * chunks) * chunk
        rn = min(chunk, n - r0)
        wp, cp = w + batch * w_b + r0 * w_n, c + batch * c_b + r0 * e.size
        for m0 in range(0, m, 8):
            mn = min(8, m - m0)
            r = 0
            while r < rn:
                four = rn - r >= 4
                wr = wp + r * w_n
                v = 0
                while v < mn:
                    many = 4 if mn - v >= 4 else 2 if mn - v >= 2 else 1
                    y = scratch + v * row + r * p.size
                    xp = x + batch * x_b + (m0 + v) * x_m
                    if many == 4:
                        if four:
                            dot(d44, k, wr, w_n, xp, x_m, y, row)
                        else:
                            dot(d14, k, wr, w_n, xp, x_m, y, row)
                    elif many == 2:
                        if four:
                            dot(d42, k, wr, w_n, xp, x_m, y, row)
                        else:
                            dot(d12, k, wr, w_n, xp, x_m, y, row)
                    elif four:
                        dot(d41, k, wr, w_n, xp, x_m, y, row)
                    else:
                        dot(d11, k, wr, w_n, xp, x_m, y, row)
                    v += many
                r += 4 if four else 1
            vecs = (rn + p.lanes - 1) // p.lanes
            last = rn - (vecs - 1) * p.lanes
            rp = res + batch * res_b + m0 * res_m + r0 * res_n if res != 0 else 0
            bp = bias + r0 * e.size if bias != 0 else 0
            finish(mn, vecs, last, scratch, row, cp + m0 * c_m, c_m, alpha, bp, beta, rp, res_m, res_n, act, p0, p1)

    def kernel(nt, batches, m, n, k, w, w_b, w_n, x, x_b, x_m, c, c_b, c_m, bias, res, res_b, res_m, res_n, act, ws,
               alpha, beta, p0, p1):
        tasks = batches * ((n + chunk - 1) // chunk)
        parallel_tasks(nt, tasks, body, (m, n, k, w, w_b, w_n, x, x_b, x_m, c, c_b, c_m, bias, alpha, beta, res, res_b, res_m,
                                         res_n, act, p0, p1, ws))
    return kernel


def rows_sum(elem_name: str) -> Any:
    """y = epilogue(Σ_k x[k] · W[k, :]) with W's rows read whole; without x the plain sum of the rows.

    The columns are divided among the threads, or the rows if the columns are few; then thread 0's share of the work is
    also to add up the threads' sums, in their order. ws: two rows of sums, or as many for each thread.
    """
    e = ELEMS[elem_name]
    p = compute_elem(e)
    finish = _epilogue(e)
    add_rows, add_sums = row_adder(e), row_adder(p)

    @inline
    def clear(y, n):
        for j in range((n + p.lanes - 1) // p.lanes):
            store_n(p, y + j * p.bytes, spread(p, 0.0), min(p.lanes, n - j * p.lanes))

    @inline
    def add_stretches(k, n, w, w_k, x, x_k, y, part):
        """y += what k rows add up to, a stretch of them at a time, whose sum is in ``part``"""
        for i in range(0, k, STRETCH):
            clear(part, n)
            add_rows(min(STRETCH, k - i), n, w + i * w_k, w_k, x + i * x_k if x != 0 else 0, x_k, part)
            add_sums(1, n, part, 0, 0, 0, y)

    @inline
    def by_columns(t, nt, n, k, w, w_k, x, x_k, c, bias, alpha, beta, res, res_n, act, p0, p1, ws, ws_row):
        vectors = (n + p.lanes - 1) // p.lanes
        j0 = vectors * t // nt * p.lanes
        jn = min(n, vectors * (t + 1) // nt * p.lanes) - j0
        if jn > 0:
            y = ws + j0 * p.size
            clear(y, jn)
            add_stretches(k, jn, w + j0 * e.size, w_k, x, x_k, y, y + ws_row)
            vecs = (jn + p.lanes - 1) // p.lanes
            rp = res + j0 * res_n if res != 0 else 0
            bp = bias + j0 * e.size if bias != 0 else 0
            finish(1, vecs, jn - (vecs - 1) * p.lanes, y, 0, c + j0 * e.size, 0, alpha, bp, beta, rp, 0, res_n, act, p0, p1)

    @inline
    def by_rows(t, nt, n, k, w, w_k, x, x_k, ws, ws_row):
        y = ws + t * ws_row
        clear(y, n)
        k0 = k * t // nt
        xp = x + k0 * x_k if x != 0 else 0
        add_stretches(k * (t + 1) // nt - k0, n, w + k0 * w_k, w_k, xp, x_k, y, y + nt * ws_row)

    def kernel(nt, split_rows, n, k, w, w_k, x, x_k, c, bias, res, res_n, act, ws, ws_row, alpha, beta, p0, p1):
        if split_rows:
            for t in range(nt):  # a thread that the pool does not grant leaves zeros
                clear(ws + t * ws_row, n)
            parallel(nt, by_rows, (n, k, w, w_k, x, x_k, ws, ws_row))
            add_sums(nt - 1, n, ws + ws_row, ws_row, 0, 0, ws)
            vecs = (n + p.lanes - 1) // p.lanes
            finish(1, vecs, n - (vecs - 1) * p.lanes, ws, 0, c, 0, alpha, bias, beta, res, 0, res_n, act, p0, p1)
        else:
            parallel(nt, by_columns, (n, k, w, w_k, x, x_k, c, bias, alpha, beta, res, res_n, act, p0, p1, ws, ws_row))
    return kernel


def pack_weight(elem_name: str, pairs: bool) -> Any:
    """All of B in panels, for keeps: the layout that ``product`` reads with ``packed``."""
    e = ELEMS[elem_name]
    p = compute_elem(e)
    unit = 4 if pairs else p.size
    pack = pair_packer() if pairs else packer(e)

    @inline
    def body(t, nt, n, k, b, b_k, b_n, cut, dst):
        vectors = (n + p.lanes - 1) // p.lanes
        depth = (k + 1) // 2 if pairs else k
        for q in range(cut * t // nt, cut * (t + 1) // nt):
            first = q * vectors // cut
            vecs = (q + 1) * vectors // cut - first
            col = first * p.lanes
            pack(b + col * b_n, b_n, b_k, min(vecs * p.lanes, n - col), k, dst + col * depth * unit, vecs * p.lanes)

    def kernel(nt, n, k, b, b_k, b_n, cut, dst):
        parallel(nt, body, (n, k, b, b_k, b_n, cut, dst))
    return kernel
