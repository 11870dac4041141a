"""Recurrent layers, as compiled: one region of threads for a whole sequence, forward and back. Imported only to build a kernel.

A step multiplies the state, (rows, k), with the recurrent weights. Their columns, the units, are cut into panels of up to three
vectors. A panel holds all gates of its units, and belongs to one thread, which keeps reading its panels from its own cache,
computes the gates and the cell of its units, and meets the others at a barrier: one a step. A thread that is done before the
others, because their cores are slower or busy with something else, takes panels that they have not begun.

The product of the input is made the same way for a few steps at a time, just before they are taken, so that it is still in the
cache when the state's product is added to it. Every sum runs along k in the same order, whatever the number of rows,
steps and threads: a sequence cut into pieces gives the same bits.

Rows of a step lie next to each other, as a PackedSequence has them; ``table`` says where each step starts (0: ``batch`` rows
each). Sizes are in elements, strides in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .engine.pack import packer, sample
from .engine.region import arrive, atomic_add, atomic_load, barrier, parallel, wait_for
from .engine.simd import (
    BFLOAT16,
    ELEMS,
    FLOAT16,
    INT64,
    Elem,
    absolute,
    copysign,
    fma,
    from_bits,
    inline,
    load,
    load_n,
    load_scalar,
    maximum,
    maximum_fast,
    outline,
    prefetch,
    record,
    round_to,
    select,
    spread,
    store,
    store_n,
    store_scalar,
    to_bits,
)
from .engine.tile import Tile, multiply_blocks, multiply_groups, tile_size
from .engine.vecmath import EXP, EXP_TAIL, LN2_HIGH, LN2_LOW, LOG2_E, MANTISSA, Constant, of, polynomial

ROWS, VECS = tile_size()
LAG = 16  # of layers side by side: one is a part in so many of the steps behind the one below it
CHAIN = 256  # terms that one accumulator sums, as in the products
LSTM, GRU, TANH, RELU = range(4)
JOB = record(36)  # rnn.Job: one direction of one layer
CHECK = record(4)  # behind it, three times: packed.Packing's sample of a weight that is kept, its address, step and count, and it
CHECKS, JOB_BYTES = 36 * 8, (36 + 3 * 4) * 8


# Sigmoid and tanh to 2 ulp. Their exponential is of a negative number and never subnormal, so 2^n is one shift: MAGIC adds an
# exponent's bias to n, in the lowest bits of a float that has no fraction left. (vecmath's own take half as much time again.)
MAGIC = Constant(1.5 * 2.0**23 + 127, 1.5 * 2.0**52 + 1023)
LEAST = Constant(-87.0, -708.0)


@inline
def _halvings(v):
    """v = n ln 2 + r: (2^n, r), for v ≤ 0 and at least LEAST"""
    v = maximum_fast(of(LEAST, v), v)  # the second where v is NaN
    t = fma(v, of(LOG2_E, v), of(MAGIC, v))
    n = t - of(MAGIC, v)
    bits = to_bits(t)
    return from_bits(bits << of(MANTISSA, bits)), fma(n, -of(LN2_LOW, v), fma(n, -of(LN2_HIGH, v), v))


@inline
def sigmoid(v):
    power, r = _halvings(-absolute(v))
    e = polynomial(EXP, r) * power
    return select(v < 0.0, e, 1.0) / (1.0 + e)


@inline
def tanh(v):
    power, r = _halvings(-2.0 * absolute(v))
    m = fma(power, fma(r * r, polynomial(EXP_TAIL, r), r), power - 1.0)  # exp(-2 |v|) - 1, without cancellation
    return copysign(m / (m + 2.0), v)


def _panels(e: Elem) -> tuple[Any, Any, Any]:
    """(pack, multiply, place) for matrices in panels.

    Panel q of ``cut`` has vectors q·V/cut … (q + 1)·V/cut of each gate's V vectors of units. Gate g of a panel is k rows of these
    vectors, the next gate follows.
    """
    lanes, vb, size = e.lanes, e.bytes, e.size
    pack_one = packer(e)
    tiles = {(r, v): Tile(e, r, v) for r in (8, 4, 2, 1) if r <= ROWS for v in (1, 2, 3)}
    grouped = {(g, v): Tile(e, 1, g * v, groups=g) for g in (3, 4) for v in (1, 2, 3)}

    def of_rows(r: int) -> Any:
        t1, t2, t3 = (tiles[r, v] for v in (1, 2, 3))

        @inline
        def run(blocks, vecs, k, a, a_row, b, init, init_row, c, c_row):
            """The stretch that follows in B is fetched into L2 meanwhile"""
            b_k, init_step = vecs * vb, r * init_row if init != 0 else 0
            ahead, ahead_k = b + k * b_k, b_k // blocks
            if vecs == 3:
                multiply_blocks(t3, blocks, k, k, a, a_row, size, r * a_row, b, b_k, init, init_row, init_step,
                                c, c_row, r * c_row, 0, ahead, ahead_k)
            elif vecs == 2:
                multiply_blocks(t2, blocks, k, k, a, a_row, size, r * a_row, b, b_k, init, init_row, init_step,
                                c, c_row, r * c_row, 0, ahead, ahead_k)
            else:
                multiply_blocks(t1, blocks, k, k, a, a_row, size, r * a_row, b, b_k, init, init_row, init_step,
                                c, c_row, r * c_row, 0, ahead, ahead_k)
        return run

    def of_gates(g: int) -> Any:
        t1, t2, t3 = (grouped[g, v] for v in (1, 2, 3))

        @inline
        def run(vecs, k, a, b, init, c):
            b_k = vecs * vb
            if vecs == 3:
                multiply_groups(t3, k, CHAIN, a, 0, size, b, b_k, k * b_k, init, 0, c, 0)
            elif vecs == 2:
                multiply_groups(t2, k, CHAIN, a, 0, size, b, b_k, k * b_k, init, 0, c, 0)
            else:
                multiply_groups(t1, k, CHAIN, a, 0, size, b, b_k, k * b_k, init, 0, c, 0)
        return run

    run1, run2, run4, gates3, gates4 = of_rows(1), of_rows(2), of_rows(4), of_gates(3), of_gates(4)
    run8 = of_rows(8) if ROWS == 8 else run4
    tall, tile = ROWS * 3 // 2, Tile(e, ROWS * 3 // 2, 2)  # two vectors leave room for more rows, and need them

    @inline
    def place(q, cut, units):
        """A panel's first vector, its vectors and its units"""
        vectors = (units + lanes - 1) // lanes
        first = q * vectors // cut
        vecs = (q + 1) * vectors // cut - first
        return first, vecs, min(vecs * lanes, units - first * lanes)

    @outline
    def pack(q, cut, gates, turn, units, k, w, w_gate, w_n, w_k, dst):
        """Panel q of a matrix whose unit n of gate g is at w + g·w_gate + n·w_n; gate ``turn`` comes first"""
        first, vecs, cols = place(q, cut, units)
        for g in range(gates):
            source = w + (g + turn) % gates * w_gate + first * lanes * w_n
            pack_one(source, w_n, w_k, cols, k, dst + (first * gates + g * vecs) * k * vb, vecs * lanes)

    @outline
    def product(rows, vecs, gates, k, a, a_row, b, init, init_row, c, c_row):
        """c[rows, gates · vecs vectors] = init + a[rows, k] · a panel; init may be c, or 0 for nothing"""
        gate = vecs * vb
        alone = rows % 2 if gates > 1 else 0  # a last row: all gates at once, or there would be too few accumulators
        several = rows - alone
        for g in range(gates):
            for k0 in range(0, max(1, k), CHAIN):  # a stretch of a panel stays in L1 for all rows
                kn, ap, bp, to = min(CHAIN, k - k0), a + k0 * size, b + (g * k + k0) * gate, c + g * gate
                start, start_row = (init + g * gate if init != 0 else 0), init_row
                if k0 > 0:
                    start, start_row = to, c_row
                i = 0
                while i < several:
                    left, blocks = several - i, 1
                    tall_blocks = left // tall - (left % tall == 2) if vecs == 2 else 0  # rather twice four rows than two alone
                    if tall_blocks > 0:
                        r, blocks = tall, tall_blocks
                        b_k, init_step = 2 * vb, tall * start_row if start != 0 else 0
                        multiply_blocks(tile, blocks, kn, kn, ap, a_row, size, tall * a_row, bp, b_k, start, start_row, init_step,
                                        to, c_row, tall * c_row, 0, bp + kn * b_k, b_k // blocks)
                    elif ROWS == 8 and left >= 8:
                        r, blocks = 8, left // 8
                        run8(blocks, vecs, kn, ap, a_row, bp, start, start_row, to, c_row)
                    elif left >= 4:
                        r, blocks = 4, left // 4
                        run4(blocks, vecs, kn, ap, a_row, bp, start, start_row, to, c_row)
                    elif left >= 2:
                        r = 2
                        run2(1, vecs, kn, ap, a_row, bp, start, start_row, to, c_row)
                    else:
                        r = 1
                        run1(1, vecs, kn, ap, a_row, bp, start, start_row, to, c_row)
                    done = r * blocks
                    i, ap, to = i + done, ap + done * a_row, to + done * c_row
                    start = start + done * start_row if start != 0 else 0
        if alone:
            ap, to, start = a + several * a_row, c + several * c_row, init + several * init_row if init != 0 else 0
            if gates == 4:
                gates4(vecs, k, ap, b, start, to)
            else:
                gates3(vecs, k, ap, b, start, to)
    return pack, product, place


def _memory(e: Elem) -> tuple[Any, Any, Any]:
    """get(address, n) and put(address, v, n): n lanes. Few vectors are cut short, and masks are slow to store through.

    fetch(rows, vecs, parts, part, src, src_row): what the cells will read or write, into the cache while the product is made.
    """
    lanes, vb = e.lanes, e.bytes

    @inline
    def get(address, n):
        if n == lanes:
            return load(e, address)
        return load_n(e, address, n)

    @inline
    def put(address, v, n):
        if n == lanes:
            store(e, address, v)
        else:
            store_n(e, address, v, n)

    @outline
    def fetch(rows, vecs, parts, part, src, src_row):
        for b in range(rows):
            for p in range(parts):
                for j in range(vecs):
                    prefetch(src + b * src_row + p * part + j * vb)
    return get, put, fetch


@inline
def _step_rows(table, batch, t, steps):
    """The first row of step t, and its rows; (0, 0) for a step that does not exist"""
    if t < 0 or t >= steps:
        return 0, 0
    if table == 0:
        return t * batch, batch
    first = load_scalar(INT64, table + t * 8)
    return first, load_scalar(INT64, table + t * 8 + 8) - first


LINE = 64  # bytes; what threads count on lies in a line of its own


@inline
def _queue(counter, nt, met):
    """Where the threads count the panels that are taken between two barriers: behind the barriers' counter, and from one to the
    next in turn, so that the other can be cleared."""
    return counter + LINE + met % 2 * nt * LINE


@inline
def _clear(queue, t):
    store_scalar(INT64, queue + t * LINE, 0)


@inline
def _take(queue, t, nt, whose, cut):
    """(a panel that nobody has taken, of thread ``whose`` % nt or of one that follows; whose it is), or (-1, …): none is left"""
    while whose < t + nt:
        v = whose % nt
        first, count = cut * v // nt, cut * (v + 1) // nt - cut * v // nt
        if atomic_load(queue + v * LINE) < count:
            n = atomic_add(queue + v * LINE, 1)
            if n < count:
                return first + n, whose
        whose += 1
    return -1, whose


@inline
def _counter(room, first, k):
    """A job's counter of barriers; behind it, that of its steps that are done"""
    return room + load_scalar(INT64, first + k * JOB_BYTES + CHECKS - 8)


def recurrent(elem_name: str) -> Callable[..., Any]:
    """The forward kernel of all modes, for float32 or float64: ``jobs`` records, of directions that do not depend on each other,
    or of layers that do: what is between two of them, ``layer`` bytes, lies at ``between`` then (0: directions).

    It returns 1, and has done nothing, if a weight that was packed beforehand has changed since.

    16-bit types are computed in float32 with ``rounding`` (1: bfloat16, 2: float16) of what is carried from step to step.
    """
    e = ELEMS[elem_name]
    lanes, vb, size = e.lanes, e.bytes, e.size
    pack, product, place = _panels(e)
    get, put, fetch = _memory(e)

    if e.name == "float32":
        @inline
        def rounded(v, rounding):
            if rounding == 1:
                return round_to(BFLOAT16, v)
            if rounding == 2:
                return round_to(FLOAT16, v)
            return v
    else:
        @inline
        def rounded(v, rounding):
            return v

    # The cells' arithmetic is done in place, by loops so short that the processor works at several vectors at once: from one
    # vector's gates to its cell and its output each step waits for the one before.

    @inline
    def sigmoids(at, vectors):
        for j in range(vectors):
            store(e, at + j * vb, sigmoid(load(e, at + j * vb)))

    @inline
    def tanhs(at, vectors):
        for j in range(vectors):
            store(e, at + j * vb, tanh(load(e, at + j * vb)))

    @inline
    def keep_vectors(vecs, cols, at, to):
        for j in range(vecs):
            put(to + j * vb, load(e, at + j * vb), min(lanes, cols - j * lanes))

    @outline
    def lstm_cells(rows, vecs, cols, src, src_row, rounding, c, c_row, keep, keep_row):
        """The new states, where the gates i were"""
        gate = vecs * vb
        for b in range(rows):
            i = src + b * src_row
            sigmoids(i, 2 * vecs)
            tanhs(i + 2 * gate, vecs)
            sigmoids(i + 3 * gate, vecs)
            if keep != 0:
                for g in range(4):
                    keep_vectors(vecs, cols, i + g * gate, keep + b * keep_row + g * c_row)
        for b in range(rows):
            i = src + b * src_row
            for j in range(vecs):
                n, s, ca = min(lanes, cols - j * lanes), i + j * vb, c + b * c_row + j * vb
                cell = rounded(fma(load(e, s + gate), get(ca, n), load(e, s) * load(e, s + 2 * gate)), rounding)
                put(ca, cell, n)
                store(e, s, cell)
            if keep != 0:
                keep_vectors(vecs, cols, i, keep + b * keep_row + 4 * c_row)
            tanhs(i, vecs)
        for b in range(rows):
            i = src + b * src_row
            for j in range(vecs):
                store(e, i + j * vb, load(e, i + j * vb) * load(e, i + 3 * gate + j * vb))

    @outline
    def gru_cells(rows, vecs, cols, src, src_row, h_last, h_row, keep, keep_row):
        """The new states, where the new gates' input part was; behind it r, z and the new gates' recurrent part"""
        gate = vecs * vb
        for b in range(rows):
            new = src + b * src_row
            sigmoids(new + gate, 2 * vecs)
            if keep != 0:
                for g in range(3):
                    keep_vectors(vecs, cols, new + (g + 1) * gate, keep + b * keep_row + (g + g // 2) * h_row)
            for j in range(vecs):
                s = new + j * vb
                store(e, s, fma(load(e, s + gate), load(e, s + 3 * gate), load(e, s)))
            tanhs(new, vecs)
        for b in range(rows):
            new = src + b * src_row
            if keep != 0:
                keep_vectors(vecs, cols, new, keep + b * keep_row + 2 * h_row)
            for j in range(vecs):
                v = load(e, new + j * vb)
                before = get(h_last + b * h_row + j * vb, min(lanes, cols - j * lanes))
                store(e, new + j * vb, fma(load(e, new + 2 * gate + j * vb), before - v, v))

    @outline
    def plain_cells(rows, vecs, src, src_row, relu):
        for b in range(rows):
            if relu:
                for j in range(vecs):
                    at = src + b * src_row + j * vb
                    store(e, at, maximum(load(e, at), 0.0))
            else:
                tanhs(src + b * src_row, vecs)

    @outline
    def publish(rows, until, vecs, cols, src, src_row, rounding, y, y_row, h_next, h_n, h_row):
        """New states: into the output, the next step's input and, where a row ends, the last state"""
        for b in range(rows):
            for j in range(vecs):
                n, at = min(lanes, cols - j * lanes), b * h_row + j * vb
                h = rounded(load(e, src + b * src_row + j * vb), rounding)
                put(y + b * y_row + j * vb, h, n)
                if h_next != 0:
                    put(h_next + at, h, n)
                    if b >= until:
                        put(h_n + at, h, n)

    @outline
    def pack_bias(first, vecs, cols, mode, units, b_ih, b_hh, dst):
        """Both biases of a panel, in the order of its gates; GRU's new gate adds its second one inside"""
        slots = 1 if mode >= TANH else 4
        for s in range(slots):
            g = (2 if s % 3 == 0 else s - 1) if mode == GRU else s
            at = (g * units + first * lanes) * size
            for j in range(vecs):
                n = min(lanes, cols - j * lanes)
                v = spread(e, 0.0)
                if not (mode == GRU and s == 3):
                    v = v + load_n(e, b_ih + at + j * vb, n)
                if not (mode == GRU and s == 0):
                    v = v + load_n(e, b_hh + at + j * vb, n)
                store(e, dst + (s * vecs + j) * vb, v)

    @outline
    def copy(i0, i1, src, dst):
        for i in range(i0, i1, lanes):
            n = min(lanes, i1 - i)
            put(dst + i * size, get(src + i * size, n), n)

    @outline
    def fill(rows, vecs, bias, dst, row):
        for i in range(rows):
            for j in range(vecs):
                store(e, dst + i * row + j * vb, load(e, bias + j * vb) if bias != 0 else spread(e, 0.0))

    @inline
    def one(t, nt, job, steps, table, x, hx, cx, y, h_n, c_n, keep, room, below, done):
        """``below``: where the steps are counted that the layer that makes x has done; ``done``: that this one has done"""
        (mode, rounding, batch, reverse, inputs, units, out, cut, cut_p, fresh, chunk, x_row, w_ih, wi_n, wi_k, w_hh, wh_n, wh_k,
         w_hr, wp_n, wp_k, b_ih, b_hh, pi, ph, pp, y_row, h_at, c_at, y_at, state, hidden, sums, xs, bias, counter) = JOB(job)
        hx, h_n, cx, c_n, y = hx + h_at, h_n + h_at, cx + c_at, c_n + c_at, y + y_at
        state, hidden, sums, xs, bias, counter = room + state, room + hidden, room + sums, room + xs, room + bias, room + counter
        gates = 4 if mode == LSTM else 3 if mode == GRU else 1
        slots = 1 if mode >= TANH else 4
        turn = 2 if mode == GRU else 0
        first_slot = 1 if mode == GRU else 0
        q0, q1 = cut * t // nt, cut * (t + 1) // nt
        p0, p1 = cut_p * t // nt, cut_p * (t + 1) // nt
        h_row, state_size, keep_row = out * size, batch * out * size, (5 if mode == LSTM else 4) * units * size
        for q in range(q0, q1):
            if fresh & 1:
                pack(q, cut, gates, turn, units, inputs, w_ih, units * wi_n, wi_n, wi_k, pi)
            if fresh & 2:
                pack(q, cut, gates, 0, units, out, w_hh, units * wh_n, wh_n, wh_k, ph)
            if b_ih != 0:
                first, vecs, cols = place(q, cut, units)
                pack_bias(first, vecs, cols, mode, units, b_ih, b_hh, bias + first * slots * vb)
        if fresh & 4:
            for q in range(p0, p1):
                pack(q, cut_p, 1, 0, out, units, w_hr, 0, wp_n, wp_k, pp)
        _clear(_queue(counter, nt, 0), t)
        _clear(_queue(counter, nt, 1), t)
        if steps > 0:  # without steps the kernel only packs
            i0, i1 = batch * out * t // nt, batch * out * (t + 1) // nt
            copy(i0, i1, hx, state)
            copy(i0, i1, hx, state + state_size)
            if mode == LSTM:
                copy(batch * units * t // nt, batch * units * (t + 1) // nt, cx, c_n)
        met = 1
        barrier(counter, nt, met)
        ahead = max(1, chunk // max(1, batch))
        if below != 0 or done != 0:  # a layer starts when the one below it has done so many
            ahead = min(ahead, max(1, steps // LAG))
        row0 = 0
        for s in range(steps):
            at = steps - 1 - s if reverse else s
            start, rows = _step_rows(table, batch, at, steps)
            count = 0
            if s % ahead == 0:  # the rows of the next steps, whose input's part is made with this one's
                end = max(0, at - ahead + 1) if reverse else min(steps - 1, at + ahead - 1)
                other, others = _step_rows(table, batch, end, steps)
                row0 = other if reverse else start
                count = start + rows - other if reverse else other + others - start
                if below != 0:
                    wait_for(below, end + 1)
            last, following = state + s % 2 * state_size, state + (s + 1) % 2 * state_size
            if reverse:
                until = 0 if s == steps - 1 else batch
            else:
                _, until = _step_rows(table, batch, at + 1, steps)
            y_out = y + start * y_row
            keep_at = keep + start * keep_row if keep != 0 else 0
            queue = _queue(counter, nt, met)
            _clear(_queue(counter, nt, met + 1), t)
            q, whose = _take(queue, t, nt, t, cut)
            while q >= 0:
                first, vecs, cols = place(q, cut, units)
                row, xp = slots * vecs * vb, xs + first * slots * vb * max(batch, chunk)
                if count > 0:
                    bp = bias + first * slots * vb
                    product(count, vecs, gates, inputs, x + row0 * x_row, x_row, pi + first * gates * inputs * vb,
                            bp if b_ih != 0 else 0, 0, xp, row)
                    if mode == GRU:
                        fill(count, vecs, bp + 3 * vecs * vb if b_ih != 0 else 0, xp + 3 * vecs * vb, row)
                col = first * vb
                kp = keep_at + col if keep != 0 else 0
                if cut_p == 0:
                    fetch(rows, vecs, 1, 0, y_out + col, y_row)
                    fetch(rows, vecs, 1, 0, following + col, h_row)
                    if keep != 0:
                        fetch(rows, vecs, 5 if mode == LSTM else 4 if mode == GRU else 0, units * size, kp, keep_row)
                sp = xp + (start - row0) * row
                gp = sp + first_slot * vecs * vb
                product(rows, vecs, gates, out, last, h_row, ph + first * gates * out * vb, gp, row, gp, row)
                if mode == LSTM:
                    lstm_cells(rows, vecs, cols, sp, row, rounding, c_n + col, units * size, kp, keep_row)
                elif mode == GRU:
                    gru_cells(rows, vecs, cols, sp, row, last + col, h_row, kp, keep_row)
                else:
                    plain_cells(rows, vecs, sp, row, mode == RELU)
                if cut_p > 0:
                    publish(rows, 0, vecs, cols, sp, row, rounding, hidden + col, units * size, 0, 0, 0)
                else:
                    publish(rows, until, vecs, cols, sp, row, rounding, y_out + col, y_row, following + col, h_n + col, h_row)
                q, whose = _take(queue, t, nt, whose, cut)
            met += 1
            barrier(counter, nt, met)
            if cut_p > 0:
                queue = _queue(counter, nt, met)
                _clear(_queue(counter, nt, met + 1), t)
                q, whose = _take(queue, t, nt, t, cut_p)
                while q >= 0:
                    first, vecs, cols = place(q, cut_p, out)
                    sp, col = sums + first * vb * batch, first * vb
                    product(rows, vecs, 1, units, hidden, units * size, pp + first * units * vb, 0, 0, sp, vecs * vb)
                    publish(rows, until, vecs, cols, sp, vecs * vb, rounding, y_out + col, y_row, following + col, h_n + col,
                            h_row)
                    q, whose = _take(queue, t, nt, whose, cut_p)
                met += 1
                barrier(counter, nt, met)
            if done != 0 and t == 0:
                arrive(done)

    @inline
    def body(t, nt, jobs, first, steps, table, x, hx, cx, y, h_n, c_n, keep, room, between, layer):
        """Jobs side by side, each by its share of the threads"""
        apart = min(nt, jobs)
        for k in range(t % apart, jobs, apart):
            source, to, below, done = x, y, 0, 0
            if between != 0 and k > 0:  # layers, each a few steps behind the one below it, whose turn is earlier
                source, below = between + (k - 1) * layer, _counter(room, first, k - 1) + 8
            if between != 0 and k < jobs - 1:
                to, done = between + k * layer, _counter(room, first, k) + 8
            one(t // apart, (nt - t % apart + apart - 1) // apart, first + k * JOB_BYTES, steps, table, source, hx, cx, to,
                h_n, c_n, keep, room, below, done)

    def kernel(nt, jobs, first, steps, table, x, hx, cx, y, h_n, c_n, keep, room, between, layer):
        for k in range(jobs):
            for w in range(3):
                address, step, count, value = CHECK(first + k * JOB_BYTES + CHECKS + w * 32)
                if sample(address, step, count) != value:
                    return 1
            store_scalar(INT64, _counter(room, first, k), 0)
            store_scalar(INT64, _counter(room, first, k) + 8, 0)
        parallel(nt, body, (jobs, first, steps, table, x, hx, cx, y, h_n, c_n, keep, room, between, layer))
        return 0
    return kernel


def recurrent_backward(elem_name: str) -> Callable[..., Any]:
    """The steps of the backward pass: the gradients of all gates, and of the first state; see ``rnn`` for its arguments."""
    e = ELEMS[elem_name]
    lanes, vb, size = e.lanes, e.bytes, e.size
    pack, product, place = _panels(e)
    get, put, fetch = _memory(e)

    @outline
    def gather(rows, more, vecs, cols, src, src_row, grad, dh, h_row, kept):
        """src[:rows] = grad + dh + src, the last for the first ``more`` rows only; what src has beyond ``rows`` goes to dh.

        ``kept``, if any, gets the result too.
        """
        for b in range(max(rows, more)):
            for j in range(vecs):
                n, s, at = min(lanes, cols - j * lanes), src + b * src_row + j * vb, b * h_row + j * vb
                v = get(dh + at, n)
                if b < more:
                    v = v + load(e, s)
                if b < rows:
                    v = v + get(grad + at, n)
                    store(e, s, v)
                    if kept != 0:
                        put(kept + at, v, n)
                    v = spread(e, 0.0)
                put(dh + at, v, n)

    @outline
    def lstm_cells(rows, vecs, cols, src, src_row, keep, keep_row, before, before_row, known, initial, dc, c_row,
                   dg, dg_row, hidden):
        for b in range(rows):
            for j in range(vecs):
                n = min(lanes, cols - j * lanes)
                at = b * c_row + j * vb
                k = keep + b * keep_row + j * vb
                dh = load(e, src + b * src_row + j * vb)
                i, f, g, o = get(k, n), get(k + c_row, n), get(k + 2 * c_row, n), get(k + 3 * c_row, n)
                t = tanh(get(k + 4 * c_row, n))
                last = get(before + b * before_row + j * vb if b < known else initial + at, n)
                d = fma(dh * o, 1.0 - t * t, get(dc + at, n))
                put(dc + at, d * f, n)
                to = dg + b * dg_row + j * vb
                put(to, d * g * (i * (1.0 - i)), n)
                put(to + c_row, d * last * (f * (1.0 - f)), n)
                put(to + 2 * c_row, d * i * (1.0 - g * g), n)
                put(to + 3 * c_row, dh * t * (o * (1.0 - o)), n)
                if hidden != 0:
                    put(hidden + at, o * t, n)

    @outline
    def gru_cells(rows, vecs, cols, src, src_row, keep, keep_row, before, known, initial, dh_out, h_row, dx, dg, dg_row):
        for b in range(rows):
            for j in range(vecs):
                n = min(lanes, cols - j * lanes)
                at = b * h_row + j * vb
                k = keep + b * keep_row + j * vb
                dh = load(e, src + b * src_row + j * vb)
                r, z, new, part = get(k, n), get(k + h_row, n), get(k + 2 * h_row, n), get(k + 3 * h_row, n)
                last = get(before + at if b < known else initial + at, n)
                d_new = dh * (1.0 - z) * (1.0 - new * new)
                d_z = dh * (last - new) * (z * (1.0 - z))
                d_r = d_new * part * (r * (1.0 - r))
                put(dh_out + at, dh * z, n)
                to = b * dg_row + j * vb
                put(dx + to, d_r, n)
                put(dg + to, d_r, n)
                put(dx + to + h_row, d_z, n)
                put(dg + to + h_row, d_z, n)
                put(dx + to + 2 * h_row, d_new, n)
                put(dg + to + 2 * h_row, d_new * r, n)

    @outline
    def plain_cells(rows, vecs, cols, src, src_row, relu, y, h_row, dg):
        for b in range(rows):
            for j in range(vecs):
                n, at = min(lanes, cols - j * lanes), b * h_row + j * vb
                h, dh = get(y + at, n), load(e, src + b * src_row + j * vb)
                if relu:
                    put(dg + at, select(h <= 0.0, 0.0, dh), n)
                else:
                    put(dg + at, dh * (1.0 - h * h), n)

    @inline
    def body(t, nt, mode, steps, batch, table, reverse, units, out, cut, cut_p, hx, cx, w_hh, wh_n, wh_k, w_hr, wp_n, wp_k,
             ph, pp, y, keep, grad, dh, dc, dx, dg, d_out, hidden, sums, counter):
        gates = 4 if mode == LSTM else 3 if mode == GRU else 1
        cut_h = cut_p if cut_p > 0 else cut  # of the state's units
        q0, q1 = cut * t // nt, cut * (t + 1) // nt
        p0, p1 = cut_h * t // nt, cut_h * (t + 1) // nt
        c_row, h_row, dg_row, keep_row = units * size, out * size, gates * units * size, (5 if mode == LSTM else 4) * units * size
        for q in range(p0, p1):
            pack(q, cut_h, 1, 0, out, gates * units, w_hh, 0, wh_n, wh_k, ph)
        if cut_p > 0:
            for q in range(q0, q1):
                pack(q, cut, 1, 0, units, out, w_hr, 0, wp_n, wp_k, pp)  # read after the first barrier
        met = 0
        done, done_rows = 0, 0  # the step before, which the sequence takes after this one
        for s in range(steps + 1):
            at = s if reverse else steps - 1 - s
            start, rows = _step_rows(table, batch, at, steps)
            before, known = _step_rows(table, batch, at + 1 if reverse else at - 1, steps)
            queue = _queue(counter, nt, met)
            _clear(_queue(counter, nt, met + 1), t)
            q, whose = _take(queue, t, nt, t, cut_h)
            while q >= 0:
                first, vecs, cols = place(q, cut_h, out)
                sp, row, col = sums + first * vb * batch, vecs * vb, first * vb
                if cut_p == 0:
                    fetch(rows, vecs, 1, 0, grad + start * h_row + col, h_row)
                    if mode < TANH:
                        fetch(rows, vecs, 4, c_row, keep + start * keep_row + col, keep_row)
                    if mode == LSTM:
                        fetch(known, vecs, 1, 0, keep + before * keep_row + 4 * c_row + col, keep_row)
                    else:
                        fetch(known, vecs, 1, 0, y + before * h_row + col, h_row)
                    fetch(rows, vecs, gates, c_row, dg + start * dg_row + col, dg_row)
                product(done_rows, vecs, 1, gates * units, dg + done * dg_row, dg_row, ph + first * gates * units * vb, 0, 0,
                        sp, row)
                gather(rows, done_rows, vecs, cols, sp, row, grad + start * h_row + col, dh + col, h_row,
                       d_out + start * h_row + col if cut_p > 0 else 0)
                if cut_p == 0:
                    kp = keep + start * keep_row + col
                    if mode == LSTM:
                        lstm_cells(rows, vecs, cols, sp, row, kp, keep_row, keep + before * keep_row + 4 * c_row + col, keep_row,
                                   known, cx + col, dc + col, c_row, dg + start * dg_row + col, dg_row, 0)
                    elif mode == GRU:
                        gru_cells(rows, vecs, cols, sp, row, kp, keep_row, y + before * h_row + col, known, hx + col,
                                  dh + col, h_row, dx + start * dg_row + col, dg + start * dg_row + col, dg_row)
                    else:
                        plain_cells(rows, vecs, cols, sp, row, mode == RELU, y + start * h_row + col, h_row,
                                    dg + start * dg_row + col)
                q, whose = _take(queue, t, nt, whose, cut_h)
            met += 1
            barrier(counter, nt, met)
            if cut_p > 0:
                queue = _queue(counter, nt, met)
                _clear(_queue(counter, nt, met + 1), t)
                q, whose = _take(queue, t, nt, t, cut)
                while q >= 0:
                    first, vecs, cols = place(q, cut, units)
                    sp, row, col = sums + first * vb * batch, vecs * vb, first * vb
                    product(rows, vecs, 1, out, d_out + start * h_row, h_row, pp + first * out * vb, 0, 0, sp, row)
                    lstm_cells(rows, vecs, cols, sp, row, keep + start * keep_row + col, keep_row,
                               keep + before * keep_row + 4 * c_row + col, keep_row, known, cx + col, dc + col, c_row,
                               dg + start * dg_row + col, dg_row, hidden + start * c_row + col)
                    q, whose = _take(queue, t, nt, whose, cut)
                met += 1
                barrier(counter, nt, met)
            done, done_rows = start, rows

    def kernel(nt, mode, steps, batch, table, reverse, units, out, cut, cut_p, hx, cx, w_hh, wh_n, wh_k, w_hr, wp_n, wp_k,
               ph, pp, y, keep, grad, dh, dc, dx, dg, d_out, hidden, sums, counter):
        store_scalar(INT64, counter, 0)
        for v in range(2 * nt):
            _clear(counter + LINE, v)
        parallel(nt, body, (mode, steps, batch, table, reverse, units, out, cut, cut_p, hx, cx, w_hh, wh_n, wh_k,
                            w_hr, wp_n, wp_k, ph, pp, y, keep, grad, dh, dc, dx, dg, d_out, hidden, sums, counter))
    return kernel


def scan(elem_name: str) -> Callable[..., Any]:
    """c_t = f_t · c_{t-1} + u_t for n columns next to each other; the threads share the columns. Strides of t in bytes.

    16-bit types carry float32 from step to step.
    """
    e = ELEMS[elem_name]
    lanes = e.lanes

    @inline
    def body(t, nt, steps, n, f, f_t, u, u_t, c0, c, c_t):
        vectors = (n + lanes - 1) // lanes
        for v in range(vectors * t // nt, vectors * (t + 1) // nt):
            i = v * e.bytes
            m = min(lanes, n - v * lanes)
            state = load_n(e, c0 + i, m)
            if m == lanes:
                for s in range(steps):
                    state = fma(load(e, f + s * f_t + i), state, load(e, u + s * u_t + i))
                    store(e, c + s * c_t + i, state)
            else:
                for s in range(steps):
                    state = fma(load_n(e, f + s * f_t + i, m), state, load_n(e, u + s * u_t + i, m))
                    store_n(e, c + s * c_t + i, state, m)

    def kernel(nt, steps, n, f, f_t, u, u_t, c0, c, c_t):
        parallel(nt, body, (steps, n, f, f_t, u, u_t, c0, c, c_t))
    return kernel
