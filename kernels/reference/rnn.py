"""Recurrent layers as plain maths: one direction of one layer, step by step. Differentiable any number of times.

LSTM: Hochreiter & Schmidhuber 1997, with forget gates (Gers et al. 2000), and optionally a projection (Sak et al. 2014,
section 2); GRU: Cho et al. 2014, in the variant that resets after the product, as cuDNN and torch have it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
KEPT = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}  # numbers a unit and row that the backward needs besides the output


def _step(mode: str, x: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """From the input's part of the gates and the last state: the new state, the new cell, and what is kept."""
    z = torch.nn.functional.linear(h, w_hh, b_hh)
    if mode == "lstm":
        i, f, g, o = (x + z).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, [i, f, g, o, c]
    if mode == "gru":
        x_r, x_z, x_n = x.chunk(3, 1)
        h_r, h_z, h_n = z.chunk(3, 1)
        r, u = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return n + u * (h - n), c, [r, u, n, h_n]
    return ((x + z).tanh() if mode == "rnn_tanh" else (x + z).relu()), c, []


def _sizes(input: Tensor, hx: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """The rows of each step"""
    if batch_sizes is not None:
        return batch_sizes.tolist()
    return [hx.shape[0]] * (input.shape[0] // max(1, hx.shape[0]))


def recurrent(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    mode: str,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _sizes(input, hx, batch_sizes)
    gates = torch.nn.functional.linear(input, w_ih, b_ih).split(sizes)
    h, c = hx, hx.new_zeros(hx.shape[0], 0) if cx is None else cx
    states: list[Tensor] = [hx] * len(sizes)
    kept: list[Tensor] = [hx] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        new, cell, parts = _step(mode, gates[t], h[:n], c[:n], w_hh, b_hh)
        states[t] = new if w_hr is None else new @ w_hr.t()
        kept[t] = torch.cat(parts, 1) if parts else new[:, :0]
        h, c = torch.cat([states[t], h[n:]]), torch.cat([cell, c[n:]])
    y = torch.cat(states) if states else hx[:0]
    reserve = torch.cat(kept) if keep and kept else hx.new_empty(0)
    return y, h, c if cx is not None else hx.new_empty(0), reserve.detach()


def _step_back(
    mode: str, d: Tensor, dc: Tensor, h: Tensor, c: Tensor, new: Tensor, parts: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor | float, Tensor]:
    """From a new state's and cell's gradients those of the gates, on the input's and the state's side; of the last state as
    far as it does not pass the gates; of the last cell."""
    if mode == "lstm":
        i, f, g, o, cell = parts
        dc = dc + d * o * (1 - cell.tanh() ** 2)
        gates = torch.cat(
            [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), d * cell.tanh() * o * (1 - o)], 1
        )
        return gates, gates, 0.0, dc * f
    if mode == "gru":
        r, z, n, part = parts
        d_n, d_z = d * (1 - z) * (1 - n * n), d * (h - n) * z * (1 - z)
        d_r = d_n * part * r * (1 - r)
        return torch.cat([d_r, d_z, d_n], 1), torch.cat([d_r, d_z, d_n * r], 1), d * z, dc
    gates = d * (1 - new * new) if mode == "rnn_tanh" else d * ~(new <= 0)  # a NaN's slope is 1, as in torch
    return gates, gates, 0.0, dc


def _over_steps(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, in stretches: a single sum over thousands of rows was 9 ulp off"""
    parts = [a.t() @ b for a, b in zip(left.split(256), right.split(256), strict=True)]
    return torch.stack(parts).sum(0)


def recurrent_backward(
    grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, input: Tensor, hx: Tensor, cx: Tensor | None, w_ih: Tensor,
    w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, y: Tensor, reserve: Tensor,
    batch_sizes: Tensor | None, mode: str, reverse: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of input, hx, cx and the weights; those not needed are empty. y and reserve are made again."""
    sizes = _sizes(input, hx, batch_sizes)
    order = list(reversed(range(len(sizes))) if reverse else range(len(sizes)))
    gates, grads = torch.nn.functional.linear(input, w_ih, b_ih).split(sizes), grad_y.split(sizes)
    h, c = hx, hx.new_zeros(hx.shape[0], 0) if cx is None else cx
    done: dict[int, Any] = {}
    for t in order:
        n = sizes[t]
        new, cell, parts = _step(mode, gates[t], h[:n], c[:n], w_hh, b_hh)
        done[t] = h[:n], c[:n], new, parts
        h, c = torch.cat([new if w_hr is None else new @ w_hr.t(), h[n:]]), torch.cat([cell, c[n:]])
    dh, dc = grad_h, grad_c.reshape(c.shape)
    d_input: dict[int, Tensor] = {}
    d_state: dict[int, Tensor] = {}
    d_out: dict[int, Tensor] = {}
    for t in reversed(order):
        n = sizes[t]
        d_out[t] = d = dh[:n] + grads[t]
        d_input[t], d_state[t], around, cell = _step_back(mode, d if w_hr is None else d @ w_hr, dc[:n], *done[t])
        dh, dc = torch.cat([d_state[t] @ w_hh + around, dh[n:]]), torch.cat([cell, dc[n:]])

    def all_rows(steps: dict[int, Any], like: Tensor) -> Tensor:
        return torch.cat([steps[t] for t in range(len(sizes))]) if steps else like[:0]

    wide = grad_y.new_zeros(0, w_hh.shape[0])
    gates_x, gates_h, out = all_rows(d_input, wide), all_rows(d_state, wide), all_rows(d_out, grad_y)
    before = all_rows({t: value[0] for t, value in done.items()}, hx)
    made = all_rows({t: value[2] for t, value in done.items()}, hx)
    found = (gates_x @ w_ih, dh, dc, _over_steps(gates_x, input), _over_steps(gates_h, before), gates_x.sum(0), gates_h.sum(0),
             _over_steps(out, made) if w_hr is not None else out)  # fmt: skip
    return tuple(value if needed else input.new_empty(0) for value, needed in zip(found, needs, strict=True))


def unpack(weights: Tensor, mode: str, inputs: int, units: int, layers: int, directions: int, bias: bool) -> list[list[Any]]:
    """w_ih, w_hh, b_ih, b_hh of each layer and direction out of one vector that has them all in this order."""
    wide, found, at = GATES[mode] * units, [], 0
    for k in range(layers * directions):
        columns = inputs if k < directions else directions * units
        job: list[Any] = []
        for shape in ((wide, columns), (wide, units), *([(wide,)] * 2 if bias else [])):
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            job.append(weights[at : at + count].view(shape))
            at += count
        found.append(job if bias else [*job, None, None])
    return found


def recurrent_stack(
    input: Tensor, hx: Tensor, cx: Tensor | None, weights: Tensor, batch_sizes: Tensor | None, mode: str, layers: int,
    bidirectional: bool, bias: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Layers on layers: each sees all directions of the one below. What is kept: the lower layers' outputs, then their gates."""
    directions = 2 if bidirectional else 1
    jobs = unpack(weights, mode, input.shape[1], hx.shape[2], layers, directions, bias)
    rows, lower, kept, states, cells = input, [], [], [], []
    for layer in range(layers):
        if layer:
            lower.append(rows.detach().reshape(-1))
        outs = []
        for k in range(layer * directions, (layer + 1) * directions):
            c0 = None if cx is None else cx[k]
            w_ih, w_hh, b_ih, b_hh = jobs[k]
            y, h, c, reserve = recurrent(
                rows, hx[k], c0, w_ih, w_hh, b_ih, b_hh, None, batch_sizes, mode, k % directions == 1, keep
            )  # fmt: skip
            outs.append(y)
            states.append(h)
            cells.append(c)
            kept.append(reserve.reshape(-1))
        rows = torch.cat(outs, 1)
    last = cells[0] if cx is None else torch.stack(cells)
    return rows, torch.stack(states), last, torch.cat([*lower, *kept]) if keep else hx.new_empty(0)


def recurrent_stack_backward(
    grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, input: Tensor, hx: Tensor, cx: Tensor | None, weights: Tensor, y: Tensor,
    reserve: Tensor, batch_sizes: Tensor | None, mode: str, layers: int, bidirectional: bool, bias: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of input, hx, cx and weights, layer by layer from the top; everything else is made again."""
    directions, units = 2 if bidirectional else 1, hx.shape[2]
    jobs = unpack(weights, mode, input.shape[1], units, layers, directions, bias)
    below = [input]
    made: dict[int, tuple[Tensor, ...]] = {}
    for k, job in enumerate(jobs):
        c0 = None if cx is None else cx[k]
        w_ih, w_hh, b_ih, b_hh = job
        made[k] = recurrent(
            below[k // directions], hx[k], c0, w_ih, w_hh, b_ih, b_hh, None, batch_sizes, mode, k % directions == 1, True
        )  # fmt: skip
        if k % directions == directions - 1:
            below.append(torch.cat([made[i][0] for i in range(k - directions + 1, k + 1)], 1))
    d_h, d_c, d_weights = [hx] * len(jobs), [hx] * len(jobs), [[weights]] * len(jobs)
    grad = grad_y
    for layer in reversed(range(layers)):
        d_below: Any = 0
        for k in range(layer * directions, (layer + 1) * directions):
            c0, d0 = (None, grad_c) if cx is None else (cx[k], grad_c[k])
            w_ih, w_hh, b_ih, b_hh = jobs[k]
            d_x, d_h[k], d_c[k], *d_params = recurrent_backward(
                grad.split(units, 1)[k % directions], grad_h[k], d0, below[layer], hx[k], c0, w_ih, w_hh, b_ih, b_hh, None,
                made[k][0], made[k][3], batch_sizes, mode, k % directions == 1,
                [True, True, cx is not None, True, True, bias, bias, False],
            )  # fmt: skip
            d_below = d_below + d_x
            d_weights[k] = [p.reshape(-1) for p in d_params[: 4 if bias else 2]]
        grad = d_below
    found = (grad, torch.stack(d_h), torch.stack(d_c) if cx is not None else hx, torch.cat([p for job in d_weights for p in job]))
    return tuple(value if needed else input.new_empty(0) for value, needed in zip(found, needs, strict=True))


def scan(f: Tensor, u: Tensor, c0: Tensor, reverse: bool) -> Tensor:
    """c_t = f_t · c_{t-1} + u_t, the pooling of a QRNN (Bradbury et al. 2016, section 2.1)."""
    states, c = [], c0
    steps = list(zip(f.unbind(), u.unbind()))  # the gradient of f[t] would be as large as f's, for each t
    for forget, new in reversed(steps) if reverse else steps:
        c = forget * c + new
        states.append(c)
    return torch.stack(states[::-1] if reverse else states) if states else f + u
