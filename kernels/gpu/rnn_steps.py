"""Recurrent layers step by step, in Triton: the plain path, for sizes that do not fit on the chip at once, and where there is no
CuPy, on AMD's GPUs say. A step is one matrix product and one kernel for all of its gates; two launches a step is what it costs.

What is kept for the backward, and what it makes of it, is as in ``rnn.cu``; everything is float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from fastnn.kernels.reference.rnn import GATES, KEPT

from . import matmul
from .engine import functions, launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["start", "rows"])
def step(y, h, c, kept, x, z, b, start, rows, units, y_s, MODE: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr,
         C: tl.constexpr):  # fmt: skip
    """The new states and cells, in place, of the rows from start on. x: the input's part of the gates, z: the state's, of this
    step alone; b: what a GRU adds to the state's part of n, or None; kept: None where nothing is kept."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    inside = at < functions.wide(rows) * units
    row, unit = at // units, at % units
    place = row + functions.wide(start)
    px, pz = x + place * units * GATES + unit, z + row * units * GATES + unit
    old = tl.load(h + at, mask=inside, other=0.0)
    keep = kept
    if kept is not None:
        keep = kept + place * units * KEPT + unit
    if MODE == "lstm":
        i = functions.sigmoid(tl.load(px, mask=inside, other=0.0) + tl.load(pz, mask=inside, other=0.0))
        f = functions.sigmoid(tl.load(px + units, mask=inside, other=0.0) + tl.load(pz + units, mask=inside, other=0.0))
        g = functions.tanh(tl.load(px + 2 * units, mask=inside, other=0.0) + tl.load(pz + 2 * units, mask=inside, other=0.0))
        o = functions.sigmoid(tl.load(px + 3 * units, mask=inside, other=0.0) + tl.load(pz + 3 * units, mask=inside, other=0.0))
        cell = f * tl.load(c + at, mask=inside, other=0.0) + i * g
        new = o * functions.tanh(cell)
        tl.store(c + at, cell, mask=inside)
        if kept is not None:
            tl.store(keep, i, mask=inside)
            tl.store(keep + units, f, mask=inside)
            tl.store(keep + 2 * units, g, mask=inside)
            tl.store(keep + 3 * units, o, mask=inside)
            tl.store(keep + 4 * units, cell, mask=inside)
    elif MODE == "gru":
        r = functions.sigmoid(tl.load(px, mask=inside, other=0.0) + tl.load(pz, mask=inside, other=0.0))
        u = functions.sigmoid(tl.load(px + units, mask=inside, other=0.0) + tl.load(pz + units, mask=inside, other=0.0))
        part = tl.load(pz + 2 * units, mask=inside, other=0.0)
        if b is not None:
            part += tl.load(b + unit, mask=inside, other=0.0)
        n = functions.tanh(tl.load(px + 2 * units, mask=inside, other=0.0) + r * part)
        new = n + u * (old - n)
        if kept is not None:
            tl.store(keep, r, mask=inside)
            tl.store(keep + units, u, mask=inside)
            tl.store(keep + 2 * units, n, mask=inside)
            tl.store(keep + 3 * units, part, mask=inside)
    else:
        new = tl.load(px, mask=inside, other=0.0) + tl.load(pz, mask=inside, other=0.0)
        if MODE == "rnn_relu":
            new = tl.where(new < 0.0, 0.0, new)
        else:
            new = functions.tanh(new)
    tl.store(h + at, new, mask=inside)
    tl.store(y + place * y_s + unit, new, mask=inside)


@triton.jit(do_not_specialize=["start", "rows"])
def step_back(gates_x, gates_h, dh, dc, grad, kept, state, cell, y, start, rows, units, grad_s, y_s, MODE: tl.constexpr,
              GATES: tl.constexpr, KEPT: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """The gates' gradients on the input's and, for a GRU, on the state's side; dh and dc in place: what does not pass the gates
    back to the step's old state, and the old cell's. state, cell: those that each row's step started from."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    inside = at < functions.wide(rows) * units
    row, unit = at // units, at % units
    place = row + functions.wide(start)
    to = place * units * GATES + unit
    d = tl.load(dh + at, mask=inside, other=0.0) + tl.load(grad + place * grad_s + unit, mask=inside, other=0.0)
    if MODE == "lstm":
        keep = kept + place * units * KEPT + unit
        i, f = tl.load(keep, mask=inside, other=0.0), tl.load(keep + units, mask=inside, other=0.0)
        g, o = tl.load(keep + 2 * units, mask=inside, other=0.0), tl.load(keep + 3 * units, mask=inside, other=0.0)
        t = functions.tanh(tl.load(keep + 4 * units, mask=inside, other=0.0))
        before = tl.load(cell + place * units + unit, mask=inside, other=0.0)
        slope = tl.load(dc + at, mask=inside, other=0.0) + d * o * (1.0 - t * t)
        tl.store(gates_x + to, slope * g * i * (1.0 - i), mask=inside)
        tl.store(gates_x + to + units, slope * before * f * (1.0 - f), mask=inside)
        tl.store(gates_x + to + 2 * units, slope * i * (1.0 - g * g), mask=inside)
        tl.store(gates_x + to + 3 * units, d * t * o * (1.0 - o), mask=inside)
        tl.store(dc + at, slope * f, mask=inside)
        around = tl.zeros_like(d)
    elif MODE == "gru":
        keep = kept + place * units * KEPT + unit
        r, z = tl.load(keep, mask=inside, other=0.0), tl.load(keep + units, mask=inside, other=0.0)
        n, part = tl.load(keep + 2 * units, mask=inside, other=0.0), tl.load(keep + 3 * units, mask=inside, other=0.0)
        before = tl.load(state + place * units + unit, mask=inside, other=0.0)
        d_n = d * (1.0 - z) * (1.0 - n * n)
        d_z = d * (before - n) * z * (1.0 - z)
        d_r = d_n * part * r * (1.0 - r)
        tl.store(gates_x + to, d_r, mask=inside)
        tl.store(gates_h + to, d_r, mask=inside)
        tl.store(gates_x + to + units, d_z, mask=inside)
        tl.store(gates_h + to + units, d_z, mask=inside)
        tl.store(gates_x + to + 2 * units, d_n, mask=inside)
        tl.store(gates_h + to + 2 * units, d_n * r, mask=inside)
        around = d * z
    else:
        new = tl.load(y + place * y_s + unit, mask=inside, other=0.0)
        if MODE == "rnn_relu":
            slope = tl.where(new > 0.0, d, 0.0)
        else:
            slope = d * (1.0 - new * new)
        tl.store(gates_x + to, slope, mask=inside)
        around = tl.zeros_like(d)
    tl.store(dh + at, around, mask=inside)


def _steps(rows: int, batch: int, batch_sizes: Tensor | None, backwards: bool) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each step"""
    sizes = [batch] * (rows // batch) if batch_sizes is None else batch_sizes.tolist()
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    order = range(len(sizes))
    yield from ((starts[t], sizes[t]) for t in (reversed(order) if backwards else order))


def forward(mode: str, x: Tensor, w_hh: Tensor, bias: Tensor | None, batch_sizes: Tensor | None, reverse: bool, y: Tensor,
            h: Tensor, c: Tensor | None, kept: Tensor | None) -> None:
    """One direction of one layer: y (rows, H) of any row stride; h and c (B, H) are the first states, and become the last ones.
    x (rows, G·H): the input's part of the gates; bias: of a GRU's state's part of n."""
    batch, units = h.shape
    room = h.new_empty(batch, x.shape[1])
    for start, size in _steps(len(x), batch, batch_sizes, reverse):
        z = room[:size]
        matmul.multiply(z, h[:size], w_hh.t())
        launch.run(step, -(-size * units // _BLOCK), h.device, y, h, c, kept, x, z, bias, start, size, units, y.stride(0),
                   MODE=mode, GATES=GATES[mode], KEPT=KEPT[mode], C=_BLOCK, num_warps=4)  # fmt: skip


def backward(mode: str, grad: Tensor, w_hh: Tensor, batch_sizes: Tensor | None, reverse: bool, y: Tensor, kept: Tensor | None,
             state: Tensor, cell: Tensor | None, gates_x: Tensor, gates_h: Tensor, dh: Tensor, dc: Tensor | None) -> None:
    """gates_x, gates_h (one tensor but for a GRU): the gates' gradients. grad (rows, H): of the states; dh and dc (B, H): of the
    last state and cell, which become those of the first ones; state, cell (rows, H): what each row's step started from."""
    batch, units = dh.shape
    for start, size in _steps(len(grad), batch, batch_sizes, not reverse):
        launch.run(step_back, -(-size * units // _BLOCK), dh.device, gates_x, gates_h, dh, dc, grad, kept, state, cell, y, start,
                   size, units, grad.stride(0), y.stride(0), MODE=mode, GATES=GATES[mode], KEPT=KEPT[mode], C=_BLOCK,
                   num_warps=4)  # fmt: skip
        carry = dh[:size]
        matmul.multiply(carry, gates_h[start : start + size], w_hh, matmul.Epilogue(residual=carry))
